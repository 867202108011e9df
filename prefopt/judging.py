"""What a judge's verdicts on labelled pairs say of the judge. Plain numpy, no gradient.

An outcome is 1 where the judge prefers the first text of an item, 0 where the second, 1/2 at a tie.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# Of a Gaussian prior on the coefficients, which keeps them finite where an item's label or its
# lengths tell every outcome.
PRIOR_PRECISION = 0.01


@dataclass(frozen=True)
class Proportion:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Slope:
    value: float
    standard_error: float


def wilson(values: Float[np.ndarray, " items"], z: float = 1.959964) -> Proportion:
    """The mean of values in [0, 1], one an item, with Wilson's 95 % interval.

    Wilson 1927. Exact in its coverage to the usual order for zeros and ones; halves vary less than
    it assumes, so that with them it is wider than it need be.
    """
    n, p = len(values), float(values.mean())
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return Proportion(p, max(0.0, centre - half), min(1.0, centre + half))


def length_slope(
    outcomes: Float[np.ndarray, " items"],
    first_is_better: Float[np.ndarray, " items"],
    first_length: Float[np.ndarray, " items"],
    second_length: Float[np.ndarray, " items"],
) -> Slope:
    """How much a judge likes length: the log-odds that a text gains by being twice as long.

    The slope on log2 of the lengths' ratio in a logistic regression of the outcomes on it and on
    the label, without intercept; 0 for a judge to whom length says nothing that the label does not.

    Args:
        outcomes: of the judge.
        first_is_better: the label, 1 or 0.
        first_length: characters, say; 1 is added to both.
        second_length: likewise.
    """
    ratio = np.log2((first_length + 1) / (second_length + 1))
    design = np.stack([ratio, 2 * first_is_better - 1], axis=1)
    coefficients = np.zeros(2)
    information = np.eye(2)
    for _ in range(100):  # Newton; the prior makes the log-posterior strictly concave.
        predicted = 1 / (1 + np.exp(-np.clip(design @ coefficients, -30, 30)))
        gradient = design.T @ (outcomes - predicted) - PRIOR_PRECISION * coefficients
        weights = predicted * (1 - predicted)
        information = (design.T * weights) @ design + PRIOR_PRECISION * np.eye(2)
        step = np.linalg.solve(information, gradient)
        # Never further than two units at once, so that it cannot overshoot for good.
        coefficients += step * min(1.0, 2 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    error = np.linalg.inv(information)[0, 0] ** 0.5
    return Slope(float(coefficients[0]), float(error))
