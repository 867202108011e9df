"""Leaks: training texts that an evaluation text nearly repeats.

Prompts are disjoint by construction; this finds whole texts that differ in a few words. Only the
evaluation's word trigrams are kept, so memory does not grow with the training data.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

Gram = tuple[str, ...]

THRESHOLD = 0.7  # of two texts' word trigrams, shared over all
NUM_SHOWN = 5


@dataclass(frozen=True)
class Leak:
    """A training text and an evaluation text that are nearly one.

    Args:
        training: its number.
        evaluation: its number.
        similarity: Jaccard's, of their word trigrams.
    """

    training: int
    evaluation: int
    similarity: float


def leaks(training: Iterable[str], evaluation: Iterable[str]) -> Iterator[Leak]:
    """The pairs of texts whose similarity reaches the threshold, in the order of training."""
    kept = [trigrams(text) for text in evaluation]
    frequency = Counter(gram for grams in kept for gram in grams)
    # Of so similar texts at least `least` trigrams are shared, and so one of all but `least - 1`:
    # the rarest of them are enough to meet by, and common phrases bring nobody together.
    holders: defaultdict[Gram, list[int]] = defaultdict(list)
    for number, grams in enumerate(kept):
        least = math.ceil(THRESHOLD * len(grams))
        rarest = sorted(grams, key=lambda gram: (frequency[gram], gram))
        for gram in rarest[: len(grams) - least + 1]:
            holders[gram].append(number)
    for number, text in enumerate(training):
        grams = trigrams(text)
        for holder in sorted({holder for gram in grams for holder in holders.get(gram, ())}):
            similarity = len(grams & kept[holder]) / len(grams | kept[holder])
            if similarity >= THRESHOLD:
                yield Leak(number, holder, similarity)


def trigrams(text: str) -> set[Gram]:
    """A text's word trigrams, without case; a text of fewer words is one gram."""
    words = tuple(text.casefold().split())
    return {words[i : i + 3] for i in range(max(1, len(words) - 2))}


def refuse(
    found: Iterable[Leak], training: Callable[[int], str], evaluation: Callable[[int], str]
) -> None:
    """Refuse data that leak.

    Args:
        found: leaks.
        training: where a training text stands, file and line.
        evaluation: where an evaluation text stands.

    Raises:
        ValueError: naming the rows, the first of them.
    """
    leaked = list(found)
    if not leaked:
        return
    shown = "; ".join(
        f"{training(leak.training)} and {evaluation(leak.evaluation)} ({leak.similarity:.0%})"
        for leak in leaked[:NUM_SHOWN]
    )
    more = f" and {len(leaked) - NUM_SHOWN} more" if len(leaked) > NUM_SHOWN else ""
    raise ValueError(
        "data: evaluation texts nearly repeat training texts, got "
        f"{len(leaked)} pairs of rows that share most of their words: {shown}{more}; drop one of "
        "each, or give both the same prompt, which keeps one"
    )
