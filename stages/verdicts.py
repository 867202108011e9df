"""Which rows of samples and judgements an evaluation reads: a split, and how often revised.

The headline is of `evaluation.split` and of completions as they were first written, revision 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.artefacts import (
    JUDGEMENTS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    SAMPLES_SCHEMA,
    judgements_of,
    map_table,
    read_table,
    rows_of_split,
    samples_of,
)

Table = dict[str, list[Any]]


def prompts_of(split: str) -> range:
    """Rows of `prompts` that are of the split."""
    return rows_of_split(map_table(PROMPTS, PROMPTS_SCHEMA), split)


def samples(name: str, prompts: range, revision: int = 0) -> Table:
    """A policy's completions of these prompts."""
    return _of(samples_of(name), read_table(samples_of(name), SAMPLES_SCHEMA), prompts, revision)


def judgements(name: str, prompts: range, revision: int = 0) -> Table:
    """The verdicts on a run's completions of these prompts."""
    table = read_table(judgements_of(name), JUDGEMENTS_SCHEMA)
    return _of(judgements_of(name), table, prompts, revision)


def questions(tables: Iterable[Table]) -> list[tuple[str, str]]:
    """Opponents and judges as they first come up."""
    return list(
        dict.fromkeys(
            pair for table in tables for pair in zip(table["opponent"], table["judge"], strict=True)
        )
    )


def rows_where(table: Mapping[str, Sequence[Any]], **wanted: Any) -> Table:
    """The rows whose columns have these values."""
    keys = zip(*(table[column] for column in wanted), strict=True)
    kept = [row for row, key in enumerate(keys) if key == tuple(wanted.values())]
    return {column: [values[row] for row in kept] for column, values in table.items()}


def _of(path: Path, table: Table, prompts: range, revision: int) -> Table:
    of_revision = rows_where(table, revision=revision)
    kept = [row for row, prompt in enumerate(of_revision["prompt"]) if prompt in prompts]
    if not kept:
        raise ValueError(
            f"{path}: nothing of prompts {prompts.start} to {prompts.stop - 1} at revision "
            f"{revision}, got {len(table['prompt'])} rows of others; run `dvc repro`"
        )
    return {column: [values[row] for row in kept] for column, values in of_revision.items()}
