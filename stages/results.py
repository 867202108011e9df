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
    metrics_of,
    read_table,
)
from stages.params import Params
from stages.verdicts import judgements, prompts_of, samples

OPPONENTS = {"sft": "SFT", "gold": "gold"}
# Mid-tones that a colour-blind eye tells apart (after Okabe and Ito), legible on light and dark.
COLOURS = [
    "#0072b2", "#e08e00", "#009e73", "#cc79a7", "#d55e00", "#4fa9dc", "#8a6fc2", "#8f8a2b",
]  # fmt: skip
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # coprime to the colours: 56 runs look different


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
        found += [metrics_of(name), curve_of(name)]
        found += [generations_of(name)] if generations_of(name).exists() else []
    cards = [card_of(judge) for judge in params.evaluation.judges]
    return [*found, *(card for card in cards if card.exists())]


def load_results(params: Params) -> list[Result]:
    prompts = prompts_of(params.evaluation.split)
    return [_load(name, number, params, prompts) for number, name in enumerate(params.runs)]


def _load(name: str, number: int, params: Params, prompts: range) -> Result:
    row = dict(params.runs[name])
    loss = [row.pop("loss")] if "loss" in row else []
    table = judgements(name, prompts)
    keys = zip(table["prompt"], table["opponent"], table["judge"], strict=True)
    columns = [field.name for field in fields(Judgement) if field.name in table]
    values = zip(*(table[column] for column in columns), strict=True)
    written = samples(name, prompts)
    with open(curve_of(name), newline="") as file:
        reader = csv.DictReader(file)
        steps = list(reader)
    return Result(
        name=name,
        specification=", ".join([*loss, *(f"{key} {value}" for key, value in row.items())]),
        colour=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        metrics=json.loads(metrics_of(name).read_text()),
        curve={
            column: [float(step[column] or math.nan) for step in steps]
            for column in reader.fieldnames or ()
        },
        judgements={
            key: Judgement(**dict(zip(columns, value, strict=True)))
            for key, value in zip(keys, values, strict=True)
        },
        texts=dict(zip(written["prompt"], written["text"], strict=True)),
        generations=_generations(generations_of(name)),
    )


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


def load_cards(params: Params) -> dict[str, dict[str, Any]]:
    """Judge -> its report card, of those that were examined."""
    return {
        judge: json.loads(card_of(judge).read_text())
        for judge in params.evaluation.judges
        if card_of(judge).exists()
    }
