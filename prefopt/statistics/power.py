"""How many prompts an evaluation needs, and what it can see. Standard library alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

USUAL_SIZES = (50, 100, 256, 500, 1000, 2000)


@dataclass(frozen=True)
class Design:
    """An evaluation that has one verdict a prompt.

    Args:
        ties: the share of verdicts that are ties.
        alpha: the two-sided level of significance.
        power: the probability of seeing the effect, if it is there.
        correlation: of two runs' points on the same prompt; None for one run.
        rate: the weaker run's win rate over the opponent that both have; for one run what it is
            tested against.
    """

    ties: float = 0.0
    alpha: float = 0.05
    power: float = 0.8
    correlation: float | None = None
    rate: float = 0.5

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("alpha", self.alpha, 0.0, 1.0),
            ("power", self.power, self.alpha, 1.0),
            ("rate", self.rate, 0.0, 1.0),
        ):
            if not low < value < high:
                raise ValueError(
                    f"{name}: out of range, got {value:g}; between {low:g} and {high:g}"
                )
        if not 0 <= self.ties < 1:
            raise ValueError(f"ties: a share of the verdicts, got {self.ties:g}; 0 to below 1")
        if self.correlation is not None and not -1 < self.correlation < 1:
            raise ValueError(
                f"correlation: out of range, got {self.correlation:g}; between -1 and 1"
            )

    @property
    def largest_effect(self) -> float:
        """What a win rate can be above `rate` when this share of verdicts are ties."""
        return 1 - self.ties / 2 - self.rate


def variance(rate: float, ties: float) -> float:
    """Of one verdict's points: wins with probability rate - ties/2 give 1, ties 1/2."""
    return rate - ties / 4 - rate**2


def prompts_needed(effect: float, design: Design) -> int:
    """Prompts for a two-sided test to find a true effect with the design's power.

    n = ((z_(1 - alpha/2) s_0 + z_power s_1) / effect)^2, s_0 and s_1 the standard deviations of
    one prompt's points without and with the effect: Lachin 1981 (Controlled Clin. Trials 2:93).
    For a paired difference both are that of the difference,
    s^2 = s_a^2 + s_b^2 - 2 correlation s_a s_b.

    Raises:
        ValueError: if no win rate is so far above the design's.
    """
    if not 0 < effect < design.largest_effect:
        raise ValueError(
            f"effect: out of range, got {effect:g}; above 0 and, with {design.ties:g} of ties and "
            f"a rate of {design.rate:g}, below {design.largest_effect:g}"
        )
    return math.ceil(_prompts(effect, design))


def detectable_effect(num_prompts: int, design: Design) -> float | None:
    """The least effect that so many prompts find with the design's power; None if there is none."""
    if num_prompts < 2:
        raise ValueError(f"prompts: too few, got {num_prompts}; two are needed")
    low, high = 0.0, design.largest_effect
    if _prompts(high, design) > num_prompts:
        return None
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _prompts(middle, design) > num_prompts else (low, middle)
    return high


def _prompts(effect: float, design: Design) -> float:
    if effect == 0:
        return math.inf
    normal = NormalDist()
    significance, power = normal.inv_cdf(1 - design.alpha / 2), normal.inv_cdf(design.power)
    before = math.sqrt(max(0.0, variance(design.rate, design.ties)))
    after = math.sqrt(max(0.0, variance(design.rate + effect, design.ties)))
    if design.correlation is not None:
        shared = 2 * design.correlation * before * after
        before = after = math.sqrt(max(0.0, before**2 + after**2 - shared))
    return ((significance * before + power * after) / effect) ** 2


def report(effect: float, design: Design, sizes: Sequence[int]) -> str:
    """Prompts for an effect, and effects for numbers of prompts, in words.

    Args:
        effect: above the design's rate.
        design: the evaluation.
        sizes: numbers of prompts of interest; usual ones if there are none.
    """
    needed = prompts_needed(effect, design)
    question = (
        f"to see a win rate of {design.rate + effect:g} against {design.rate:g}"
        if design.correlation is None
        else f"to tell runs of win rates {design.rate + effect:g} and {design.rate:g} apart "
        f"(points correlated {design.correlation:g})"
    )
    lines = [
        f"{needed} prompts {question}: power {design.power:g}, two-sided alpha "
        f"{design.alpha:g}, ties {design.ties:.0%}",
        "",
        "prompts  least effect seen",
    ]
    for size in sizes or USUAL_SIZES:
        seen = detectable_effect(size, design)
        lines.append(f"{size:7d}  {'none' if seen is None else f'{seen:.3f}'}")
    return "\n".join(lines)
