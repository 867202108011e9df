"""Win rates at equal length: what a judge that likes length would say without it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from prefopt.statistics.intervals import Estimate

PRIOR_DEVIATION = 5.0  # of both coefficients, in logits
RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True)
class LengthControlled(Estimate):
    """A win rate predicted at a length difference of 0; its standard error is the bootstrap's.

    Args:
        length_effect: phi, in logits; positive where the longer completion wins.
        is_separated: whether wins and losses were told apart without error, by length or because
            one of them is missing, so that the prior alone keeps the fit finite.
    """

    length_effect: float
    is_separated: bool


def length_controlled(
    points: Float[np.ndarray, " verdicts"],
    differences: Float[np.ndarray, " verdicts"] | Integer[np.ndarray, " verdicts"],
    prompts: Integer[np.ndarray, " verdicts"],
    *,
    seed: int,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> LengthControlled:
    """The win rate that a logistic model predicts for completions of equal length.

    logit P(win) = theta + phi tanh(difference / s), s the root mean square of the differences
    about their mean; the win rate is sigmoid(theta). Dubois et al. 2024 (arXiv:2404.04475)
    for one policy and one opponent. Its third term, a prompt's difficulty, is left out: one
    policy's verdicts do not tell it from noise, and it sums to nothing over the prompts.

    Ties are halves (Papke and Wooldridge 1996, J. Appl. Econom. 11:619). theta and phi have
    normal priors around 0 with standard deviation 5, which separated verdicts need and others
    hardly feel. Every prompt weighs the same; the interval is the percentile bootstrap's over
    prompts, s held fixed. It holds the uncertainty of phi, so that it is wide where few
    completions are of about equal length.

    Args:
        points: one a verdict; NaN is left out.
        differences: the policy's length less the opponent's.
        prompts: which prompt a verdict is of.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.
        level: of the interval.

    Raises:
        ValueError: if all differences are one number other than 0, so that nothing tells length
            from quality, or if fewer than two prompts have verdicts.
    """
    known = ~np.isnan(points)
    points, differences, prompts = points[known], differences[known], prompts[known]
    names, place, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ValueError(
            f"length control: too few prompts with verdicts, got {len(names)}; two are needed"
        )
    spread = float(differences.std())
    if spread == 0 and differences[0] != 0:
        raise ValueError(
            "length control: every completion is longer than its opponent by the same, got "
            f"{differences[0]}; length and quality cannot be told apart"
        )
    feature = np.tanh(differences / spread) if spread else np.zeros(len(points))
    weights = 1 / counts[place]
    theta, phi = _fitted(points, feature, weights[None], np.zeros((2, 1)))[:, 0]

    generator = np.random.default_rng(seed)
    rates = np.empty(num_resamples)
    for start in range(0, num_resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, num_resamples - start)
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size)
        begin = np.repeat([[theta], [phi]], size, axis=1)
        found = _fitted(points, feature, drawn[:, place] * weights, begin)
        rates[start : start + size] = _sigmoid(found[0])
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return LengthControlled(
        value=float(_sigmoid(np.array([theta]))[0]),
        low=float(low),
        high=float(high),
        standard_error=float(rates.std()),
        length_effect=float(phi),
        is_separated=_is_separated(points, feature),
    )


def _fitted(
    points: Float[np.ndarray, " verdicts"],
    feature: Float[np.ndarray, " verdicts"],
    weights: Float[np.ndarray, "fits verdicts"],
    begin: Float[np.ndarray, "2 fits"],
) -> Float[np.ndarray, "2 fits"]:
    """theta and phi of greatest posterior, by Newton's method, a fit for each row of weights.

    Steps are cut to one logit: the objective is strictly concave and its curvature changes by less
    than e a logit, so that such steps climb.
    """
    theta, phi = begin
    precision = 1 / PRIOR_DEVIATION**2
    for _ in range(100):
        p = _sigmoid(theta[:, None] + phi[:, None] * feature)
        error = weights * (points - p)
        slope = np.array([error.sum(1), error @ feature]) - precision * np.array([theta, phi])
        curve = weights * p * (1 - p)
        a, b, c = curve.sum(1) + precision, curve @ feature, curve @ feature**2 + precision
        step = np.array([c * slope[0] - b * slope[1], a * slope[1] - b * slope[0]])
        step /= a * c - b**2
        step /= np.maximum(1.0, np.abs(step).max(0))
        theta, phi = theta + step[0], phi + step[1]
        if np.abs(step).max() < 1e-9:
            return np.array([theta, phi])
    raise AssertionError("length control: Newton's method has not converged")


def _sigmoid(x: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    return 0.5 * (1 + np.tanh(x / 2))


def _is_separated(
    points: Float[np.ndarray, " verdicts"], feature: Float[np.ndarray, " verdicts"]
) -> bool:
    """Whether some threshold on the feature has no win on one side and no loss on the other.

    Albert and Anderson 1984 (Biometrika 71:1): then no finite fit is the likeliest. A tie is both.
    """
    wins, losses = feature[points > 0], feature[points < 1]
    return (
        not len(wins)
        or not len(losses)
        or bool(wins.max() <= losses.min() or losses.max() <= wins.min())
    )
