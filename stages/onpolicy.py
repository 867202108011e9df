"""Steps of the policy's own samples: what f-DPG, GDC, RLOO and PPO train on.

A step has some training prompts, and K completions of each. They are drawn by rounds of `refresh`
steps, at a round's start and by the policy as it is then, which is their proposal q; with a refresh
of 1 that is the policy itself. Every completion has a seed of its own, made of the run's seed, the
round and its place there. A round is kept on disk until the training has ended, so that a killed
run goes on with the same samples, to the same bits.
"""

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt import estimates
from prefopt.batches import Rollouts, Samples, Scored
from prefopt.checkpoints import Metrics
from prefopt.diversity import distinct_within, self_bleu, words
from prefopt.generation import sample
from prefopt.losses.distributional import leave_one_out, pseudo_rewards
from prefopt.packing import Row, Steps
from prefopt.scoring import score, token_logps
from stages import models
from stages.artefacts import (
    PROMPTS,
    PROMPTS_SCHEMA,
    ROLLOUTS_SCHEMA,
    SFT,
    Column,
    map_table,
    read_table,
    write_table,
)
from stages.evidence import Models
from stages.params import Params
from stages.rewards import Text
from stages.runs import Draws, Run
from stages.targets import Target, Tilt, fitted_target
from stages.training import Course, Cuts


def course(pair: Models, params: Params, run: Run, name: str, directory: Path) -> Course:
    """Steps of samples of the policy, for a target that is fitted first.

    Args:
        pair: the policy, and the reference.
        params: the experiment's.
        run: on samples.
        name: the run's.
        directory: keeps the rounds.

    Raises:
        ValueError: if the target is out of the candidates' reach.
    """
    prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
    target = target_of(run, params, name, prompts)
    rows = sorted(target.log_z)
    optimiser = run.optimiser
    steps = Steps(len(rows), optimiser.batch_size, optimiser.num_epochs, run.seed)
    texts = {row: prompts["text"][row] for row in rows}
    tokens = {row: prompts["tokens"][row] for row in rows}
    rounds = Rounds(pair, params, run, target, steps, rows, texts, tokens, directory)
    return Course(
        steps,
        rows_of=rounds.rows_of,
        share=functools.partial(objective, pair, run, target, rounds),
        where=lambda step: f"rows {[rows[number] for number in steps[step]]} of {PROMPTS}",
    )


def target_of(run: Run, params: Params, name: str, prompts: dict[str, Column]) -> Target:
    """A run's target, fitted.

    Raises:
        ValueError: if the target is out of the candidates' reach.
    """
    assert run.draws is not None
    is_trained_on = run.loss.evidence == "Samples"
    where = f"runs.{name}.target"
    return fitted_target(run.draws.target, params, prompts, where, is_trained_on=is_trained_on)


class Drawn:
    """The samples of one step, in the order of its prompts."""

    def __init__(self, table: dict[str, list[Any]], target: Target) -> None:
        self.texts: list[str] = table["text"]
        self.proposal_logp = torch.tensor(table["proposal_logp"], dtype=torch.float64)
        self.reference_logp = torch.tensor(table["reference_logp"], dtype=torch.float64)
        self.features = torch.tensor(table["features"], dtype=torch.float64)
        log_z = torch.tensor([target.log_z[row] for row in table["prompt"]], dtype=torch.float64)
        self.target_logp = self.reference_logp + target.scores(self.features) - log_z
        self.tokens = torch.tensor(list(map(len, table["tokens"])))


class Rounds:
    """What the policy writes, round by round; the last one is held."""

    def __init__(
        self,
        pair: Models,
        params: Params,
        run: Run,
        target: Target,
        steps: Steps,
        rows: list[int],
        texts: dict[int, str],
        tokens: dict[int, list[int]],
        directory: Path,
    ) -> None:
        assert run.draws is not None
        self.pair, self.params, self.seed, self.target = pair, params, run.seed, target
        self.draws, self.steps, self.rows = run.draws, steps, rows
        self.texts, self.tokens, self.directory = texts, tokens, directory
        self.held: tuple[int, dict[str, list[Any]]] | None = None

    def rows_of(self, step: int, example: int) -> list[Row]:
        """The K completions of a step's prompt."""
        table = self.table(step)
        first = self.steps[step].index(example) * self.draws.num_completions
        prompt = self.tokens[self.rows[example]]
        return [Row(prompt, table["tokens"][first + k]) for k in range(self.draws.num_completions)]

    def of(self, step: int) -> Drawn:
        return Drawn(self.table(step), self.target)

    def table(self, step: int) -> dict[str, list[Any]]:
        """The rows of one step."""
        first = step - step % self.draws.refresh
        if self.held is None or self.held[0] != first:
            path = self.directory / f"{first:08d}.parquet"
            if not path.exists():
                self._draw(first, path)
            self.held = first, read_table(path, ROLLOUTS_SCHEMA)
        table = self.held[1]
        start = table["step"].index(step)
        part = slice(start, start + table["step"].count(step))
        return {column: values[part] for column, values in table.items()}

    def _draw(self, first: int, path: Path) -> None:
        """Whole or not at all; a round that is drawn again is the same again."""
        steps = range(first, min(first + self.draws.refresh, len(self.steps)))
        numbered = [
            (step, self.rows[example])
            for step in steps
            for example in self.steps[step]
            for _ in range(self.draws.num_completions)
        ]
        prompts = [self.tokens[row] for _, row in numbered]
        compute, tokenizer = self.params.compute, models.load_tokenizer(str(SFT))
        completions = sample(
            self.pair.policy,
            prompts,
            [_seed(self.seed, first, number) for number in range(len(numbered))],
            max_new_tokens=self.params.data.max_completion_tokens,
            temperature=1.0,
            eos=models.eos(tokenizer),
            batch_size=self.params.sample.batch_size,
            progress=lambda _: None,
        )
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        rows = list(map(Row, prompts, completions))
        assert self.pair.reference is not None
        proposal_logps, reference_logps = (
            [
                sum(logps)
                for logps in score(
                    model,
                    rows,
                    token_budget=compute.token_budget,
                    compute_dtype=self.pair.compute_dtype,
                    progress=lambda _: None,
                )
            ]
            for model in (self.pair.policy, self.pair.reference)
        )
        read = [Text(self.texts[row], text) for (_, row), text in zip(numbered, texts, strict=True)]
        columns = {
            "step": [step for step, _ in numbered],
            "prompt": [row for _, row in numbered],
            "text": texts,
            "tokens": completions,
            "proposal_logp": proposal_logps,
            "reference_logp": reference_logps,
            "features": self.target.measure(read).tolist(),
        }
        self.directory.mkdir(exist_ok=True)
        partial = self.directory / "partial"
        write_table(partial, columns, ROLLOUTS_SCHEMA)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)


def _seed(*numbers: int) -> int:
    """Of a completion; no other has it, up to chance."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def objective(
    pair: Models, run: Run, target: Target, rounds: Rounds, step: int, cuts: Cuts
) -> Iterator[tuple[Tensor, Metrics]]:
    """Micro-batches of one step's prompts; the last one carries the metrics of the step.

    One process computes all of a step, whose estimates need all of its samples.
    """
    drawn, examples = rounds.of(step), rounds.steps[step]
    assert run.draws is not None
    k = run.draws.num_completions
    places = {example: range(k * i, k * i + k) for i, example in enumerate(examples)}
    baseline = baseline_of(drawn, run, run.draws)
    logp = torch.empty_like(drawn.proposal_logp)
    for number, cut in enumerate(cuts, 1):
        rows = [row for example in cut for row in rounds.rows_of(step, example)]
        logps = token_logps(pair.policy, rows, compute_dtype=pair.compute_dtype)
        sums = torch.stack([values.sum() for values in logps])
        chosen = torch.tensor([place for example in cut for place in places[example]])
        logp[chosen] = sums.detach().double().cpu()
        losses = run.loss.function(
            _batch(run, drawn, baseline, chosen, sums), **run.hyperparameters
        )
        metrics = _metrics(drawn, logp, target, run) if number == len(cuts) else Metrics()
        if step == 0 and metrics:
            metrics |= target.report
        yield losses.sum() / len(logp), metrics


def baseline_of(drawn: Drawn, run: Run, draws: Draws) -> Tensor:
    """What is subtracted from each sample's reward; no sample has a say in its own."""
    u = drawn.proposal_logp - drawn.reference_logp
    if run.loss.evidence == "Rollouts":
        rewards = drawn.features[:, 0] - run.hyperparameters["beta"] * u
    else:
        divergence, floor = (run.hyperparameters[key] for key in ("divergence", "floor"))
        rewards = pseudo_rewards(drawn.proposal_logp - drawn.target_logp, divergence, floor)
    match draws.baseline:
        case "leave_one_out":
            return leave_one_out(rewards.reshape(-1, draws.num_completions)).flatten()
        case "step":
            return leave_one_out(rewards[None])[0]
        case "none":
            return torch.zeros_like(rewards)


def _batch(
    run: Run, drawn: Drawn, baseline: Tensor, chosen: Tensor, logp: Tensor
) -> Samples | Rollouts:
    def part(values: Tensor) -> Tensor:
        return values[chosen].to(logp)

    if run.loss.evidence == "Samples":
        others = (drawn.proposal_logp, drawn.target_logp, baseline)
        return Samples(logp, *map(part, others))
    tokens = drawn.tokens[chosen].to(logp.device)
    return Rollouts(
        Scored(logp, part(drawn.reference_logp), tokens),
        proposal_logp=part(drawn.proposal_logp),
        rewards=part(drawn.features[:, 0]),
        baseline=part(baseline),
    )


def _metrics(drawn: Drawn, logp: Tensor, target: Target, run: Run) -> Metrics:
    """Of the policy before the step, by all of the step's samples."""
    seen = estimates.Drawn(
        logp,
        drawn.proposal_logp,
        drawn.reference_logp,
        drawn.target_logp,
        torch.full_like(logp, 1 / len(logp)),
    )
    means = (seen.policy_weights @ drawn.features).tolist()
    assert run.draws is not None
    if isinstance(run.draws.target, Tilt):
        metrics = Metrics({"samples/reward": means[0]})
    else:
        metrics = {f"moments/{name}": x for name, x in zip(target.names, means, strict=True)}
    metrics |= {f"samples/{name}": x for name, x in estimates.of_policy(seen).items()}
    metrics["samples/length"] = drawn.tokens.double().mean().item()
    texts = [words(text) for text in drawn.texts]
    metrics |= {f"samples/distinct_{n}": distinct_within(texts, n) for n in (1, 2, 3)}
    metrics["samples/self_bleu"] = self_bleu(texts)
    distances = estimates.to_target(seen)
    metrics["samples/ess_share"] = distances.pop("ess_share", 0.0)
    return metrics | {f"target/{name}": x for name, x in distances.items()}
