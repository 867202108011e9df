"""What an evaluation found of a run, as it is written in the run's metrics."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.lineage import Lineage


@dataclass(frozen=True)
class Rate:
    """A win rate with its 95% interval."""

    opponent: str
    judge: str
    value: float
    low: float
    high: float
    num_prompts: int


def metrics(lineage: Lineage, run: str) -> dict[str, Any]:
    (path,) = (made for made in lineage.stages[f"evaluate@{run}"].outputs if "/metrics/" in made)
    return json.loads(Path(path).read_text())


def rates(lineage: Lineage, run: str) -> list[Rate]:
    return [
        Rate(
            opponent,
            judge,
            *(found[key] for key in ("value", "low", "high", "num_prompts")),
        )
        for opponent, by_judge in metrics(lineage, run)["win_rate"].items()
        for judge, found in by_judge.items()
    ]
