"""What the report tells of each run, read from the artefacts."""

import csv
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.metrics import distinct
from stages.artefacts import (
    COMPARISON,
    GENERATIONS_SCHEMA,
    card_of,
    curve_of,
    generations_of,
    looks_of,
    metrics_of,
    read_table,
    reliability_of,
    reward_metrics_of,
)
from stages.families import specification, sweeps
from stages.params import Params
from stages.verdicts import judgements, prompts_of, samples

OPPONENTS = {"sft": "SFT", "gold": "gold"}
# Of objectives: mid-tones that a colour-blind eye tells apart (after Okabe and Ito), legible on
# light and dark.
COLOURS = [
    "#0072b2", "#e08e00", "#009e73", "#cc79a7", "#d55e00", "#4fa9dc", "#8a6fc2", "#8f8a2b",
]  # fmt: skip
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # of runs


@dataclass(frozen=True)
class Judgement:
    """A verdict; what a judge of another kind does not give is empty."""

    verdict: str
    policy_reward: float
    opponent_reward: float
    policy_first: str = ""
    opponent_first: str = ""
    policy_first_reply: str = ""
    opponent_first_reply: str = ""

    @property
    def has_rewards(self) -> bool:
        return not math.isnan(self.policy_reward)


@dataclass(frozen=True)
class Generation:
    """What a run wrote of one prompt while it trained: nats of KL a completion."""

    step: int
    text: str
    kl: float


@dataclass(frozen=True)
class Result:
    """All that the page tells of one run.

    Args:
        specification: the loss and its hyperparameters, in words.
        curve: column -> values by step, NaN where nothing was measured.
        judgements: (prompt, opponent, judge) -> judgement, of the headline.
        texts: prompt -> completion, of the headline.
        generations: prompt -> what the run wrote while it trained, by step.
        looks: the gold reward and the KL of that, one row a look.
    """

    name: str
    specification: str
    colour: str
    marker: str
    metrics: dict[str, Any]
    curve: dict[str, list[float]]
    judgements: dict[tuple[int, str, str], Judgement]
    texts: dict[int, str]
    generations: dict[int, list[Generation]]
    looks: list[dict[str, float]]

    def rewards(self, opponent: str, judge: str) -> tuple[list[float], list[float]]:
        """The policy's and the opponent's rewards by one judge, a prompt each."""
        found = [j for (_, *key), j in self.judgements.items() if key == [opponent, judge]]
        return [j.policy_reward for j in found], [j.opponent_reward for j in found]


@dataclass(frozen=True)
class Reference:
    """SFT's own row of the table, and the data's mean reward."""

    reward: float
    gold_reward: float
    length: float
    distinct_2: float
    nll: float
    texts: dict[int, str]


def inputs_of(params: Params) -> list[Path]:
    """Files of every run that are there, and cards of judges that were examined."""
    found: list[Path] = []
    for name in params.runs:
        found += [metrics_of(name), curve_of(name), looks_of(name)]
        found += [generations_of(name)] if generations_of(name).exists() else []
    cards = [card_of(judge) for judge in params.evaluation.judges]
    rewards = [p for name in params.reward_models for p in reward_files(name)]
    return [*found, *(path for path in [*cards, *rewards] if path.exists())]


def reward_files(name: str) -> tuple[Path, Path]:
    """What is measured of a reward model, and its reliability diagram."""
    return reward_metrics_of(name), reliability_of(name)


def load_results(params: Params) -> list[Result]:
    prompts = prompts_of(params.evaluation.split)
    colours = {
        name: COLOURS[number % len(COLOURS)]
        for number, settings in enumerate(sweeps(params.runs).values())
        for names in settings.values()
        for name in names
    }
    return [
        _load(name, colours[name], MARKERS[number % len(MARKERS)], params, prompts)
        for number, name in enumerate(params.runs)
    ]


def _load(name: str, colour: str, marker: str, params: Params, prompts: range) -> Result:
    table = judgements(name, prompts)
    keys = zip(table["prompt"], table["opponent"], table["judge"], strict=True)
    columns = [field.name for field in fields(Judgement) if field.name in table]
    values = zip(*(table[column] for column in columns), strict=True)
    written = samples(name, prompts)
    return Result(
        name=name,
        specification=specification(params.runs[name]),
        colour=colour,
        marker=marker,
        metrics=json.loads(metrics_of(name).read_text()),
        curve=_columns(curve_of(name)),
        judgements={
            key: Judgement(**dict(zip(columns, value, strict=True)))
            for key, value in zip(keys, values, strict=True)
        },
        texts=dict(zip(written["prompt"], written["text"], strict=True)),
        generations=_generations(generations_of(name)),
        looks=_rows(looks_of(name)),
    )


def _rows(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [
            {column: float(value or math.nan) for column, value in row.items()}
            for row in csv.DictReader(file)
        ]


def _columns(path: Path) -> dict[str, list[float]]:
    with open(path, newline="") as file:
        columns = csv.DictReader(file).fieldnames or ()
    rows = _rows(path)
    return {column: [row[column] for row in rows] for column in columns}


def _generations(path: Path) -> dict[int, list[Generation]]:
    found: dict[int, list[Generation]] = {}
    if path.exists():
        table = read_table(path, GENERATIONS_SCHEMA)
        for prompt, *values in zip(
            *(table[column] for column in ("prompt", "step", "text", "kl")), strict=True
        ):
            found.setdefault(prompt, []).append(Generation(*values))
    return found


def load_reference(params: Params, result: Result) -> Reference:
    """SFT's figures; its rewards are those of an opponent of any run."""
    written = samples("sft", prompts_of(params.evaluation.split))
    judge = params.label.reward
    return Reference(
        reward=float(np.mean(result.rewards("sft", judge)[1])),
        gold_reward=float(np.mean(result.rewards("gold", judge)[1])),
        length=float(np.mean([len(tokens) for tokens in written["tokens"]])),
        distinct_2=distinct(written["tokens"], 2),
        nll=result.metrics["nll_of_sft"],
        texts=dict(zip(written["prompt"], written["text"], strict=True)),
    )


def load_comparison() -> dict[str, Any]:
    return json.loads(COMPARISON.read_text())


def load_reward_models(params: Params) -> dict[str, dict[str, Any]]:
    """Reward model -> its metrics with its `reliability`, of those that were trained."""
    found: dict[str, dict[str, Any]] = {}
    for name in params.reward_models:
        metrics, reliability = reward_files(name)
        if metrics.exists():
            with open(reliability, newline="") as file:
                bins = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
            found[name] = json.loads(metrics.read_text()) | {"reliability": bins}
    return found
