"""Are two runs different? Paired on prompts, tested by permutation, corrected for many pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from prefopt.statistics.intervals import Estimate, squared_half_width, variances_of_mean

EXACT_UP_TO = 14  # prompts that differ: 2^14 sign vectors
FLIPS_AT_ONCE = 2_000_000  # values


@dataclass(frozen=True)
class Comparison(Estimate):
    """The difference of two runs' win rates, first less second.

    Args:
        p: the probability of so large a difference, either way, of two equal runs.
        corrected: p after Holm's correction over all pairs.
        verdict: "a beats b", or "no significant difference".
    """

    first: str
    second: str
    num_prompts: int
    p: float
    corrected: float
    verdict: str


def compare(
    runs: Mapping[str, Float[np.ndarray, "_ prompts"]],
    *,
    seed: int,
    num_flips: int = 10_000,
    level: float = 0.95,
) -> list[Comparison]:
    """Every pair of runs, in the order of `runs`, on the prompts that both have verdicts for.

    With one training each, p is of the sign-flip test over prompts (`sign_flip`), and speaks of
    these two policies. Where a run has several training seeds, p is the one whose interval just
    holds 0 (`difference_intervals`), and speaks of the objectives that trained them. Holm 1979
    (Scand. J. Stat. 6:65) corrects over all pairs that are given here.

    Args:
        runs: name -> points by training seed and prompt, the columns of all of the same prompts.
        seed: of the permutations.
        num_flips: permutations, where there are too many to try them all.
        level: of the intervals; 1 - level is the level of significance.

    Raises:
        ValueError: if two runs have fewer than two prompts in common.
    """
    from statsmodels.stats.multitest import multipletests

    found: list[tuple[str, str, int, Estimate, float]] = []
    for number, (first, second) in enumerate(combinations(runs, 2)):
        ours, theirs = runs[first], runs[second]
        shared = ~(np.isnan(ours).any(0) | np.isnan(theirs).any(0))
        ours, theirs = ours[:, shared], theirs[:, shared]
        if ours.shape[1] < 2:
            raise ValueError(
                f"comparison of '{first}' with '{second}': too few prompts with verdicts on both, "
                f"got {ours.shape[1]}; two are needed"
            )
        mean, low, high, error = (
            float(x[0]) for x in difference_intervals(ours[None], theirs[None], level=level)
        )
        if len(ours) == len(theirs) == 1:
            p = sign_flip(ours[0] - theirs[0], seed=(seed, number), num_flips=num_flips)
        else:
            p = _p_of_interval(ours, theirs)
        found.append((first, second, ours.shape[1], Estimate(mean, low, high, error), p))
    if not found:
        return []
    corrected = np.asarray(multipletests([p for *_, p in found], method="holm")[1])
    return [
        Comparison(
            value=difference.value,
            low=difference.low,
            high=difference.high,
            standard_error=difference.standard_error,
            first=first,
            second=second,
            num_prompts=num_prompts,
            p=p,
            corrected=float(adjusted),
            verdict=_verdict(first, second, difference.value, float(adjusted) <= 1 - level),
        )
        for (first, second, num_prompts, difference, p), adjusted in zip(
            found, corrected, strict=True
        )
    ]


def difference_intervals(
    first: Float[np.ndarray, "many _ prompts"],
    second: Float[np.ndarray, "many _ prompts"],
    *,
    level: float = 0.95,
) -> tuple[
    Float[np.ndarray, " many"],
    Float[np.ndarray, " many"],
    Float[np.ndarray, " many"],
    Float[np.ndarray, " many"],
]:
    """Difference of the means of points, first less second, low, high and standard error.

    Prompts are paired: the variance of the difference is that of its prompts' own differences.
    Training seeds are not: variances of both runs add, with Welch's degrees of freedom (1947,
    Biometrika 34:28). Squared half-widths add as in `proportion_intervals`. The standard error is
    never less than that of one prompt won and one lost by half, so that equal runs claim no
    certainty.
    """
    value, parts = _difference(first, second)
    half = np.sqrt(squared_half_width(parts, level))
    error = np.sqrt(np.sum([variance for variance, _ in parts], axis=0))
    return value, np.maximum(value - half, -1.0), np.minimum(value + half, 1.0), error


def _difference(
    first: Float[np.ndarray, "many _ prompts"], second: Float[np.ndarray, "many _ prompts"]
) -> tuple[
    Float[np.ndarray, " many"],
    list[tuple[Float[np.ndarray, " many"], int | Float[np.ndarray, " many"]]],
]:
    """The difference of the means, and its variances with their degrees of freedom."""
    count = first.shape[-1]
    differences = first.mean(-2) - second.mean(-2)
    of_prompts = np.maximum(differences.var(-1, ddof=1) / count, 2 * 0.5**2 / count**2)
    of_seeds, total, spread = np.zeros((3, *of_prompts.shape))
    for values in (first, second):
        degrees = values.shape[-2] - 1
        if degrees:
            variance = variances_of_mean(values)[2]
            of_seeds += variance
            total += np.maximum(variance, 0.0)
            spread += np.maximum(variance, 0.0) ** 2 / degrees
    some = spread > 0
    freedom = np.where(some, total**2 / np.where(some, spread, 1.0), 0.0)
    return differences.mean(-1), [(of_prompts, count - 1), (np.maximum(of_seeds, 0.0), freedom)]


def sign_flip(
    differences: Float[np.ndarray, " prompts"], *, seed: int | tuple[int, int], num_flips: int
) -> float:
    """Two-sided p of the paired permutation test of a mean of 0.

    Of two equal policies, which one a prompt's completion came from is a coin's toss, so that each
    difference is as likely with the other sign. Exact where few prompts differ: the share of all
    sign vectors whose sum is as far from 0 (Fisher 1935, The Design of Experiments).
    Otherwise (b + 1) / (m + 1) of m random ones: Phipson and Smyth 2010 (SAGMB 9:39).
    """
    unequal = np.abs(differences[differences != 0])
    count = len(unequal)
    # Sums of the same halves and quarters may differ in their last bits.
    observed = abs(differences.sum()) * (1 - 1e-12)
    if count <= EXACT_UP_TO:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((2 * bits - 1) @ unequal) >= observed).mean())
    generator = np.random.default_rng(seed)
    at_once = max(1, FLIPS_AT_ONCE // count)
    as_far = 0
    for start in range(0, num_flips, at_once):
        signs = generator.integers(2, size=(min(at_once, num_flips - start), count), dtype=np.int8)
        as_far += int((np.abs((2 * signs - 1) @ unequal) >= observed).sum())
    return (as_far + 1) / (num_flips + 1)


def _p_of_interval(
    first: Float[np.ndarray, "_ prompts"], second: Float[np.ndarray, "_ prompts"]
) -> float:
    """1 less the level whose interval just holds 0, by bisection."""
    value, parts = _difference(first[None], second[None])
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if squared_half_width(parts, middle)[0] < value[0] ** 2:
            low = middle
        else:
            high = middle
    return 1 - low


def _verdict(first: str, second: str, difference: float, is_significant: bool) -> str:
    if not is_significant:
        return "no significant difference"
    better, worse = (first, second) if difference > 0 else (second, first)
    return f"{better} beats {worse}"
