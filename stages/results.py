"""What the report tells of each run, read from the artefacts."""

import csv
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.metrics import distinct
from stages.artefacts import (
    JUDGEMENTS_SCHEMA,
    SAMPLES_SCHEMA,
    curve_of,
    judgements_of,
    metrics_of,
    read_table,
    samples_of,
)
from stages.params import Params

OPPONENTS = {"sft": "SFT", "gold": "gold"}
# Mid-tones that a colour-blind eye tells apart (after Okabe and Ito), legible on light and dark.
COLOURS = [
    "#0072b2", "#e08e00", "#009e73", "#cc79a7", "#d55e00", "#4fa9dc", "#8a6fc2", "#8f8a2b",
]  # fmt: skip
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # coprime to the colours: 56 runs look different


@dataclass(frozen=True)
class Judgement:
    verdict: str
    policy_reward: float
    opponent_reward: float


@dataclass(frozen=True)
class Result:
    """All that the page tells of one run.

    Args:
        specification: the loss and its hyperparameters, in words.
        curve: column -> values by step.
        judgements: (prompt, opponent, judge) -> judgement.
        texts: prompt -> completion.
    """

    name: str
    specification: str
    colour: str
    marker: str
    metrics: dict[str, Any]
    curve: dict[str, list[float]]
    judgements: dict[tuple[int, str, str], Judgement]
    texts: dict[int, str]

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


def load_result(name: str, number: int, params: Params) -> Result:
    row = dict(params.runs[name])
    loss = row.pop("loss")
    table = read_table(judgements_of(name), JUDGEMENTS_SCHEMA)
    keys = zip(table["prompt"], table["opponent"], table["judge"], strict=True)
    values = zip(table["verdict"], table["policy_reward"], table["opponent_reward"], strict=True)
    samples = read_table(samples_of(name), SAMPLES_SCHEMA)
    with open(curve_of(name), newline="") as file:
        steps = list(csv.DictReader(file))
    return Result(
        name=name,
        specification=", ".join([str(loss), *(f"{key} {value}" for key, value in row.items())]),
        colour=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        metrics=json.loads(metrics_of(name).read_text()),
        # Columns of looks are empty at the steps between.
        curve={column: [float(step[column] or "nan") for step in steps] for column in steps[0]},
        judgements={key: Judgement(*value) for key, value in zip(keys, values, strict=True)},
        texts=dict(zip(samples["prompt"], samples["text"], strict=True)),
    )


def load_reference(result: Result, judge: str) -> Reference:
    """SFT's figures; its rewards are those of an opponent of any run."""
    samples = read_table(samples_of("sft"), SAMPLES_SCHEMA)
    return Reference(
        reward=float(np.mean(result.rewards("sft", judge)[1])),
        gold_reward=float(np.mean(result.rewards("gold", judge)[1])),
        length=float(np.mean([len(tokens) for tokens in samples["tokens"]])),
        distinct_2=distinct(samples["tokens"], 2),
        nll=result.metrics["nll_of_sft"],
        texts=dict(zip(samples["prompt"], samples["text"], strict=True)),
    )
