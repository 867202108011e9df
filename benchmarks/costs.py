"""What each way to lay out a batch computes.

A row is a prompt P with a completion C; a prompt has K rows, a batch B prompts.
"""

from collections.abc import Sequence

from benchmarks.data import Example
from prefopt.costs import Work
from prefopt.packing import Row


def rows_of(batch: Sequence[Example]) -> list[Row]:
    return [row for example in batch for row in example.rows]


def padded(batch: Sequence[Example], *, score_all: bool = False) -> Work:
    """B K rows as long as the longest."""
    rows = rows_of(batch)
    time = max(map(len, rows))
    scored = len(rows) * (time - 1) if score_all else sum(len(row.completion) for row in rows)
    return Work(len(rows) * time, len(rows) * time * (time + 1) // 2, scored)


def packed(batch: Sequence[Example]) -> Work:
    """P + sum of (C - 1) slots a prompt.

    A prompt's longest row attends as if it were alone; of the others those whose completions are
    shorter than the prompt attend from there on.
    """
    slots = attended = scored = 0
    for example in batch:
        prompt = len(example.rows[0].prompt)
        slots += prompt
        fed = sorted(len(row.completion) - 1 for row in example.rows)
        for place, time in enumerate(reversed(fed)):
            slots += time
            scored += time + 1
            attended += (prompt + time) * (prompt + time + 1) // 2
            if place > 0 and time < prompt:
                attended -= prompt * (prompt + 1) // 2
    return Work(slots, attended, scored)
