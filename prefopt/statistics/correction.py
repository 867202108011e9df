"""A win rate without its judge's errors, which a labelled exam tells."""

import math
from collections.abc import Sequence

import numpy as np

from prefopt.statistics.intervals import Estimate, points


def corrected_win_rate(
    observed: Estimate, judge: Sequence[str], gold: Sequence[str], *, level: float = 0.95
) -> Estimate:
    """The win rate that gold would give, from a judge's win rate and its exam.

    A judge gives on average a points where gold says that the policy won and b where it lost
    (sensitivity and 1 - specificity where it never ties). Its win rate is then q = a p + b (1 - p),
    and p = (q - b) / (a - b): Rogan and Gladen 1978 (Am. J. Epidemiol. 107:71). The interval
    holds every p in [0, 1] with (q - a p - b (1 - p))^2 <= z^2 (V_q + p^2 V_a + (1 - p)^2 V_b):
    Fieller 1954 (J. R. Stat. Soc. B 16:175). V_a and V_b carry the exam's size, with one item more
    of each verdict (Laplace's rule; so do Lang and Reiczigel 2014, Prev. Vet. Med. 113:13).

    It assumes that the judge errs on the evaluated completions as on the exam's.

    Args:
        observed: the judge's win rate, with its standard error.
        judge: its verdicts on the exam; those that are missing are left out.
        gold: the truth on the same items; those that it ties are left out.
        level: of the interval.

    Raises:
        ValueError: if the exam lacks wins or losses, or does not show at this level that the judge
            is better than chance.
    """
    if len(judge) != len(gold):
        raise ValueError(
            f"exam: verdicts of judge and gold differ in number, got {len(judge)} and {len(gold)}"
        )
    given, truth = points(judge), points(gold)
    when_won, when_lost = (given[(truth == side) & ~np.isnan(given)] for side in (1.0, 0.0))
    if not len(when_won) or not len(when_lost):
        raise ValueError(
            "exam: items are needed that gold says were won and that it says were lost, got "
            f"{len(when_won)} and {len(when_lost)}"
        )
    (a, variance_a), (b, variance_b) = map(_mean_and_variance, (when_won, when_lost))
    squared = _quantile(level) ** 2
    # The inequality is u p^2 - 2 v p + w <= 0.
    gain, excess = a - b, observed.value - b
    u = gain**2 - squared * (variance_a + variance_b)
    v = gain * excess - squared * variance_b
    w = excess**2 - squared * (observed.standard_error**2 + variance_b)
    if gain <= 0 or u <= 0:
        raise ValueError(
            "exam: does not show that the judge is better than chance, got "
            f"{float(when_won.mean()):.2f} points on {len(when_won)} wins and "
            f"{float(when_lost.mean()):.2f} on {len(when_lost)} losses; take a larger exam or "
            "another judge"
        )
    root = math.sqrt(max(0.0, v**2 - u * w))
    low, high = (_within((v + sign * root) / u) for sign in (-1, 1))
    value = excess / gain
    error = math.sqrt(
        observed.standard_error**2 + value**2 * variance_a + (1 - value) ** 2 * variance_b
    )
    value = _within(value)
    return Estimate(value, min(low, value), max(high, value), error / gain)


def _mean_and_variance(found: np.ndarray) -> tuple[float, float]:
    """Of points with one win and one loss more: the mean, and the variance of the mean."""
    padded = np.append(found, [0.0, 1.0])
    return float(padded.mean()), float(padded.var(ddof=1)) / len(padded)


def _quantile(level: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))


def _within(p: float) -> float:
    return min(max(p, 0.0), 1.0)
