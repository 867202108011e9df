"""Whether a predicted preference comes true as often as it says."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from prefopt.judging import wilson

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Predictions of like confidence.

    Args:
        confidence: their mean.
        correct: the share that came true, with its 95 % interval `low` to `high`.
        num_pairs: how many they are.
    """

    confidence: float
    correct: float
    low: float
    high: float
    num_pairs: int


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram and what it amounts to.

    Args:
        error: the expected calibration error: |correct - confidence|, averaged over pairs by bins.
        bins: those that have predictions, by confidence.
    """

    error: float
    bins: list[Bin]


def calibration(
    predicted: Float[np.ndarray, " pairs"], preference: Float[np.ndarray, " pairs"]
) -> Calibration:
    """Calibration of predicted preferences: each counts for the side that it prefers.

    Guo et al. 2017 (arXiv:1706.04599), eq. 3, in ten bins of equal width over [1/2, 1].

    Args:
        predicted: P(chosen > rejected) of the model, in [0, 1].
        preference: P(chosen > rejected) as it was labelled: 1, or less where labels are soft.
    """
    confidence = np.maximum(predicted, 1 - predicted)
    sides = np.sign(predicted - 0.5)
    correct = 0.5 + sides * (preference - 0.5)
    places = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    error, bins = 0.0, list[Bin]()
    for place in np.unique(places):
        chosen = places == place
        mean, found = float(confidence[chosen].mean()), wilson(correct[chosen])
        error += chosen.mean() * abs(found.value - mean)
        bins.append(Bin(mean, found.value, found.low, found.high, int(chosen.sum())))
    return Calibration(float(error), bins)
