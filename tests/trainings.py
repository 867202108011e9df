"""What tests of trainings share: prompts, and run `x`."""

import csv
import sys
from collections.abc import Sequence

import pytest

from stages import tracking, train
from stages.artefacts import (
    PROMPTS,
    PROMPTS_SCHEMA,
    curve_of,
    digest,
    generations_of,
    logratios_of,
    model_of,
    write_table,
)

Curve = list[dict[str, str]]


def write_prompts(
    splits: Sequence[str], tokens: Sequence[Sequence[int]], texts: Sequence[str] | None = None
) -> None:
    """Prompts without completions of the data's own."""
    count = len(splits)
    columns = {
        "split": splits,
        "text": texts or [""] * count,
        "tokens": tokens,
        "gold": [""] * count,
        "gold_tokens": [[1]] * count,
        "rejected": [""] * count,
        "rejected_tokens": [[]] * count,
    }
    write_table(PROMPTS, columns, PROMPTS_SCHEMA)


def name_x(patch: pytest.MonkeyPatch) -> None:
    """Have `train.main` train run `x`, and nobody carry away what is not read."""
    patch.setattr(sys, "argv", ["train", "x"])
    patch.setattr(tracking, "_start_courier", lambda: None)


def train_x() -> Curve:
    """Train it by params.yaml; its curve."""
    train.main()
    with open(curve_of("x"), newline="") as file:
        return list(csv.DictReader(file))


def outputs_of_x() -> list[str]:
    """The digests of all that its training writes."""
    return [digest(of("x")) for of in (model_of, curve_of, logratios_of, generations_of)]
