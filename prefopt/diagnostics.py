"""What went wrong with a policy, in plain words: displacement and degeneration. Plain numpy.

Each figure stands beside the reference's own. A finding that is no longer fine says so in a
sentence, and names what is known to work against it, by the names of losses and run options.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

Level = Literal["fine", "watch", "alarm"]

# What is known to hold against each, as the keys and values of a run in params.yaml.
AGAINST_DISPLACEMENT = (
    "loss: dpop",
    "loss: cal_dpo",
    "loss: nca_pair",
    "divergence: squared_log",
    "divergence: forward_kl",
    "divergence: jensen_shannon",
    "sft_weight",
)
AGAINST_LENGTH = ("loss: r_dpo", "loss: ld_dpo", "loss: dpo_norm", "loss: simpo")
AGAINST_COLLAPSE = ("divergence: forward_kl", "divergence: jensen_shannon", "sft_weight")
AGAINST_DRIFT = ("learning_rate", "beta", "max_kl")


@dataclass(frozen=True)
class Finding:
    """One figure of a policy, and what it means.

    Args:
        name: of the figure.
        value: the policy's.
        reference: the reference policy's, or what it would be had nothing moved.
        level: `fine`, `watch` or `alarm`.
        sentence: the figure in words.
        remedies: what counters it; empty if it is fine.
    """

    name: str
    value: float
    reference: float
    level: Level
    sentence: str
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Moved:
    """The training pairs under a trained policy.

    Args:
        chosen: log-ratios u_w, nats.
        rejected: log-ratios u_l, nats.
        chosen_reference: log pi_ref(y_w|x), nats.
        rejected_reference: log pi_ref(y_l|x), nats.
        chosen_tokens: tokens of y_w.
        rejected_tokens: tokens of y_l.
    """

    chosen: Float[np.ndarray, " pairs"]
    rejected: Float[np.ndarray, " pairs"]
    chosen_reference: Float[np.ndarray, " pairs"]
    rejected_reference: Float[np.ndarray, " pairs"]
    chosen_tokens: Int[np.ndarray, " pairs"]
    rejected_tokens: Int[np.ndarray, " pairs"]


@dataclass(frozen=True)
class Written:
    """A policy's own completions of the evaluation prompts.

    Args:
        tokens: token ids of each.
        logp: log-probability of each under the policy that wrote it, nats.
        ended: whether each ended by itself, and was not cut.
    """

    tokens: Sequence[Sequence[int]]
    logp: Float[np.ndarray, " completions"]
    ended: Bool[np.ndarray, " completions"]

    @property
    def length(self) -> float:
        """Mean number of tokens."""
        return float(np.mean([len(row) for row in self.tokens]))

    @property
    def entropy(self) -> float:
        """Nats a token: the mean surprise of the policy at its own words."""
        return float(-self.logp.sum() / sum(map(len, self.tokens)))

    @property
    def repetition(self) -> float:
        """Share of 4-grams that their own completion had said before."""
        said = again = 0
        for row in self.tokens:
            grams = [tuple(row[i : i + 4]) for i in range(len(row) - 3)]
            said += len(grams)
            again += len(grams) - len(set(grams))
        return again / said if said else 0.0


def moved_off_both(moved: Moved) -> Float[np.ndarray, " pairs"]:
    """log of (pi(y_w) + pi(y_l)) / (pi_ref(y_w) + pi_ref(y_l)), nats: below 0, mass left both."""
    before = np.logaddexp(moved.chosen_reference, moved.rejected_reference)
    after = np.logaddexp(
        moved.chosen_reference + moved.chosen, moved.rejected_reference + moved.rejected
    )
    return after - before


def by_decile(
    values: Float[np.ndarray, " pairs"], by: Float[np.ndarray, " pairs"], num_groups: int = 10
) -> list[tuple[float, float]]:
    """Median of `by`, and median of `values`, in groups ordered by `by`.

    Groups are of equal size, but equal values of `by` stay together. Fewer pairs than groups give
    at most one group a pair.
    """
    _, place, counts = np.unique(by, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(counts) - (counts + 1) / 2)[place]
    group = (mean_rank * min(num_groups, len(by)) / len(by)).astype(int)
    return [
        (float(np.median(by[group == number])), float(np.median(values[group == number])))
        for number in np.unique(group)
    ]


def displacement_findings(moved: Moved) -> list[Finding]:
    """Whether the probabilities of chosen completions fell, and where the mass went."""
    both = float(((moved.chosen < 0) & (moved.rejected < 0)).mean())
    chosen = float((moved.chosen < 0).mean())
    mass = moved_off_both(moved)
    lost = float((mass < 0).mean())
    median = float(np.median(mass))
    factor = math.exp(median)
    left = f"{factor:.2g} times its mass" if factor >= 0.01 else "less than a hundredth of its mass"
    return [
        _graded(
            "both_fell",
            both,
            0.0,
            _above(both, watch=0.25, alarm=0.5),
            f"of {both:.0%} of the pairs both completions became less likely",
            AGAINST_DISPLACEMENT,
        ),
        _graded(
            "chosen_fell",
            chosen,
            0.0,
            _above(chosen, watch=0.4, alarm=0.6),
            f"{chosen:.0%} of the chosen completions became less likely",
            AGAINST_DISPLACEMENT,
        ),
        _graded(
            "moved_off_both",
            median,
            0.0,
            _above(lost, watch=0.5, alarm=0.75),
            f"{lost:.0%} of the pairs together lost mass to completions that nobody labelled; the "
            f"median pair has {left}",
            AGAINST_DISPLACEMENT,
        ),
    ]


def degeneration_findings(policy: Written, reference: Written) -> list[Finding]:
    """Whether the policy's own completions still look like a language model's."""
    entropy = policy.entropy / reference.entropy
    length = policy.length / reference.length
    excess = policy.repetition - reference.repetition
    ended, ended_before = float(policy.ended.mean()), float(reference.ended.mean())
    change = f"{abs(length - 1):.0%} {'longer' if length >= 1 else 'shorter'}"
    return [
        _graded(
            "entropy",
            policy.entropy,
            reference.entropy,
            _above(1 - entropy, watch=0.25, alarm=0.5),
            f"a token carries {policy.entropy:.2f} nats, the reference's {reference.entropy:.2f}",
            AGAINST_COLLAPSE,
        ),
        _graded(
            "repetition",
            policy.repetition,
            reference.repetition,
            _above(excess, watch=0.03, alarm=0.1),
            f"{policy.repetition:.1%} of 4-grams repeat within their completion, of the "
            f"reference's {reference.repetition:.1%}",
            AGAINST_COLLAPSE,
        ),
        _graded(
            "length",
            policy.length,
            reference.length,
            _above(abs(math.log(length)), watch=math.log(1.15), alarm=math.log(1.5)),
            f"completions have {policy.length:.1f} tokens, {change} than the reference's",
            AGAINST_LENGTH,
        ),
        _graded(
            "ended",
            ended,
            ended_before,
            _above(ended_before - ended, watch=0.1, alarm=0.25),
            f"{ended:.0%} of completions end by themselves, of the reference's {ended_before:.0%}",
            AGAINST_DRIFT,
        ),
    ]


def _above(value: float, *, watch: float, alarm: float) -> Level:
    if value > alarm:
        return "alarm"
    return "watch" if value > watch else "fine"


def _graded(
    name: str,
    value: float,
    reference: float,
    level: Level,
    sentence: str,
    remedies: tuple[str, ...],
) -> Finding:
    return Finding(name, value, reference, level, sentence, () if level == "fine" else remedies)
