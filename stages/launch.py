"""A training of several processes: torchrun starts them, and each joins the others.

All of them run the same program. The first owns what the stage leaves; what the others write is
thrown away, and they are silent. If one fails all end, and what it had to say is told once.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from torch import distributed as dist

from stages.artefacts import die_with_parent, is_first

# For a last checkpoint on SIGTERM; then torchrun kills.
SECONDS_TO_SAVE = 120

# The folder where processes leave their last words, a file each, for who started them.
LAST_WORDS = "PREFOPT_LAST_WORDS"


class Together(AbstractContextManager[None]):
    """The block that the processes of a training run together.

    A process that torchrun did not start starts `num_processes` of its own program, waits for them,
    and exits as they do. A process that torchrun did start joins the others, those of other
    machines included. One process alone does neither.

    Raises:
        ValueError: if there are more processes than GPUs, or torchrun started another number.
    """

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._muted = contextlib.ExitStack()

    def __enter__(self) -> None:
        if "RANK" in os.environ:
            self._join()
        elif self._num_processes > 1:
            check_gpus(self._num_processes, torch.cuda.device_count())
            die_with_parent()
            sys.exit(_torchrun(self._num_processes))

    def _join(self) -> None:
        started = int(os.environ["WORLD_SIZE"])
        if started != self._num_processes:
            raise ValueError(
                f"compute.num_processes: torchrun started another number, got "
                f"{self._num_processes} for {started}; set it to the number on all machines"
            )
        check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count())
        die_with_parent()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Numbers of the loop lie on the CPU, shards on the GPU if there is one.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if not is_first():
            nowhere = self._muted.enter_context(open(os.devnull, "w"))
            self._muted.enter_context(contextlib.redirect_stderr(nowhere))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._muted.close()
        if not dist.is_initialized():
            return
        if error is None:
            dist.destroy_process_group()
        elif isinstance(error, Exception) and LAST_WORDS in os.environ:
            # What Python prints when this process ends, which breaks the connections to the others.
            told = Path(os.environ[LAST_WORDS]) / f"{dist.get_rank()}.txt"
            sys.stderr = open(told, "w", buffering=1)


def check_gpus(num_processes: int, num_gpus: int) -> None:
    """Refuse processes that would share a GPU; without GPUs they share the CPUs."""
    if 0 < num_gpus < num_processes:
        raise ValueError(
            f"compute.num_processes: more than this machine has GPUs, got {num_processes} for "
            f"{num_gpus}; a process takes one, lower it"
        )


def _torchrun(num_processes: int) -> int:
    """Run this program again, as several processes; what they exit with."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    program = sys.modules["__main__"].__spec__
    assert program is not None, "start it as python -m MODULE"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # It would tell at length that a process failed, and not why.
    logging.disable()
    options = ["--standalone", "--nproc-per-node", str(num_processes)]
    with tempfile.TemporaryDirectory() as last_words:
        os.environ[LAST_WORDS] = last_words
        try:
            run.run(run.parse_args([*options, "-m", program.name, *sys.argv[1:]]))
        except SignalException as ended:
            return 128 + ended.sigval
        except ChildFailedError as failed:
            exits = {rank: failure.exitcode for rank, failure in failed.failures.items()}
            # By SIGTERM torchrun ends the others.
            codes = {rank: code for rank, code in exits.items() if code != -signal.SIGTERM}
            sys.stderr.write(_cause(codes, Path(last_words)))
            code = min(codes.values(), default=-signal.SIGTERM)
            return 128 - code if code < 0 else code
    return 0


def _cause(codes: dict[int, int], last_words: Path) -> str:
    """Why a training failed, when the others fell with the process that failed first.

    A refusal is a cause. So is a signal. Else who spoke first failed first.
    """
    files = sorted(last_words.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    told = [path.read_text() for path in files]
    refusals = [text for text in told if text.startswith("error: ")]
    killed = [
        f"error: process {rank} was ended by {signal.Signals(-code).name}; run it again, it goes "
        "on from its last checkpoint\n"
        for rank, code in codes.items()
        if code < 0
    ]
    return next(iter([*refusals, *killed, *told]), "")
