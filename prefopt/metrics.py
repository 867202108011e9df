"""Figures of a run beside its win rates: displacement, diversity. Plain numpy, no gradient."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


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


def best_of_kl_bound(n: int) -> float:
    """At most so many nats is KL(best-of-N || reference), whatever the reward: log N - (N - 1)/N.

    Attained where no two completions have the same reward and none is likely; ties bring it down.
    Beirami et al. 2024 (arXiv:2401.01879), who prove that the formula is this bound and not the KL.
    """
    return math.log(n) - (n - 1) / n


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all completions together.

    Li et al. 2016 (arXiv:1510.03055).
    """
    ngrams = [
        tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)
    ]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
