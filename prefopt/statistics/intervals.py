"""Win rates of verdict tables, with intervals that cover.

`python -m benchmarks.coverage` measures how often they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

WORTH = {"policy": 1.0, "tie": 0.5, "opponent": 0.0}
MISSING = ("unparsed", "refused", "missing")


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts (and training seeds) with its interval and its standard error."""

    value: float
    low: float
    high: float
    standard_error: float


@dataclass(frozen=True)
class WinRate(Estimate):
    """A win rate with what it left out.

    Args:
        num_prompts: that count: those with a verdict for every training seed.
        missing: verdicts that are missing, of all.
        worst: the win rate if every missing verdict were a loss.
        best: the win rate if every missing verdict were a win.
    """

    num_prompts: int
    missing: int
    worst: float
    best: float


def points(verdicts: Sequence[str]) -> Float[np.ndarray, " verdicts"]:
    """1 for a policy's win, 1/2 for a tie, 0 for a loss, NaN for what no judge has decided.

    Raises:
        ValueError: on any other verdict.
    """
    worth = WORTH | dict.fromkeys(MISSING, np.nan)
    for verdict in verdicts:
        if verdict not in worth:
            raise ValueError(f"verdict: unknown, got '{verdict}'; known are {', '.join(worth)}")
    return np.array([worth[verdict] for verdict in verdicts])


def cells(
    points: Float[np.ndarray, " verdicts"],
    prompts: Integer[np.ndarray, " verdicts"],
    seeds: Integer[np.ndarray, " verdicts"] | None = None,
) -> Float[np.ndarray, "seeds prompts"]:
    """The mean of what was judged for each training seed and prompt, both in ascending order.

    Samples and orders of presentation are averaged, so that every prompt counts the same however
    often it was judged. A cell without any verdict is NaN.

    Args:
        points: one a verdict.
        prompts: which prompt it is of.
        seeds: which training of a run it is of; one training if left out.
    """
    seeds = np.zeros_like(prompts) if seeds is None else seeds
    rows, row = np.unique(seeds, return_inverse=True)
    columns, column = np.unique(prompts, return_inverse=True)
    known = ~np.isnan(points)
    total, count = np.zeros((2, len(rows), len(columns)))
    np.add.at(total, (row[known], column[known]), points[known])
    np.add.at(count, (row[known], column[known]), 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def win_rate(
    points: Float[np.ndarray, " verdicts"],
    prompts: Integer[np.ndarray, " verdicts"],
    seeds: Integer[np.ndarray, " verdicts"] | None = None,
    *,
    level: float = 0.95,
) -> WinRate:
    """The win rate of a verdict table, its interval, and its bounds if verdicts are missing.

    The bounds are those that no assumption about the missing narrows: Manski 1989 (J. Hum.
    Resour. 24:343), for outcomes in [0, 1].

    Raises:
        ValueError: if fewer than two prompts have a verdict for every training seed.
    """
    table = complete(cells(points, prompts, seeds))
    if table.shape[1] < 2:
        raise ValueError(
            f"win rate: too few prompts with verdicts, got {table.shape[1]}; two are needed, of "
            "each training seed"
        )
    mean, low, high, error = (x[0] for x in proportion_intervals(table[None], level=level))
    missing = np.isnan(points)
    worst, best = (cells(np.where(missing, fill, points), prompts, seeds) for fill in (0.0, 1.0))
    return WinRate(
        value=float(mean),
        low=float(low),
        high=float(high),
        standard_error=float(error),
        num_prompts=table.shape[1],
        missing=int(missing.sum()),
        worst=float(complete(worst).mean()),
        best=float(complete(best).mean()),
    )


def complete(table: Float[np.ndarray, "seeds prompts"]) -> Float[np.ndarray, "seeds judged"]:
    """The prompts that have a verdict for every training seed."""
    return table[:, ~np.isnan(table).any(0)]


def proportion_intervals(
    values: Float[np.ndarray, "many seeds prompts"], *, level: float = 0.95
) -> tuple[
    Float[np.ndarray, " many"],
    Float[np.ndarray, " many"],
    Float[np.ndarray, " many"],
    Float[np.ndarray, " many"],
]:
    """Mean of values in [0, 1], low, high and standard error: Wilson's, on an effective sample.

    Wilson's interval (1927, JASA 22:209) holds every p with (mean - p)^2 <= z^2 p (1 - p) / n. For
    wins that are not independent, z^2 / n becomes squared half-width / (mean (1 - mean)), with the
    half-width of Student's interval: the effective sample size of Franco, Little, Louis and Slud
    2019 (J. Survey Stat. Methodol. 7:334). The squared half-width is the sum of those of prompts
    and of training seeds, each with Student's quantile for its own degrees of freedom, as Graybill
    and Wang 1980 (JASA 75:869) and Zou and Donner 2008 (Stat. Med. 27:1693) add intervals.

    With two seeds that differ by more than the prompts' own uncertainty it covers some 0.9 where
    it claims 0.95; with three or more what it claims.

    A mean of exactly 0 or 1 is taken as that of independent wins. Otherwise the standard error is
    never less than sqrt(mean (1 - mean)) / prompts, so that equal verdicts claim no certainty.
    """
    count = values.shape[-1]
    mean, of_prompts, of_seeds = variances_of_mean(values)
    spread = mean * (1 - mean)
    inner = spread > 0
    scale = np.where(inner, spread, 1.0)
    # In terms of the variance of one independent win or loss.
    of_prompts = np.where(inner, np.maximum(of_prompts / scale, 1 / count**2), 1 / count)
    of_seeds = np.maximum(of_seeds / scale, 0.0)
    shrink = squared_half_width([(of_prompts, count - 1), (of_seeds, values.shape[-2] - 1)], level)
    centre = (mean + shrink / 2) / (1 + shrink)
    half = np.sqrt(shrink * spread + shrink**2 / 4) / (1 + shrink)
    return mean, centre - half, centre + half, np.sqrt((of_prompts + of_seeds) * spread)


def squared_half_width(
    parts: Sequence[tuple[Float[np.ndarray, " many"], int | Float[np.ndarray, " many"]]],
    level: float,
) -> Float[np.ndarray, " many"]:
    """Of the interval of a sum of independent estimates.

    Args:
        parts: variances with their degrees of freedom; one without any is no estimate and adds 0.
        level: how often the interval shall hold the truth.
    """
    from scipy.special import stdtrit

    quantiles = [stdtrit(np.maximum(df, 1), (1 + level) / 2) ** 2 for _, df in parts]
    return np.sum(
        [
            np.where(np.asarray(df) > 0, quantile * variance, 0.0)
            for quantile, (variance, df) in zip(quantiles, parts, strict=True)
        ],
        axis=0,
    )


def variances_of_mean(
    values: Float[np.ndarray, "many seeds prompts"],
) -> tuple[Float[np.ndarray, " many"], Float[np.ndarray, " many"], Float[np.ndarray, " many"]]:
    """The mean, and the variances that drawn prompts and drawn training seeds give it.

    Prompts and seeds are crossed random effects. From mean squares of the two-way table: prompts
    MS_prompts / (prompts seeds), which holds the residual; seeds (MS_seeds - MS_residual) /
    (prompts seeds), which may come out negative. Searle, Casella and McCulloch 1992, Variance
    Components, chapter 4.
    """
    seeds, prompts = values.shape[-2:]
    of_prompts, of_seeds = values.mean(-2), values.mean(-1)
    mean = of_prompts.mean(-1)
    from_prompts = of_prompts.var(-1, ddof=1) / prompts
    if seeds == 1:
        return mean, from_prompts, np.zeros_like(mean)
    residual = values - of_prompts[..., None, :] - of_seeds[..., None] + mean[..., None, None]
    from_residual = (residual**2).sum((-2, -1)) / ((seeds - 1) * (prompts - 1) * prompts * seeds)
    return mean, from_prompts, of_seeds.var(-1, ddof=1) / seeds - from_residual
