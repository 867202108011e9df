"""How unlike texts are, on words: distinct n-grams and Self-BLEU.

A word is a run of letters, digits and apostrophes, or one other sign; case does not count.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

MOST_TEXTS = 500  # that Self-BLEU compares
EPSILON = (
    0.1  # a precision's numerator where nothing matches: smoothing method 1 of Chen and Cherry
)


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+|[^\w\s]", text.lower())


def distinct_within(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct n-grams of a text over its words, the mean over texts.

    Li et al. 2016 (arXiv:1510.03055), as the papers on distributional control compute it: text by
    text, over words and not over n-grams. A text without words is left out.
    """
    shares = [len(set(_ngrams(text, n))) / len(text) for text in texts if text]
    return sum(shares) / len(shares) if shares else 0.0


def self_bleu(texts: Sequence[Sequence[str]], n: int = 4) -> float:
    """BLEU-n of each text against all others, the mean: 1 where all texts are the same.

    Zhu et al. 2018 (arXiv:1802.01886). Of more than 500 texts the first 500; of fewer than two
    there is nothing to compare, and it is 0.
    """
    texts = [text for text in texts if text][:MOST_TEXTS]
    if len(texts) < 2:
        return 0.0
    lengths = Counter(map(len, texts))
    precisions = [_precisions(texts, order) for order in range(1, n + 1)]
    scores = [
        math.exp(sum(map(math.log, of_text)) / n) * _brevity(len(text), lengths)
        for text, of_text in zip(texts, zip(*precisions, strict=True), strict=True)
    ]
    return sum(scores) / len(scores)


def _precisions(texts: Sequence[Sequence[str]], n: int) -> list[float]:
    """Of each text, the share of its n-grams that another text has as often."""
    counts = [Counter(_ngrams(text, n)) for text in texts]
    most: dict[tuple[str, ...], list[int]] = {}
    for count in counts:
        for ngram, number in count.items():
            # The two largest: one of them is another text's.
            most[ngram] = sorted([*most.get(ngram, [0, 0]), number])[1:]
    found: list[float] = []
    for count in counts:
        matched = 0
        for ngram, number in count.items():
            second, first = most[ngram]
            matched += min(number, second if number == first else first)
        found.append((matched or EPSILON) / max(1, count.total()))
    return found


def _brevity(length: int, lengths: Counter[int]) -> float:
    """BLEU's penalty for a text that is shorter than the other that is nearest in length."""
    others = [other for other, number in lengths.items() if number > (other == length)]
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length >= nearest else math.exp(1 - nearest / length)


def _ngrams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
