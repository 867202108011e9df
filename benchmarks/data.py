"""Prompts with completions at random, of the lengths that well-known data sets have.

Token ids mean nothing here; only how many there are does. Everything follows from the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.packing import Row

# Token ids below are control tokens.
END, PAD, NUM_CONTROL = 1, 2, 3


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths, in tokens.

    Args:
        prompt: median.
        completion: median of each completion, the end-of-sequence token included.
        prompt_spread: standard deviation of the logarithm.
        completion_spread: likewise.
        longest: prompt and completion together are cut here.
    """

    prompt: int
    completion: int
    prompt_spread: float
    completion_spread: float
    longest: int = 1024


# Medians are those of arXiv:2410.20305; the spreads are assumed.
TLDR = Lengths(352, 32, 0.35, 0.45)
HH = Lengths(96, 45, 0.85, 0.80)
ULTRAFEEDBACK = Lengths(71, 169, 1.0, 0.75)
RANKED = Lengths(200, 60, 0.3, 0.4)


@dataclass(frozen=True)
class Example:
    """A prompt and its completions, the best first."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return max(map(len, self.rows))


def examples(
    lengths: Lengths, number: int, *, completions: int, vocab_size: int, seed: int
) -> list[Example]:
    generator = np.random.default_rng(seed)

    def length(median: int, spread: float, shortest: int, longest: int) -> int:
        return int(np.clip(median * np.exp(spread * generator.normal()), shortest, longest))

    def words(count: int) -> list[int]:
        return generator.integers(NUM_CONTROL, vocab_size, count).tolist()

    drawn: list[Example] = []
    for _ in range(number):
        # Room for a completion of eight tokens is left.
        prompt = words(length(lengths.prompt, lengths.prompt_spread, 4, lengths.longest - 8))
        room = lengths.longest - len(prompt)
        sizes = [
            length(lengths.completion, lengths.completion_spread, 2, room)
            for _ in range(completions)
        ]
        drawn.append(Example(tuple(Row(prompt, [*words(size - 1), END]) for size in sizes)))
    return drawn


def random_batches(pool: Sequence[Example], size: int) -> list[list[Example]]:
    """In the order in which they were drawn."""
    return [list(pool[i : i + size]) for i in range(0, len(pool) - size + 1, size)]


def sorted_batches(pool: Sequence[Example], size: int, number: int) -> list[list[Example]]:
    """Of a pool sorted by length: `number` batches, evenly from its shortest to its longest."""
    cuts = random_batches(sorted(pool, key=len), size)
    return [cuts[int((i + 0.5) * len(cuts) / number)] for i in range(number)]
