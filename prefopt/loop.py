"""The training loop: one `fit` for pretraining, SFT and every preference objective.

An objective is asked for one optimiser step at a time and yields that step's micro-batches, each
already divided by the step's own normaliser. Losses, metrics and gradients therefore add up, and
no result depends on how a step is cut. Data order is a function of the step number alone, so a
checkpoint is weights, optimiser moments, the step and the log: a killed run resumes to the same
bits.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Metrics = dict[str, int | float]  # int: the step
Objective = Callable[[int], Iterable[tuple[Tensor, Metrics]]]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Optimisation:
    """How a policy moves: AdamW, its schedule and its clipping.

    Args:
        learning_rate: the peak, reached after `warmup` of all steps.
        schedule: what follows the warm-up: `constant`, or `linear` or `cosine` to zero.
        warmup: share of all steps, in [0, 1).
        weight_decay: decoupled, on matrices only (never on norms and biases).
        max_grad_norm: gradients are scaled down to this global norm.
        beta2: AdamW's second-moment decay.
    """

    learning_rate: float
    schedule: Schedule = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    beta2: float = 0.999


class Diverged(FloatingPointError):
    """A step whose loss or gradient is not finite; the policy is as it was before."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class Terminated(SystemExit):
    """SIGTERM came; the state of the last whole step is saved."""


@dataclass(frozen=True)
class Checkpoints:
    """Where a run keeps what it needs to resume, and how often it writes it.

    The last two are kept; one that is not what was written is passed over, with a warning.
    """

    directory: Path
    every: int


def fit(
    policy: nn.Module,
    objective: Objective,
    num_steps: int,
    optimisation: Optimisation,
    *,
    log: Callable[[Metrics], None],
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train `policy` in place for `num_steps` optimiser steps.

    Args:
        policy: parameters with `requires_grad` are trained; put it into eval mode first, because
            dropout would make the policy differ from its reference at step 0.
        objective: `objective(step)` yields (loss, metrics) per micro-batch; they sum to the step's.
        num_steps: optimiser steps.
        optimisation: optimiser and schedule.
        log: receives one dict a step, from step 0 on, also for steps replayed from a checkpoint.
        checkpoints: if given, resume from there and write there.

    Raises:
        Diverged: if a step's loss or gradient norm is not finite; the state before it is saved.
        Terminated: on SIGTERM, after the step under way, if there are checkpoints.
    """
    parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    optimiser = _adamw(parameters, optimisation)
    history: list[Metrics] = []
    if checkpoints is not None:
        history = _restore(checkpoints.directory, parameters, optimiser)
    for metrics in history:
        log(metrics)

    def save() -> None:
        if checkpoints is not None:
            _save(checkpoints.directory, parameters, optimiser, history)

    with _sigterm_noted(checkpoints is not None) as came:
        for step in range(len(history), num_steps):
            try:
                metrics = _step(step, num_steps, parameters, objective, optimisation, optimiser)
            except Diverged:
                save()
                raise
            history.append(metrics)
            log(metrics)
            if checkpoints is not None and len(history) % checkpoints.every == 0:
                save()
            if came.is_set():
                save()
                raise Terminated(128 + signal.SIGTERM)


def _step(
    step: int,
    num_steps: int,
    parameters: dict[str, nn.Parameter],
    objective: Objective,
    optimisation: Optimisation,
    optimiser: torch.optim.AdamW,
) -> Metrics:
    """One optimiser step, and what there is to tell of it."""
    learning_rate = optimisation.learning_rate * decay(step, num_steps, optimisation)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    metrics: Metrics = {}
    for loss, parts in objective(step):
        loss.backward()
        for name, value in {"loss": loss.item(), **parts}.items():
            metrics[name] = metrics.get(name, 0.0) + value
    norm = nn.utils.clip_grad_norm_(parameters.values(), optimisation.max_grad_norm).item()
    if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
        raise Diverged(
            step,
            f"step {step}: loss {metrics['loss']}, gradient norm {norm}; "
            "lower the learning rate, or look for a log-ratio that has run away",
        )
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return {"step": step, **metrics, "grad_norm": norm, "learning_rate": learning_rate}


@contextmanager
def _sigterm_noted(wanted: bool) -> Generator[threading.Event, None, None]:
    """Until the end, SIGTERM sets the event and does nothing else."""
    came = threading.Event()
    # Signals are the main thread's alone.
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def decay(step: int, num_steps: int, optimisation: Optimisation) -> float:
    """The learning rate at `step` as a share of its peak."""
    warmup_steps = math.ceil(optimisation.warmup * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    match optimisation.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))


def _adamw(parameters: dict[str, nn.Parameter], optimisation: Optimisation) -> torch.optim.AdamW:
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": optimisation.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=optimisation.learning_rate, betas=(0.9, optimisation.beta2), fused=True
    )


def _save(
    directory: Path,
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.AdamW,
    history: list[Metrics],
) -> None:
    tensors: dict[str, Tensor] = {}
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


def _restore(
    directory: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.AdamW
) -> list[Metrics]:
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
        return []
    tensors = load_file(saved[-1] / "state.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(f"policy/{name}"))
    for key_and_name, value in tensors.items():
        key, name = key_and_name.split("/", 1)
        parameter = parameters[name]
        # AdamW's step counter stays on the CPU unless it is capturable; fused keeps it beside.
        optimiser.state[parameter][key] = value.to(parameter.device)
    with open(saved[-1] / "history.jsonl") as file:
        return [json.loads(line) for line in file]


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
