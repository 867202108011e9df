"""Checkpoints: the state of a training between two of its steps, whole or not at all.

Data order is a function of the step number alone, so the state is weights, optimiser moments, the
metrics of the steps so far and, where a watch chooses among policies, the weights of the best.
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Metrics = dict[str, int | float]  # int: the step


@dataclass(frozen=True)
class Checkpoints:
    """Where a run keeps what it needs to resume, and how often it writes it.

    The last two are kept; one that is not what was written is passed over, with a warning.
    """

    directory: Path
    every: int


def save(
    directory: Path,
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.AdamW,
    history: list[Metrics],
    best: dict[str, Tensor],
) -> None:
    """Write a checkpoint beside the ones before it; the last two are kept."""
    tensors: dict[str, Tensor] = {f"best/{name}": value for name, value in best.items()}
    for name, parameter in parameters.items():
        tensors[f"policy/{name}"] = parameter.detach().contiguous()
        for key, value in optimiser.state[parameter].items():
            tensors[f"{key}/{name}"] = value.contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    partial, final = directory / "partial", directory / f"{len(history):08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(tensors, partial / "state.safetensors")
    with open(partial / "history.jsonl", "w") as file:
        file.writelines(json.dumps(metrics) + "\n" for metrics in history)
    (partial / "digests.json").write_text(json.dumps(_digests(partial)))
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for older in sorted(p for p in directory.iterdir() if p.name.isdigit())[:-2]:
        shutil.rmtree(older)


def restore(
    directory: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.AdamW
) -> tuple[list[Metrics], dict[str, Tensor]]:
    """Put the last whole checkpoint into parameters and optimiser.

    Returns:
        The metrics of its steps, and the weights of the best policy among them.
    """
    saved = sorted(p for p in directory.glob("*") if p.name.isdigit())
    while saved and not _is_whole(saved[-1]):
        damaged = saved.pop()
        warnings.warn(
            f"{damaged}: a damaged checkpoint; going on from "
            f"{saved[-1].name if saved else 'the start'}",
            stacklevel=2,
        )
        shutil.rmtree(damaged)
    if not saved:
        return [], {}
    tensors = load_file(saved[-1] / "state.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(f"policy/{name}"))
    best = {name: tensors.pop(f"best/{name}") for name in parameters if f"best/{name}" in tensors}
    for key_and_name, value in tensors.items():
        key, name = key_and_name.split("/", 1)
        parameter = parameters[name]
        # AdamW's step counter stays on the CPU unless it is capturable; fused keeps it beside.
        optimiser.state[parameter][key] = value.to(parameter.device)
    with open(saved[-1] / "history.jsonl") as file:
        return [json.loads(line) for line in file], best


def _is_whole(checkpoint: Path) -> bool:
    """Whether its bytes are those that were written."""
    digests = checkpoint / "digests.json"
    try:
        return json.loads(digests.read_text()) == _digests(checkpoint)
    except (OSError, ValueError):
        return False


def _digests(checkpoint: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("state.safetensors", "history.jsonl"):
        with open(checkpoint / name, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
