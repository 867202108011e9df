"""Time, memory and the machine: what a step takes, and what the hardware could give."""

import ctypes
import importlib.metadata
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20


@dataclass(frozen=True)
class Took:
    """Seconds that a call took.

    Args:
        compute: of all of the process's threads on a CPU; between two events on a GPU.
        wall: from its start to the end of all that it started.
    """

    compute: float
    wall: float


def timed(call: Callable[[], Any], device: torch.device) -> Took:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        wall = time.perf_counter()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return Took(start.elapsed_time(end) / 1000, time.perf_counter() - wall)
    wall, compute = time.perf_counter(), time.process_time()
    call()
    return Took(time.process_time() - compute, time.perf_counter() - wall)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that a call holds beyond what was held before, in bytes.

    On a CPU it is resident memory; None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    if platform.system() != "Linux":
        call()
        return None
    # What earlier steps freed goes back to the system, or it would be used unseen.
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")  # resets the high-water mark
    held = _kibibytes("VmRSS")
    call()
    return (_kibibytes("VmHWM") - held) * 1024


def _kibibytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1])


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a matrix product, in FLOP per compute second."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = [timed(lambda: torch.mm(left, right, out=out), device).compute for _ in range(12)]
    return 2 * size**3 / min(times)


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know of where the numbers come from."""
    releases = ("torch", "transformers", "trl", "accelerate", "datasets")
    described: dict[str, Any] = {
        "processor": _processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in releases},
    }
    if device.type == "cuda":
        described["accelerator"] = torch.cuda.get_device_name()
    return described


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        found = re.search(r"^model name\s*: (.+)$", listing.read_text(), re.MULTILINE)
        if found is not None:
            return found[1]
    return platform.processor() or platform.machine()
