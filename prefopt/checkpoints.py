"""Checkpoints: the state of a training between two of its steps, whole or not at all.

Data order is a function of the step number alone, so the state is weights, optimiser moments, the
metrics of the steps so far and, where a watch chooses among policies, the weights of the best. Of
several processes each writes its own shards, into a folder that all of them see; any number of
processes reads what any other number wrote.
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

from prefopt import distributed

Metrics = dict[str, int | float]  # int: the step

DIGESTS = "digests.json"


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
    partial = directory / "partial"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.wait()
    if distributed.size() == 1:
        save_file(tensors, partial / "state.safetensors")
    else:
        distributed.write(tensors, partial)
    if distributed.rank() == 0:
        _complete(partial, history)
    distributed.wait()


def _complete(partial: Path, history: list[Metrics]) -> None:
    """Add the log and the digests, and give the checkpoint its name."""
    directory, final = partial.parent, partial.with_name(f"{len(history):08d}")
    with open(partial / "history.jsonl", "w") as file:
        file.writelines(json.dumps(metrics) + "\n" for metrics in history)
    (partial / DIGESTS).write_text(json.dumps(_digests(partial)))
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
    found = _last_whole(directory) if distributed.rank() == 0 else None
    num_steps = distributed.summed({"steps": int(found.name) if found else 0})["steps"]
    if num_steps == 0:
        return [], {}
    saved = directory / f"{num_steps:08d}"

    def like(name: str, shape: torch.Size) -> Tensor:
        parameter = parameters[name.split("/", 1)[1]]
        # AdamW's step counter is a number; it stays on the CPU unless it is capturable, and fused
        # keeps it beside its parameter.
        alike = torch.empty_like(parameter, requires_grad=False)
        return alike if shape == parameter.shape else torch.empty(shape, device=parameter.device)

    if distributed.size() == 1 and (saved / "state.safetensors").exists():
        tensors = load_file(saved / "state.safetensors")
    else:
        tensors = distributed.read(saved, like)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(f"policy/{name}"))
    best = {
        name: tensors.pop(f"best/{name}").to("cpu")
        for name in parameters
        if f"best/{name}" in tensors
    }
    for key_and_name, value in tensors.items():
        key, name = key_and_name.split("/", 1)
        parameter = parameters[name]
        optimiser.state[parameter][key] = value.to(parameter.device)
    with open(saved / "history.jsonl") as file:
        return [json.loads(line) for line in file], best


def _last_whole(directory: Path) -> Path | None:
    """The last checkpoint that is what was written; damaged ones after it are removed."""
    saved = sorted(p for p in directory.glob("*") if p.name.isdigit())
    while saved and not _is_whole(saved[-1]):
        damaged = saved.pop()
        warnings.warn(
            f"{damaged}: a damaged checkpoint; going on from "
            f"{saved[-1].name if saved else 'the start'}",
            stacklevel=2,
        )
        shutil.rmtree(damaged)
    return saved[-1] if saved else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether its bytes are those that were written."""
    digests = checkpoint / DIGESTS
    try:
        return json.loads(digests.read_text()) == _digests(checkpoint)
    except (OSError, ValueError):
        return False


def _digests(checkpoint: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(checkpoint.iterdir()):
        if path.name != DIGESTS:
            with open(path, "rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
