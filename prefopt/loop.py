"""The training loop: one `fit` for pretraining, SFT and every preference objective.

An objective is asked for one optimiser step at a time and yields that step's micro-batches, each
already divided by the step's own normaliser. Losses, metrics and gradients therefore add up, and
no result depends on how a step is cut. Data order is a function of the step number alone, so a
checkpoint is weights, optimiser moments, the step and the log: a killed run resumes to the same
bits. A watch looks up between steps; what it decides follows from the log alone.
"""

import math
import signal
import threading
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prefopt import distributed
from prefopt.checkpoints import Checkpoints, Metrics, restore, save

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


@dataclass(frozen=True)
class Selection:
    """Which of the policies that were looked at a training leaves, by what the looks said.

    A resumed training decides as an unbroken one does, because both read the same log.

    Args:
        worth: the policy of highest worth is left, of equals the earliest.
        ends: whether the training ends with this look; its policy is not left then.
    """

    worth: Callable[[Metrics], float]
    ends: Callable[[Metrics], bool]


@dataclass(frozen=True)
class Watch:
    """Looking up from a training between its steps.

    Args:
        look: metrics of the policy as it is after a step, under names that no step uses; it leaves
            parameters, gradients and torch's random numbers as they are.
        steps: those after which it looks.
        selection: among the policies looked at; without one the last policy is left.
    """

    look: Callable[[int], Metrics]
    steps: Collection[int]
    selection: Selection | None = None

    def ended(self, history: list[Metrics]) -> bool:
        """Whether the last step's look ended the training."""
        return self.selection is not None and any(
            map(self.selection.ends, self.looks(history[-1:]))
        )

    def best(self, history: list[Metrics]) -> Metrics | None:
        """The metrics of the step whose policy is left; None if the first look ended it all."""
        if self.selection is None:
            return history[-1]
        within = [look for look in self.looks(history) if not self.selection.ends(look)]
        return max(within, key=self.selection.worth, default=None)

    def looks(self, history: list[Metrics]) -> list[Metrics]:
        """The metrics of the steps that were looked at."""
        return [metrics for metrics in history if metrics["step"] in self.steps]


class Diverged(FloatingPointError):
    """A step whose loss or gradient is not finite; the policy is as it was before."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class Terminated(SystemExit):
    """SIGTERM came; the state of the last whole step is saved."""


def fit(
    policy: nn.Module,
    objective: Objective,
    num_steps: int,
    optimisation: Optimisation,
    *,
    log: Callable[[Metrics], None],
    checkpoints: Checkpoints | None = None,
    watch: Watch | None = None,
) -> list[Metrics]:
    """Train `policy` in place for `num_steps` optimiser steps, or until a look ends it.

    Args:
        policy: parameters with `requires_grad` are trained; put it into eval mode first, because
            dropout would make the policy differ from its reference at step 0.
        objective: `objective(step)` yields (loss, metrics) per micro-batch; they sum to the step's.
        num_steps: optimiser steps.
        optimisation: optimiser and schedule.
        log: receives one dict a step, from step 0 on, also for steps replayed from a checkpoint.
        checkpoints: if given, resume from there and write there.
        watch: if given, looks up. What a look says is merged into its step's metrics, and with a
            selection `kept`: 1 if its policy is the best so far, else 0.

    Returns:
        The metrics of all steps. `policy` is as it was after the last of them, or after the one
        that `watch.best` names.

    Raises:
        Diverged: if a step's loss or gradient norm is not finite; the state before it is saved.
        Terminated: on SIGTERM, after the step under way, if there are checkpoints.
    """
    parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    optimiser = _adamw(parameters, optimisation)
    history: list[Metrics] = []
    best: dict[str, Tensor] = {}
    if checkpoints is not None:
        history, best = restore(checkpoints.directory, parameters, optimiser)
    for metrics in history:
        log(metrics)

    def keep() -> None:
        if checkpoints is not None:
            save(checkpoints.directory, parameters, optimiser, history, best)

    with _sigterm_noted(checkpoints is not None) as came:
        for step in range(len(history), num_steps):
            if watch is not None and watch.ended(history):
                break
            try:
                metrics = _step(step, num_steps, parameters, objective, optimisation, optimiser)
            except Diverged:
                keep()
                raise
            history.append(metrics)
            if watch is not None and step in watch.steps:
                metrics |= watch.look(step)
                if watch.selection is not None:
                    metrics["kept"] = int(watch.best(history) is metrics)
                    if metrics["kept"]:
                        best = {n: p.detach().to("cpu", copy=True) for n, p in parameters.items()}
            log(metrics)
            if checkpoints is not None and len(history) % checkpoints.every == 0:
                keep()
            if distributed.anyone(came.is_set()):
                keep()
                raise Terminated(128 + signal.SIGTERM)
    with torch.no_grad():
        for name, weights in best.items():
            parameters[name].copy_(weights)
    return history


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
    metrics = distributed.summed(metrics)
    norms = nn.utils.clip_grad_norm_(parameters.values(), optimisation.max_grad_norm)
    norm = distributed.whole(norms).item()
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
