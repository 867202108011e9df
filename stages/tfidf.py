"""A logistic regression on TF-IDF features, read from JSON and not from a pickle."""

import gzip
import json
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.params import Strict, checked


class _File(Strict):
    """The file, under scikit-learn's names; a feature is its term, its idf and its weight."""

    token_pattern: str
    lowercase: bool
    ngram_range: tuple[int, int]
    sublinear_tf: bool
    norm: Literal["l2"] | None
    intercept: float
    features: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Classifier:
    """What says how likely a text is of class 1."""

    settings: _File
    words: re.Pattern[str]
    features: dict[str, tuple[float, float]]

    def log_odds(self, text: str) -> float:
        """log P(1) - log P(0) of a text; the intercept where it has no known term."""
        words = self.words.findall(text.lower() if self.settings.lowercase else text)
        shortest, longest = self.settings.ngram_range
        counts = Counter(
            " ".join(words[start : start + length])
            for length in range(shortest, longest + 1)
            for start in range(len(words) - length + 1)
        )
        square = total = 0.0
        for term, count in counts.items():
            if term in self.features:
                idf, weight = self.features[term]
                value = idf * (1 + math.log(count) if self.settings.sublinear_tf else count)
                square += value * value
                total += value * weight
        if self.settings.norm == "l2" and square:
            total /= math.sqrt(square)
        return self.settings.intercept + total


def load(path: Path) -> Classifier:
    """Read a classifier from JSON, plain or gzipped.

    Raises:
        ValueError: if it cannot be read or is none.
    """
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            tree = json.load(file)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: no JSON file, got {error}; write it again") from None
    settings = checked(_File, tree, str(path))
    try:
        words = re.compile(settings.token_pattern)
    except re.error as error:
        raise ValueError(
            f"{path}.token_pattern: no regular expression, got {settings.token_pattern!r} "
            f"({error}); mend it"
        ) from None
    shortest, longest = settings.ngram_range
    if words.groups > 1 or not 1 <= shortest <= longest:
        raise ValueError(
            f"{path}: unusable, got {words.groups} groups in token_pattern and ngram_range "
            f"{settings.ngram_range}; give at most one group, and 1 <= shortest <= longest"
        )
    features = {term: (idf, weight) for term, idf, weight in settings.features}
    if len(features) != len(settings.features):
        repeated = Counter(term for term, *_ in settings.features).most_common(1)[0]
        raise ValueError(f"{path}.features: a term twice, got {repeated[0]!r}; keep one of them")
    return Classifier(settings, words, features)
