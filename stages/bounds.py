"""Measured values beside their bounds, as drift and the gate say what holds and what does not."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Bound:
    """A value that is to be at least, at most, or above a bound."""

    what: str
    value: float
    relation: Literal["at least", "at most", "above"]
    bound: float

    @property
    def holds(self) -> bool:
        match self.relation:
            case "at least":
                return self.value >= self.bound
            case "at most":
                return self.value <= self.bound
            case "above":
                return self.value > self.bound


def answer(bounds: Sequence[Bound]) -> None:
    """Print bounds as JSON, each with whether it holds, for the flow that asked."""
    rows = [
        asdict(bound) | {"value": round(bound.value, 6), "holds": bound.holds} for bound in bounds
    ]
    sys.stdout.write(json.dumps(rows, allow_nan=False) + "\n")
