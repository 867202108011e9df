"""Looks at a run while it trains: its loss on validation pairs, and what it writes by itself.

A look reads the policy as it is after an optimiser step. Its metrics, `validation/*`, stand in that
step's row of the curve. Every look samples the same validation prompts with the same random
numbers, so that two looks differ by their policies alone.

`validation/kl` is KL(policy || reference) in nats a sequence, at temperature 1: along each sampled
completion the exact KL between the next token's two distributions, summed; then the mean over
completions. It is unbiased, never negative, and varies no more than the samples' mean log-ratio
does: Amini, Vieira and Cotterell 2025 (arXiv:2504.10637).
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.checkpoints import Metrics
from prefopt.generation import sample
from prefopt.loop import Selection, Watch
from prefopt.packing import Row
from prefopt.scoring import batches, token_logps, token_logps_and_kls
from stages import models
from stages.artefacts import (
    GENERATIONS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    SFT,
    is_first,
    map_table,
    read_table,
    rows_of_split,
    write_table,
)
from stages.evidence import Models
from stages.params import Params, Watching

Table = dict[str, list[Any]]


@dataclass(frozen=True)
class Author:
    """Has a policy complete the first validation prompts, always by the same random numbers.

    Args:
        pair: the policy, and the reference that it is compared with.
        params: the experiment's.
        prompts: token ids by row of `prompts`.
    """

    pair: Models
    params: Params
    prompts: dict[int, list[int]]

    def write(self, step: int) -> Table:
        """The rows of `generations` of one look."""
        prompts = list(self.prompts.values())
        # The evaluation draws from streams 1 and 2.
        stream = (self.params.compute.seed * 1_000_003 + 3) * 1_000_003
        seeds = [stream + number for number in self.prompts]
        tokenizer = models.load_tokenizer(str(SFT))
        tokens = sample(
            self.pair.policy,
            prompts,
            seeds,
            max_new_tokens=self.params.data.max_completion_tokens,
            temperature=1.0,
            eos=models.eos(tokenizer),
            batch_size=self.params.sample.batch_size,
            progress=lambda _: None,
        )
        return {
            "step": [step] * len(prompts),
            "prompt": list(self.prompts),
            "seed": seeds,
            "text": tokenizer.batch_decode(tokens, skip_special_tokens=True),
            "tokens": tokens,
            **self.scored(list(map(Row, prompts, tokens))),
        }

    @torch.no_grad()
    def scored(self, rows: list[Row]) -> Table:
        """Log-probabilities under policy and reference, and the KL along each completion."""
        assert self.pair.reference is not None
        policy, dtype = self.pair.policy, self.pair.compute_dtype
        budget = self.params.compute.token_budget
        table: Table = {name: [0.0] * len(rows) for name in ("logp", "reference_logp", "kl")}
        for cut in batches(policy, range(len(rows)), lambda i: [rows[i]], budget):
            batch = [rows[i] for i in cut]
            logps = token_logps(policy, batch, compute_dtype=dtype)
            # The KL that it gives is from its second model to its first.
            reference_logps, kls = token_logps_and_kls(
                self.pair.reference, policy, batch, compute_dtype=dtype
            )
            for column, found in zip(table.values(), (logps, reference_logps, kls), strict=True):
                for i, values in zip(cut, found, strict=True):
                    column[i] = values.sum().item()
        return table


def author(pair: Models, params: Params, settings: Watching) -> Author | None:
    """Who completes the first `num_generations` prompts of the validation split, if there are any.

    Raises:
        ValueError: if the KL has a budget and there are none.
    """
    if not settings.writes:
        return None
    table = map_table(PROMPTS, PROMPTS_SCHEMA)
    rows = rows_of_split(table, "validation")[: settings.num_generations]
    if rows:
        return Author(pair, params, {row: table["tokens"][row] for row in rows})
    if settings.max_kl is not None:
        raise ValueError(
            f"watch.max_kl: needs completions of validation prompts, got none in {PROMPTS}; set "
            "data.num_validation, or max_kl to null"
        )
    return None


@dataclass(frozen=True)
class Look:
    """What is looked at.

    Args:
        objective: the validation pairs' losses and metrics after a step, by micro-batches; nothing
            if there are no such pairs.
        author: writes completions, if any are wanted.
        directory: keeps a table of completions for each look, until the training has ended.
    """

    objective: Callable[[int], Iterable[tuple[Tensor, Metrics]]]
    author: Author | None
    directory: Path

    def __call__(self, step: int) -> Metrics:
        """Metrics of the policy as it is after `step`.

        Raises:
            ValueError: if one of them is not finite.
        """
        metrics = total(self.objective(step))
        if self.author is not None:
            table = self.author.write(step)
            self._keep(step, table)
            metrics["kl"] = sum(table["kl"]) / len(table["kl"])
            metrics["length"] = sum(map(len, table["tokens"])) / len(table["tokens"])
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"look after step {step}: validation/{name} is not finite, got {value}; "
                    "lower the learning rate"
                )
        return {f"validation/{name}": value for name, value in metrics.items()}

    def generations(self, looks: list[Metrics]) -> Table:
        """All that was written at these looks."""
        looks = looks if self.author is not None else []
        tables = [read_table(self._path(int(m["step"])), GENERATIONS_SCHEMA) for m in looks]
        return {
            column: [value for table in tables for value in table[column]]
            for column in GENERATIONS_SCHEMA.names
        }

    def _keep(self, step: int, table: Table) -> None:
        """Whole or not at all; a look that is taken again writes the same again."""
        if not is_first():
            return
        self.directory.mkdir(exist_ok=True)
        partial = self.directory / "partial"
        write_table(partial, table, GENERATIONS_SCHEMA)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(self._path(step))

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:08d}.parquet"


@torch.no_grad()
def total(micro_batches: Iterable[tuple[Tensor, Metrics]]) -> Metrics:
    """The sum of a step's losses and metrics, which is their mean over its pairs."""
    metrics: Metrics = {}
    for loss, parts in micro_batches:
        for name, value in {"loss": loss.item(), **parts}.items():
            metrics[name] = metrics.get(name, 0.0) + value
    return metrics


def watch(look: Look, settings: Watching, num_steps: int) -> Watch:
    """Looks after every `settings.every` steps and after the last one."""
    if settings.every is None:
        return Watch(look, steps=())
    steps = {*range(settings.every - 1, num_steps, settings.every), num_steps - 1}
    return Watch(look, steps, selection(settings))


def selection(settings: Watching) -> Selection | None:
    """By `select`, among looks before the first whose KL exceeds `max_kl`: that ends the run."""
    if settings.select == "last" and settings.max_kl is None:
        return None
    budget = math.inf if settings.max_kl is None else settings.max_kl

    def worth(metrics: Metrics) -> float:
        if settings.select == "last":
            return metrics["step"]
        # Of all metrics that one may select by, the loss alone is better when it is lower.
        return metrics[settings.select] * (-1 if settings.select == "validation/loss" else 1)

    return Selection(worth, ends=lambda metrics: metrics.get("validation/kl", 0.0) > budget)


def account(watch: Watch, history: list[Metrics], settings: Watching, run: str) -> str:
    """In words, whether the run ended before its time and which policy it leaves.

    Raises:
        ValueError: if it leaves none, because the first look ended it.
    """
    best, last = watch.best(history), history[-1]
    if best is None:
        raise ValueError(
            f"runs.{run}: the first look exceeds max_kl {settings.max_kl}, got a KL of "
            f"{last['validation/kl']:.4g} nats after step {last['step']}; look more often "
            "(watch.every), lower the learning rate, or allow more"
        )
    words = f"the policy after step {best['step']} is kept"
    if settings.select != "last":
        words += f", by {settings.select} {best[settings.select]:.4g}"
    if watch.ended(history):
        words = (
            f"ended after step {last['step']}, because its KL of {last['validation/kl']:.4g} nats "
            f"exceeds watch.max_kl {settings.max_kl}; {words}"
        )
    return words
