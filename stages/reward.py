"""Train a reward model on pairs: `python -m stages.reward NAME`.

A sequence classifier learns the pairs' preferences (Bradley-Terry), and is measured on the pairs of
openings that it never saw: accuracy, calibration, and what length says. A share of the openings is
held out, and so are the pipeline's validation prompts.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from prefopt.checkpoints import Checkpoints, Metrics
from prefopt.loop import Objective, fit
from prefopt.packing import Steps, micro_batches
from prefopt.rewarding import bradley_terry, rewards
from prefopt.statistics.calibration import calibration
from prefopt.statistics.intervals import win_rate
from stages import models
from stages.artefacts import (
    CANDIDATES,
    COMPLETIONS,
    PAIRS,
    PROMPTS,
    SFT,
    digest,
    program,
    reliability_of,
    reward_curve_of,
    reward_metrics_of,
    reward_of,
    stage,
)
from stages.pairs import TextPair, pairs_of
from stages.params import Params, RewardTraining, load_params
from stages.reward_models import Reader, predicted
from stages.rewards import Text, load_reward
from stages.tracking import Curve, track
from stages.training import optimisation


@dataclass(frozen=True)
class Read:
    """Pairs as the model reads them.

    Args:
        pairs: their texts.
        tokens: of both sides, chosen then rejected.
        margins: by how much each chosen should lead.
        num_cut: texts that lost their beginning.
    """

    pairs: list[TextPair]
    tokens: list[tuple[list[int], list[int]]]
    margins: list[float]
    num_cut: int

    @property
    def preferences(self) -> list[float]:
        return [pair.preference for pair in self.pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    name = parser.parse_args().name
    params = load_params()
    training, compute = params.reward_model(name), params.compute
    seed = compute.seed if training.seed is None else training.seed
    models.set_up(seed=seed, num_threads=compute.num_threads)
    source = str(SFT) if training.base == "sft" else training.base
    inputs = [path for path in (Path(source), Path(training.pairs)) if path.exists()]
    if Path(training.pairs) == PAIRS:
        inputs += [PROMPTS, CANDIDATES, COMPLETIONS]
    relevant = {
        "training": training.model_dump(),
        "compute": compute.model_dump(exclude={"num_processes"}),
        "rewards": params.rewards,
        "label": params.label.model_dump(),
    }
    with (
        track(
            f"reward_{name}",
            recipe=params.recipe,
            params={**training.model_dump(), **compute.model_dump()},
            datasets={Path(training.pairs).stem: digest(Path(training.pairs))},
        ) as journal,
        stage(
            f"reward@{name}",
            inputs=inputs,
            outputs=[
                reward_of(name),
                reward_curve_of(name),
                reward_metrics_of(name),
                reliability_of(name),
            ],
            params=relevant,
        ) as workspace,
    ):
        reader = Reader(source, limit=training.max_tokens)
        trained, held_out = parted(name, params, training, reader)
        model = models.new_classifier(source, training.top_layers)
        steps = Steps(len(trained.pairs), training.batch_size, training.num_epochs, seed)
        clock = Clock(trained, steps)
        with Curve(
            workspace.partial(reward_curve_of(name)), workspace.name, len(steps), journal
        ) as drawn:
            fit(
                model,
                clock.timed(lambda step: objective(model, trained, steps[step], params)),
                len(steps),
                optimisation(training),
                log=lambda metrics: drawn.log(metrics, clock.rates(int(metrics["step"]))),
                checkpoints=Checkpoints(workspace.checkpoints, compute.checkpoint_every),
            )
        metrics, reliability = measured(model, trained, held_out)
        journal.write({"step": len(steps) - 1, "metrics": headline(metrics)})
        reader.save_with(model, workspace.partial(reward_of(name)))
        text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
        workspace.partial(reward_metrics_of(name)).write_text(text)
        with open(workspace.partial(reliability_of(name)), "w", newline="") as file:
            writer = csv.DictWriter(file, list(reliability[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(reliability)


def parted(
    name: str, params: Params, training: RewardTraining, reader: Reader
) -> tuple[Read, Read]:
    """The pairs to train on, and those that are held out.

    Raises:
        ValueError: if there are too few of either.
    """
    found = list(pairs_of(training.pairs))
    held = [pair.split != "train" or pair.is_held_out(training.held_out) for pair in found]
    trained = [pair for pair, out in zip(found, held, strict=True) if not out]
    # What a training pair begins with is not new, whatever its split.
    seen = {pair.opening for pair in trained}
    measured = [
        pair for pair, out in zip(found, held, strict=True) if out and pair.opening not in seen
    ]
    num_openings = len({pair.opening for pair in measured})
    if not trained or num_openings < 2:
        raise ValueError(
            f"reward_models.{name}: too few pairs, got {len(trained)} to train on and "
            f"{num_openings} openings held out of {training.pairs}; give more pairs, or change "
            "held_out"
        )
    return read(params, training, reader, trained), read(params, training, reader, measured)


def read(
    params: Params, training: RewardTraining, reader: Reader, pairs: Sequence[TextPair]
) -> Read:
    chosen = [Text(pair.prompt, pair.chosen) for pair in pairs]
    rejected = [Text(pair.prompt, pair.rejected) for pair in pairs]
    margins = [0.0] * len(pairs)
    if training.margin:
        reward = load_reward(params, params.label.reward)
        ahead = zip(reward(chosen), reward(rejected), strict=True)
        margins = [training.margin * (ours - theirs) for ours, theirs in ahead]
    tokens, num_cut = reader.within([*chosen, *rejected])
    sides = zip(tokens[: len(pairs)], tokens[len(pairs) :], strict=True)
    return Read(list(pairs), list(sides), margins, num_cut)


def objective(
    model: models.PreTrainedModel, read: Read, pairs: Sequence[int], params: Params
) -> Iterator[tuple[Tensor, Metrics]]:
    """Micro-batches of one step's pairs; losses and metrics are shares of the step's mean."""
    lengths = {pair: 2 * max(map(len, read.tokens[pair])) for pair in pairs}
    for cut in micro_batches(pairs, lengths, params.compute.token_budget):
        texts = [read.tokens[pair][side] for side in (0, 1) for pair in cut]
        dtype = models.DTYPES[params.compute.dtype]
        chosen, rejected = rewards(model, texts, compute_dtype=dtype).chunk(2)
        preference = torch.tensor([read.preferences[i] for i in cut], device=chosen.device)
        margin = torch.tensor([read.margins[i] for i in cut], device=chosen.device)
        losses = bradley_terry(chosen, rejected, preference, margin)
        ahead = (chosen - rejected).detach()
        yield (
            losses.sum() / len(pairs),
            {
                "accuracy": (0.5 * (ahead.sign() + 1)).sum().item() / len(pairs),
                "margin": ahead.sum().item() / len(pairs),
            },
        )


class Clock:
    """How fast steps are; the clock runs from when the objective is asked for one."""

    def __init__(self, read: Read, steps: Steps) -> None:
        self._read, self._steps = read, steps
        self._started: dict[int, float] = {}

    def timed(self, objective: Objective) -> Objective:
        def started(step: int) -> Iterable[tuple[Tensor, Metrics]]:
            self._started = {step: time.perf_counter()}
            return objective(step)

        return started

    def rates(self, step: int) -> dict[str, float] | None:
        """Of a step that has just ended; None if it was replayed from a checkpoint."""
        if step not in self._started:
            return None
        texts = (text for pair in self._steps[step] for text in self._read.tokens[pair])
        seconds = time.perf_counter() - self._started[step]
        return {"tokens_per_second": sum(map(len, texts)) / seconds}


def measured(
    model: models.PreTrainedModel, trained: Read, held_out: Read
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What the model makes of the pairs that are held out, and its reliability diagram.

    `accuracy` counts ties as halves; `length` says how the difference in rewards goes with that in
    tokens (Spearman's correlation; null where either never varies), and how often the model and the
    labels prefer the longer.
    """
    texts = [tokens for side in (0, 1) for tokens in (pair[side] for pair in held_out.tokens)]
    found = np.array(predicted(model, texts)).reshape(2, -1)
    ahead = found[0] - found[1]
    preferences = np.array(held_out.preferences)
    openings = {opening: n for n, opening in enumerate(p.opening for p in held_out.pairs)}
    numbers = np.array([openings[pair.opening] for pair in held_out.pairs])
    accuracy = win_rate(0.5 * (np.sign(ahead) + 1), numbers)
    probabilities = 0.5 * (1 + np.tanh(ahead / 2))
    reliable = calibration(probabilities, preferences)
    loss = bradley_terry(*map(torch.tensor, (*found, preferences, np.zeros_like(ahead))))
    longer = np.array([len(chosen) - len(rejected) for chosen, rejected in held_out.tokens])
    varies = len(set(longer)) > 1 and len(set(ahead)) > 1
    correlation = float(np.corrcoef(rankdata(ahead), rankdata(longer))[0, 1]) if varies else None
    length = {
        "correlation": None if correlation is None else float(correlation),
        "model_prefers_longer": float(np.mean(0.5 * (np.sign(ahead) * np.sign(longer) + 1))),
        "labels_prefer_longer": float(np.mean(0.5 * (np.sign(longer) + 1))),
    }
    metrics = {
        "accuracy": {
            key: getattr(accuracy, key) for key in ("value", "low", "high", "standard_error")
        },
        "loss": loss.mean().item(),
        "calibration_error": reliable.error,
        "length": length,
        "pairs": {
            "trained": len(trained.pairs),
            "held_out": len(held_out.pairs),
            "held_out_openings": len(openings),
            "texts_cut": trained.num_cut + held_out.num_cut,
        },
    }
    return rounded(metrics), [rounded(asdict(each)) for each in reliable.bins]


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """What goes to the tracker."""
    return {
        "held_out/accuracy": metrics["accuracy"]["value"],
        "held_out/loss": metrics["loss"],
        "held_out/calibration_error": metrics["calibration_error"],
    }


def rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    return round(tree, 6) if isinstance(tree, float) else tree


if __name__ == "__main__":
    program(main)
