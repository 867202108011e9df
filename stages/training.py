"""What SFT and every run share: the loop, with its curve, checkpoints and the model it leaves."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prefopt import distributed
from prefopt.checkpoints import Checkpoints, Metrics
from prefopt.costs import matmul_peak, necessary, price_of, useful_tokens
from prefopt.loop import Objective, Optimisation, Watch, fit
from prefopt.packing import Row, Steps, slots_of
from prefopt.scoring import batches
from stages import models
from stages.artefacts import Workspace, is_first
from stages.params import Descent, Optimiser
from stages.tracking import Curve, Journal

Cuts = list[list[int]]

# Of a step, these micro-batches: (loss, metrics), shares of the step's.
Share = Callable[[int, Cuts], Iterable[tuple[Tensor, Metrics]]]


def train(
    policy: models.PreTrainedModel,
    objective: Share,
    steps: Steps,
    optimiser: Optimiser,
    workspace: Workspace,
    *,
    rows_of: Callable[[int], Sequence[Row]],
    token_budget: int,
    couples: bool = False,
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
        objective: losses and metrics of the micro-batches of a step that this process computes.
        steps: examples of each.
        optimiser: its section, by which the policy was made trainable.
        workspace: the stage's.
        rows_of: an example's rows.
        token_budget: of a micro-batch.
        couples: whether examples of a micro-batch change each other's loss.
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
    """
    checkpoints = Checkpoints(workspace.checkpoints, checkpoint_every)
    clock = Clock(
        policy, lambda step: [row for i in steps[step] for row in rows_of(i)], compute_dtype
    )
    root = distributed.sharded(policy, models.decoder_layers(policy), models.device())

    def micro_batches(step: int) -> Iterator[tuple[Tensor, Metrics]]:
        dealt = _dealt(policy, steps[step], rows_of, token_budget, couples)
        mine = dealt[distributed.rank()]
        # All processes gather shards as often. Who has less to do computes a micro-batch of the
        # step once more, and counts it as nothing.
        spare = [dealt[0][0]] * (max(map(len, dealt)) - len(mine))
        found = iter(objective(step, mine + spare))
        for number in range(len(mine) + len(spare)):
            loss, metrics = root(lambda: next(found))
            yield (loss, metrics) if number < len(mine) else (0 * loss, dict.fromkeys(metrics, 0))

    with Curve(workspace.partial(curve), workspace.name, len(steps), journal) as drawn:
        history = fit(
            policy,
            clock.timed(micro_batches),
            len(steps),
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


def _together(watch: Watch, root: distributed.Sharded) -> Watch:
    """Looks at all of the policy, which every process takes; the first one's metrics count."""

    def look(step: int) -> Metrics:
        with root.unsharded():
            return distributed.of_first(watch.look(step))

    return replace(watch, look=look)


def _dealt(
    policy: models.PreTrainedModel,
    examples: list[int],
    rows_of: Callable[[int], Sequence[Row]],
    token_budget: int,
    couples: bool,
) -> list[Cuts]:
    """The micro-batches of a step, a list for each process; they compute about as many tokens.

    Examples that change each other's loss stay in the micro-batches that one process would make.
    """

    def cut(examples: list[int]) -> Cuts:
        return batches(policy, examples, rows_of, token_budget)

    parts = cut(examples) if couples else [[example] for example in examples]
    costs = [slots_of(row for example in part for row in rows_of(example)) for part in parts]
    shares = [
        [parts[number] for number in share]
        for share in distributed.shares(costs, distributed.size())
    ]
    return shares if couples else [cut([i for (i,) in share]) for share in shares]


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
