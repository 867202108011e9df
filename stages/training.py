"""What SFT and every run share: the loop, with its curve, checkpoints and the model it leaves."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prefopt.checkpoints import Checkpoints, Metrics
from prefopt.costs import matmul_peak, necessary, price_of, useful_tokens
from prefopt.loop import Objective, Optimisation, Watch, fit
from prefopt.packing import Row
from stages import models
from stages.artefacts import Workspace
from stages.params import Optimiser
from stages.tracking import Curve, Journal


def train(
    policy: models.PreTrainedModel,
    objective: Objective,
    num_steps: int,
    optimiser: Optimiser,
    workspace: Workspace,
    *,
    model: Path,
    tokenizer: str,
    curve: Path,
    checkpoint_every: int,
    rows_of: Callable[[int], Sequence[Row]],
    compute_dtype: torch.dtype,
    adapted: Path | None = None,
    journal: Journal | None = None,
    watch: Watch | None = None,
) -> list[Metrics]:
    """Fit the policy and write its model directory and its curve into the workspace.

    Returns:
        The metrics of all steps.
    """
    checkpoints = Checkpoints(workspace.checkpoints, checkpoint_every)
    clock = Clock(policy, rows_of, compute_dtype)
    with Curve(workspace.partial(curve), workspace.name, num_steps, journal) as drawn:
        history = fit(
            policy,
            clock.timed(objective),
            num_steps,
            optimisation(optimiser),
            log=lambda metrics: drawn.log(metrics, clock.rates(int(metrics["step"]))),
            checkpoints=checkpoints,
            watch=watch,
        )
    models.save(policy, models.load_tokenizer(tokenizer), workspace.partial(model), adapted=adapted)
    return history


class Clock:
    """What a step's rows are worth, against the time that it takes.

    Args:
        policy: as it trains.
        rows_of: a step's rows.
        compute_dtype: of its matrix products.
    """

    def __init__(
        self,
        policy: models.PreTrainedModel,
        rows_of: Callable[[int], Sequence[Row]],
        compute_dtype: torch.dtype,
    ) -> None:
        self._rows_of = rows_of
        self._price = price_of(policy)
        self._peak = matmul_peak(models.device(), compute_dtype)
        self._started: dict[int, float] = {}

    def timed(self, objective: Objective) -> Objective:
        """The objective; the clock runs from when it is asked for a step."""

        def started(step: int) -> Iterable[tuple[Tensor, Metrics]]:
            self._started = {step: time.perf_counter()}
            return objective(step)

        return started

    def rates(self, step: int) -> dict[str, float] | None:
        """Of a step that has just ended; None if it was replayed from a checkpoint.

        Model FLOP utilisation credits what the rows need of the policy: a prompt once, no padding,
        no activation computed twice, no reference.
        """
        if step not in self._started:
            return None
        seconds = time.perf_counter() - self._started[step]
        rows = self._rows_of(step)
        return {
            "tokens_per_second": useful_tokens(rows) / seconds,
            "mfu": self._price.of(necessary(rows)) / seconds / self._peak,
        }


def optimisation(optimiser: Optimiser) -> Optimisation:
    """What the loop reads of a section; epochs, batches and layers are the stage's business."""
    return Optimisation(
        learning_rate=optimiser.learning_rate,
        schedule=optimiser.schedule,
        warmup=optimiser.warmup,
        weight_decay=optimiser.weight_decay,
        max_grad_norm=optimiser.max_grad_norm,
    )
