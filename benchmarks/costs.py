"""How many token slots and floating-point operations a step takes, by formula.

A row is a prompt P with a completion C; a prompt has K rows, a batch B prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.data import Example


@dataclass(frozen=True)
class Work:
    """What a forward pass computes.

    Args:
        slots: token slots that pass through the layers.
        attended: pairs of a query and a key that it sees.
        scored: positions that pass through the LM head.
    """

    slots: int
    attended: int
    scored: int

    def flop(self, config: Any) -> float:
        """Of a forward and a backward pass that keeps what it needs and repeats nothing.

        Products cost twice as much backwards; attention, whose scores are made again, 2.5 times.
        """
        width = config.hidden_size
        heads = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or width // heads
        linear = 2 * width * head_width * (heads + config.num_key_value_heads)
        linear += 3 * width * config.intermediate_size
        layers = config.num_hidden_layers
        return (
            3 * 2 * layers * linear * self.slots
            + 3.5 * 4 * layers * heads * head_width * self.attended
            + 3 * 2 * width * config.vocab_size * self.scored
        )


def useful_tokens(batch: Sequence[Example]) -> int:
    """The fewest that can be read: every prompt once, every completion."""
    return sum(
        len(example.rows[0].prompt) + sum(len(row.completion) for row in example.rows)
        for example in batch
    )


def padded(batch: Sequence[Example], *, score_all: bool = False) -> Work:
    """B K rows as long as the longest."""
    rows = [row for example in batch for row in example.rows]
    time = max(map(len, rows))
    scored = len(rows) * (time - 1) if score_all else sum(len(row.completion) for row in rows)
    return Work(len(rows) * time, len(rows) * time * (time + 1) // 2, scored)


def packed(batch: Sequence[Example]) -> Work:
    """P + sum of (C - 1) slots a prompt; each row attends as if it were alone."""
    slots = attended = scored = 0
    for example in batch:
        slots += len(example.rows[0].prompt)
        for row in example.rows:
            slots += len(row.completion) - 1
            attended += len(row) * (len(row) - 1) // 2
            scored += len(row.completion)
    return Work(slots, attended, scored)


def necessary(batch: Sequence[Example]) -> Work:
    """As `packed`, with the prompt's attention to itself computed once."""
    work = packed(batch)
    again = sum(
        (len(example.rows) - 1) * len(example.rows[0].prompt) * (len(example.rows[0].prompt) + 1)
        for example in batch
    )
    return Work(work.slots, work.attended - again // 2, work.scored)
