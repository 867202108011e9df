"""Figures of a run: win rates with intervals, displacement, diversity. Plain numpy, no gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its percentile bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    values: Float[np.ndarray, " prompts"],
    *,
    seed: int,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> Estimate:
    """The mean of one value per prompt, prompts resampled with replacement.

    Percentile interval: Efron and Tibshirani 1993, section 13.3.
    """
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, 1000):
        drawn = generator.integers(
            len(values), size=(min(1000, num_resamples - start), len(values))
        )
        means[start : start + len(drawn)] = values[drawn].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def points(verdicts: Sequence[str]) -> Float[np.ndarray, " prompts"]:
    """1 for a policy's win, 1/2 for a tie, 0 for a loss: their mean is the win rate.

    Raises:
        KeyError: on any other verdict; leave unparsed ones out and count them.
    """
    worth = {"policy": 1.0, "tie": 0.5, "opponent": 0.0}
    return np.array([worth[verdict] for verdict in verdicts])


@dataclass(frozen=True)
class Displacement:
    """How the log-ratios of training pairs moved; at the reference all are 0."""

    chosen_fell: float
    both_fell: float
    median_chosen: float
    median_rejected: float


def displacement(
    chosen: Float[np.ndarray, " pairs"], rejected: Float[np.ndarray, " pairs"]
) -> Displacement:
    """From log-ratios u_w and u_l of the pairs: shares that fell, and medians in nats."""
    return Displacement(
        chosen_fell=float((chosen < 0).mean()),
        both_fell=float(((chosen < 0) & (rejected < 0)).mean()),
        median_chosen=float(np.median(chosen)),
        median_rejected=float(np.median(rejected)),
    )


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all completions together.

    Li et al. 2016 (arXiv:1510.03055).
    """
    ngrams = [
        tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)
    ]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
