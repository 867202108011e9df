"""What SFT and every run share: the loop, with its curve, checkpoints and the model it leaves."""

import functools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from prefopt import distributed
from prefopt.checkpoints import Checkpoints, Metrics
from prefopt.costs import matmul_peak, necessary, price_of, useful_tokens
from prefopt.loop import Diverged, Objective, Optimisation, Watch, fit
from prefopt.packing import Row, Steps, slots_of
from prefopt.scoring import batches
from stages import models
from stages.artefacts import Workspace, is_first
from stages.params import Descent, Optimiser
from stages.tracking import Curve, Journal

Cuts = list[list[int]]


@dataclass(frozen=True)
class Course:
    """What a training trains on, step by step.

    Args:
        steps: numbers of each step's examples.
        rows_of: the rows of an example, in a step.
        share: losses and metrics of those micro-batches of a step that this process computes,
            shares of the step's.
        where: the rows of a table that a step is of, for errors.
        validation: the same of validation examples, after a step; nothing if there are none.
        couples: whether examples of a micro-batch change each other's loss.
    """

    steps: Steps
    rows_of: Callable[[int, int], Sequence[Row]]
    share: Callable[[int, Cuts], Iterable[tuple[Tensor, Metrics]]]
    where: Callable[[int], str]
    validation: Objective = lambda _: ()
    couples: bool = False

    def rows(self, step: int) -> list[Row]:
        """All rows of a step."""
        return [row for example in self.steps[step] for row in self.rows_of(step, example)]


def train(
    policy: models.PreTrainedModel,
    course: Course,
    optimiser: Optimiser,
    workspace: Workspace,
    *,
    token_budget: int,
    model: Path,
    source: str,
    curve: Path,
    checkpoint_every: int,
    compute_dtype: torch.dtype,
    adapted: Path | None = None,
    journal: Journal | None = None,
    watch: Watch | None = None,
) -> tuple[models.PreTrainedModel, list[Metrics]]:
    """Fit the policy and write its model directory and its curve into the workspace.

    Args:
        policy: trained in place; of several processes, sharded in place.
        course: the examples and their objective.
        optimiser: its section, by which the policy was made trainable.
        workspace: the stage's.
        token_budget: of a micro-batch.
        model: the model directory.
        source: the name of the model that the policy was loaded from.
        curve: the file of metrics.
        checkpoint_every: optimiser steps.
        compute_dtype: of matrix products.
        adapted: the directory that adapters refer to, if they are to be written alone.
        journal: of tracking, if it is tracked.
        watch: looks up between steps; every process takes each look.

    Returns:
        The trained policy, whole in every process, and the metrics of all steps.

    Raises:
        ValueError: if a step diverged, naming its rows.
    """
    checkpoints = Checkpoints(workspace.checkpoints, checkpoint_every)
    clock = Clock(policy, course.rows, compute_dtype)
    root = distributed.sharded(policy, models.decoder_layers(policy), models.device())

    def micro_batches(step: int) -> Iterator[tuple[Tensor, Metrics]]:
        dealt = _dealt(policy, course, step, token_budget)
        mine = dealt[distributed.rank()]
        # All processes gather shards as often. Who has less to do computes a micro-batch of the
        # step once more, and counts it as nothing.
        spare = [dealt[0][0]] * (max(map(len, dealt)) - len(mine))
        found = iter(course.share(step, mine + spare))
        for number in range(len(mine) + len(spare)):
            loss, metrics = root(lambda: next(found))
            yield (loss, metrics) if number < len(mine) else (0 * loss, dict.fromkeys(metrics, 0))

    with (
        naming_the_rows_of(course),
        Curve(workspace.partial(curve), workspace.name, len(course.steps), journal) as drawn,
    ):
        history = fit(
            policy,
            clock.timed(micro_batches),
            len(course.steps),
            optimisation(optimiser),
            log=lambda metrics: drawn.log(metrics, clock.rates(int(metrics["step"]))),
            checkpoints=checkpoints,
            watch=None if watch is None else _together(watch, root),
        )
    if distributed.size() > 1:
        policy, trained = models.load_policy(source), policy
        models.make_trainable(policy, optimiser, seed=0)
        distributed.gather(trained, into=policy)
    if is_first():
        tokenizer = models.load_tokenizer(source)
        models.save(policy, tokenizer, workspace.partial(model), adapted=adapted)
    return policy, history


@contextmanager
def naming_the_rows_of(course: Course) -> Generator[None, None, None]:
    """Tell of a step that diverged which rows it was of."""
    try:
        yield
    except Diverged as error:
        raise ValueError(f"{error}; it was of {course.where(error.step)}") from error


def _together(watch: Watch, root: distributed.Sharded) -> Watch:
    """Looks at all of the policy, which every process takes; the first one's metrics count."""

    def look(step: int) -> Metrics:
        with root.unsharded():
            return distributed.of_first(watch.look(step))

    return replace(watch, look=look)


def _dealt(
    policy: models.PreTrainedModel, course: Course, step: int, token_budget: int
) -> list[Cuts]:
    """The micro-batches of a step, a list for each process; they compute about as many tokens.

    Examples that change each other's loss stay in the micro-batches that one process would make.
    """
    rows_of = functools.partial(course.rows_of, step)

    def cut(examples: Sequence[int]) -> Cuts:
        return batches(policy, examples, rows_of, token_budget)

    examples = course.steps[step]
    parts = cut(examples) if course.couples else [[example] for example in examples]
    costs = [slots_of(row for example in part for row in rows_of(example)) for part in parts]
    shares = [
        [parts[number] for number in share]
        for share in distributed.shares(costs, distributed.size())
    ]
    return shares if course.couples else [cut([i for (i,) in share]) for share in shares]


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
        self._peak = distributed.size() * matmul_peak(models.device(), compute_dtype)
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


def optimisation(optimiser: Descent) -> Optimisation:
    """What the loop reads of a section; epochs, batches and layers are the stage's business."""
    return Optimisation(
        learning_rate=optimiser.learning_rate,
        schedule=optimiser.schedule,
        warmup=optimiser.warmup,
        weight_decay=optimiser.weight_decay,
        max_grad_norm=optimiser.max_grad_norm,
    )
