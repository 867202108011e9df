"""Reward against KL: what a budget of KL buys, by objectives swept over their strength.

A setting is an objective at one strength of its pull to the reference, trained with some seeds: a
point, its mean KL to the reference in nats a sequence and its mean reward. The frontier of an
objective is the most reward that its settings and the reference give within a budget of KL,

    F(k) = max { sum_i w_i reward_i : w a distribution, sum_i w_i KL_i <= k },

which is concave, never falls, and starts at the reference's reward. It can be had: toss a coin
with chances w and let that policy answer; KL is convex, so that the mixture spends no more. Left
of KL 0, where estimates may fall, is KL 0.

Uncertainty is a bootstrap over prompts and seeds. Prompts are drawn once for all settings and the
reference, which are compared on them; of a setting's n > 1 seeds n - 1 are drawn anew, whose mean
varies as much as that of n does (Rao and Wu 1988, JASA 83:231). Drawing both counts the variance
that belongs to a prompt and a seed together twice: intervals are rather too wide (Owen 2007, Ann.
Appl. Stat. 1:386). The greatest of noisy estimates is too great, the more so the more there are:
frontiers of as many settings each can be compared, and their heights are optimistic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from jaxtyping import Bool, Float, Integer

from prefopt.statistics.intervals import Estimate

NUM_BUDGETS = 20  # at which two frontiers are compared
AT_ONCE = 2_000_000  # values


@dataclass(frozen=True)
class Setting:
    """One sample a prompt of each training: KL in nats a sequence, and reward."""

    kl: Float[np.ndarray, "seeds prompts"]
    reward: Float[np.ndarray, "seeds prompts"]


@dataclass(frozen=True)
class Place:
    """Where a setting stands among all others and the reference.

    Args:
        kl: its mean, with its standard error.
        reward: its mean, with its standard error.
        on_front: no other has at least its reward with at most its KL, and one of them strictly.
        share: of the resamples in which that is so.
    """

    kl: Estimate
    reward: Estimate
    on_front: bool
    share: float


@dataclass(frozen=True)
class Curve:
    """A frontier with pointwise intervals of what it gains over the reference, and its area.

    Args:
        budgets: from 0 to the family's largest KL, nats a sequence.
        frontier: the most mean reward within each.
        low: the reference's reward and the least gain of the interval at each budget.
        high: the same with the greatest gain.
        gain: the area between the frontier and the reference's reward from KL 0 to the common KL,
            divided by that: the mean gain in reward over all budgets that all families reach.
    """

    budgets: list[float]
    frontier: list[float]
    low: list[float]
    high: list[float]
    gain: Estimate


@dataclass(frozen=True)
class Dominance:
    """Two frontiers over the budgets that both reach.

    Args:
        difference: of their gains, first less second.
        above: least and greatest budget at which the first is shown to be above, nats; or None.
        below: least and greatest at which it is shown to be below; or None.
        verdict: "a is above b", "they cross", or "no significant difference".
    """

    first: str
    second: str
    difference: Estimate
    above: tuple[float, float] | None
    below: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Frontiers:
    """All that was found.

    Args:
        common_kl: the largest KL that every family of two or more settings reaches; 0 without any.
        places: family -> setting -> place.
        curves: of the families of two or more settings.
        pairs: of those, in their order.
    """

    common_kl: float
    places: dict[str, dict[str, Place]]
    curves: dict[str, Curve]
    pairs: list[Dominance]


def frontier(
    kl: Float[np.ndarray, "many points"],
    reward: Float[np.ndarray, "many points"],
    budgets: Float[np.ndarray, "many budgets"],
) -> Float[np.ndarray, "many budgets"]:
    """F of the points at each budget, which is at least the least KL.

    The maximum is that of one point within the budget, or of two, one on each side of it.
    """
    kl, reward, k = kl[:, None, :, None], reward[:, None, :, None], budgets[:, :, None, None]
    farther, theirs = np.swapaxes(kl, 2, 3), np.swapaxes(reward, 2, 3)
    within, beyond = kl <= k, farther > k
    share = np.where(beyond, k - kl, 0.0) / np.where(within & beyond, farther - kl, 1.0)
    mixed = np.where(within, reward + share * np.maximum(theirs - reward, 0.0), -np.inf)
    return mixed.max((2, 3))


def mean_gain(
    kl: Float[np.ndarray, "many points"],
    reward: Float[np.ndarray, "many points"],
    origin: Float[np.ndarray, " many"],
    up_to: float,
) -> Float[np.ndarray, " many"]:
    """The mean over budgets in [0, up_to] of F less the reference's reward, exactly.

    Args:
        kl: of the points, without the reference.
        reward: of the points.
        origin: the reference's reward, at KL 0.
        up_to: nats, more than 0.
    """
    kl, reward = _with_origin(kl, reward, origin)
    ends = np.full((len(kl), 1), up_to)
    # F is straight between neighbouring points.
    budgets = np.sort(np.concatenate([np.minimum(kl, up_to), ends], axis=1), axis=1)
    heights = _in_blocks(kl, reward, budgets) - origin[:, None]
    widths = np.diff(budgets, axis=1)
    return (widths * (heights[:, 1:] + heights[:, :-1]) / 2).sum(1) / up_to


def on_front(
    kl: Float[np.ndarray, "many points"], reward: Float[np.ndarray, "many points"]
) -> Bool[np.ndarray, "many points"]:
    """Pareto: no other point has at least the reward with at most the KL, and one of them strictly.

    Of equal points all are or none is.
    """
    mine, theirs = (kl[:, :, None], reward[:, :, None]), (kl[:, None], reward[:, None])
    no_worse = (theirs[0] <= mine[0]) & (theirs[1] >= mine[1])
    better = (theirs[0] < mine[0]) | (theirs[1] > mine[1])
    beaten = np.asarray(no_worse & better)
    return np.logical_not(beaten.any(axis=2))


def compare_frontiers(
    families: Mapping[str, Mapping[str, Setting]],
    origin: Float[np.ndarray, " prompts"],
    *,
    seed: int,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> Frontiers:
    """Every setting's place, every family's frontier, and every two frontiers compared.

    Two frontiers differ where a band around their difference, simultaneous over 20 budgets up to
    the common KL and over all pairs (Bonferroni's correction), excludes 0. A frontier that is
    above at some budgets and below at none is above; it need not be so at every budget.

    Args:
        families: objective -> strength -> setting, all on the same prompts in the same order.
        origin: the reference's reward on them.
        seed: of the resamples.
        num_resamples: at least 2.
        level: of the intervals; 1 - level is the level of significance.

    Raises:
        ValueError: if settings are of other prompts than the reference, or of fewer than two.
    """
    from scipy.special import ndtri

    settings = [setting for family in families.values() for setting in family.values()]
    for family, members in families.items():
        for name, setting in members.items():
            if setting.kl.shape[1] != len(origin) or len(origin) < 2:
                raise ValueError(
                    f"frontier of '{family}', {name or 'its only setting'}: other prompts than "
                    f"the reference's, or fewer than two, got {setting.kl.shape[1]} against "
                    f"{len(origin)}; run `dvc repro`"
                )
    origins, kl, reward = _resampled(settings, origin, seed, num_resamples)
    z = float(ndtri((1 + level) / 2))

    def estimate(values: Float[np.ndarray, " resamples"]) -> Estimate:
        """The first is of the data themselves."""
        value, error = float(values[0]), float(values[1:].std(ddof=1))
        return Estimate(value, value - z * error, value + z * error, error)

    zero = np.zeros((len(kl), 1))
    member = on_front(
        np.concatenate([kl, zero], axis=1), np.concatenate([reward, origins[:, None]], axis=1)
    )
    starts = np.cumsum([0, *(len(family) for family in families.values())])
    columns = {
        name: range(*ends) for name, ends in zip(families, pairwise(starts.tolist()), strict=True)
    }
    places = {
        family: {
            name: Place(
                kl=estimate(kl[:, column]),
                reward=estimate(reward[:, column]),
                on_front=bool(member[0, column]),
                share=float(member[1:, column].mean()),
            )
            for name, column in zip(families[family], columns[family], strict=True)
        }
        for family in families
    }
    swept = {family: list(found) for family, found in columns.items() if len(found) > 1}
    common = min((float(kl[0, found].max()) for found in swept.values()), default=0.0)
    if common <= 0:
        return Frontiers(0.0, places, {}, [])
    gains = {
        family: mean_gain(kl[:, found], reward[:, found], origins, common)
        for family, found in swept.items()
    }

    def heights(
        family: str, up_to: float, count: int
    ) -> tuple[Float[np.ndarray, " budgets"], Float[np.ndarray, "resamples budgets"]]:
        found = swept[family]
        budgets = np.linspace(0, up_to, count + 1)
        points = _with_origin(kl[:, found], reward[:, found], origins)
        return budgets, _in_blocks(*points, np.broadcast_to(budgets, (len(kl), count + 1)))

    curves: dict[str, Curve] = {}
    for family, found in swept.items():
        budgets, values = heights(family, float(kl[0, found].max()), 2 * NUM_BUDGETS)
        half = z * (values - origins[:, None])[1:].std(0, ddof=1)
        curves[family] = Curve(
            budgets=budgets.tolist(),
            frontier=values[0].tolist(),
            low=(values[0] - half).tolist(),
            high=(values[0] + half).tolist(),
            gain=estimate(gains[family]),
        )
    within = {family: heights(family, common, NUM_BUDGETS) for family in swept}
    names = list(combinations(swept, 2))
    pairs = [
        _dominance(
            first,
            second,
            estimate(gains[first] - gains[second]),
            within[first][0][1:],
            (within[first][1] - within[second][1])[:, 1:],
            (1 - level) / len(names),
        )
        for first, second in names
    ]
    return Frontiers(common, places, curves, pairs)


def _dominance(
    first: str,
    second: str,
    difference: Estimate,
    budgets: Float[np.ndarray, " budgets"],
    differences: Float[np.ndarray, "resamples budgets"],
    alpha: float,
) -> Dominance:
    observed, drawn = differences[0], differences[1:]
    error = drawn.std(0, ddof=1)
    deviation = np.abs(drawn - observed) / np.where(error > 0, error, np.inf)
    half = float(np.quantile(deviation.max(1), 1 - alpha)) * error
    above, below = observed > half, observed < -half

    def between(shown: Bool[np.ndarray, " budgets"]) -> tuple[float, float] | None:
        return (float(budgets[shown].min()), float(budgets[shown].max())) if shown.any() else None

    match bool(above.any()), bool(below.any()):
        case True, False:
            verdict = f"{first} is above {second}"
        case False, True:
            verdict = f"{second} is above {first}"
        case True, True:
            verdict = "they cross"
        case _:
            verdict = "no significant difference"
    return Dominance(first, second, difference, between(above), between(below), verdict)


def _resampled(
    settings: Sequence[Setting],
    origin: Float[np.ndarray, " prompts"],
    seed: int,
    num_resamples: int,
) -> tuple[
    Float[np.ndarray, " resamples"],
    Float[np.ndarray, "resamples settings"],
    Float[np.ndarray, "resamples settings"],
]:
    """The reference's reward, and KL and reward of each setting: of the data, then resampled."""
    generator = np.random.default_rng(seed)
    count = len(origin)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=num_resamples) / count
    weights = np.concatenate([np.full((1, count), 1 / count), drawn])
    kl, reward = np.zeros((2, num_resamples + 1, len(settings)))
    for column, setting in enumerate(settings):
        of_seeds = _seeds(len(setting.kl), num_resamples, generator)
        for found, values in ((kl, setting.kl), (reward, setting.reward)):
            found[:, column] = ((weights @ values.T) * of_seeds).sum(1)
    return weights @ origin, np.maximum(kl, 0.0), reward


def _seeds(
    count: int, num_resamples: int, generator: np.random.Generator
) -> Float[np.ndarray, "resamples seeds"]:
    """The weights of a setting's trainings: all alike, then of count - 1 that are drawn."""
    size = max(count - 1, 1)
    drawn: Integer[np.ndarray, "resamples seeds"] = generator.multinomial(
        size, np.full(count, 1 / count), size=num_resamples
    )
    return np.concatenate([np.full((1, count), 1 / count), drawn / size])


def _with_origin(
    kl: Float[np.ndarray, "many points"],
    reward: Float[np.ndarray, "many points"],
    origin: Float[np.ndarray, " many"],
) -> tuple[Float[np.ndarray, "many all"], Float[np.ndarray, "many all"]]:
    zero = np.zeros((len(kl), 1))
    return (
        np.concatenate([zero, np.maximum(kl, 0.0)], axis=1),
        np.concatenate([origin[:, None], reward], axis=1),
    )


def _in_blocks(
    kl: Float[np.ndarray, "many points"],
    reward: Float[np.ndarray, "many points"],
    budgets: Float[np.ndarray, "many budgets"],
) -> Float[np.ndarray, "many budgets"]:
    """`frontier` of a few at a time: it holds budgets times points squared values of each."""
    size = max(1, AT_ONCE // (budgets.shape[1] * kl.shape[1] ** 2))
    return np.concatenate(
        [
            frontier(kl[start : start + size], reward[start : start + size], cut)
            for start in range(0, len(kl), size)
            for cut in [budgets[start : start + size]]
        ]
    )
