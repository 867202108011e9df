"""Laws of the frontier of reward against KL, and how often its verdicts are wrong."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.statistics.frontier import (
    Frontiers,
    Setting,
    compare_frontiers,
    frontier,
    mean_gain,
    on_front,
)

points = st.lists(
    st.tuples(st.floats(0, 20), st.floats(-1, 1)), min_size=1, max_size=6, unique=True
)
law = settings(deadline=None, derandomize=True, max_examples=60)


def rows(found: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    kl, reward = np.array(found).T[:, None, :]
    return kl, reward


def at(found: list[tuple[float, float]], budgets: np.ndarray) -> np.ndarray:
    """The frontier of points and of a reference with reward 0."""
    kl, reward = rows([(0.0, 0.0), *found])
    return frontier(kl, reward, budgets[None])[0]


def area(found: list[tuple[float, float]], up_to: float) -> float:
    return float(mean_gain(*rows(found), np.zeros(1), up_to)[0]) * up_to


BUDGETS = np.linspace(0, 25, 101)


@law
@given(points)
def test_a_frontier_is_concave_never_falls_and_lies_above_its_points(
    found: list[tuple[float, float]],
) -> None:
    heights = at(found, BUDGETS)
    assert heights[0] >= 0.0
    assert (np.diff(heights) >= -1e-12).all()
    assert (np.diff(heights, 2) <= 1e-9).all()
    for kl, reward in found:
        assert at(found, np.array([kl]))[0] >= reward - 1e-12
    assert heights.max() <= max(0.0, *(reward for _, reward in found)) + 1e-12


@law
@given(points, st.randoms(use_true_random=False))
def test_the_order_of_points_and_what_lies_below_change_nothing(
    found: list[tuple[float, float]], source: Any
) -> None:
    shuffled = source.sample(found, len(found))
    assert np.allclose(at(shuffled, BUDGETS), at(found, BUDGETS), rtol=0, atol=1e-12)
    assert area(shuffled, 7.0) == pytest.approx(area(found, 7.0), abs=1e-12)
    below = [(kl + 0.5, reward - 0.1) for kl, reward in found]
    assert np.allclose(at(found + below, BUDGETS), at(found, BUDGETS), rtol=0, atol=1e-12)


@law
@given(points, st.floats(0.5, 20))
def test_the_area_is_the_integral(found: list[tuple[float, float]], up_to: float) -> None:
    grid = np.linspace(0, up_to, 4001)
    one_cell = up_to / 4000  # a rise of at most 1 may lie anywhere within one
    assert area(found, up_to) == pytest.approx(np.trapezoid(at(found, grid), grid), abs=one_cell)


def test_known_areas() -> None:
    assert area([(4.0, 0.5)], 4.0) == pytest.approx(4 * 0.5 / 2)  # a triangle
    assert area([(4.0, 0.5)], 6.0) == pytest.approx(4 * 0.5 / 2 + 2 * 0.5)  # and a rectangle
    assert area([(4.0, 0.5)], 2.0) == pytest.approx(2 * 0.25 / 2)  # a smaller triangle
    assert area([(1.0, 0.5), (3.0, 0.7)], 3.0) == pytest.approx(0.25 + 2 * 0.6)
    # The middle point lies below the line through the others, the last has spent KL for nothing.
    assert area([(1.0, 0.1), (2.0, 0.8), (3.0, 0.2)], 3.0) == pytest.approx(0.8 + 0.8)
    assert area([(1.0, -0.5)], 3.0) == 0.0  # the reference is never worse than itself
    # Estimates left of the reference count as at KL 0.
    assert float(mean_gain(*rows([(-0.1, 0.2)]), np.zeros(1), 3.0)[0]) == pytest.approx(0.2)


def test_the_front_has_those_that_no_other_beats() -> None:
    kl, reward = rows([(0, 0), (1, 0.5), (2, 0.4), (3, 0.6), (3, 0.5), (0.5, -0.1), (1, 0.5)])
    assert on_front(kl, reward)[0].tolist() == [True, True, False, True, False, False, True]


def drawn(
    source: np.random.Generator, mean: float, kl: float, *, seeds: int = 3, prompts: int = 100,
    of_seeds: float = 0.02,
) -> Setting:  # fmt: skip
    """Rewards of prompts that differ, by seeds that differ."""
    shift = of_seeds * source.standard_normal((seeds, 1))
    rewards = mean + shift + 0.5 * source.standard_normal((seeds, prompts))
    return Setting(kl + 2 * source.standard_normal((seeds, prompts)), rewards)


def compared(
    source: np.random.Generator, lift: float, *, of: int = 3, against: int = 3, **sizes: Any
) -> Frontiers:
    """Two families along reward = sqrt(KL) / 6, the first lifted."""

    def family(count: int, lift: float) -> dict[str, Setting]:
        return {
            str(kl): drawn(source, kl**0.5 / 6 + lift, float(kl), **sizes)
            for kl in np.linspace(2, 10, count)
        }

    origin = 0.5 * source.standard_normal(sizes.get("prompts", 100))
    return compare_frontiers(
        {"a": family(of, lift), "b": family(against, 0.0)}, origin, seed=0, num_resamples=300
    )


def test_a_dominated_family_is_shown_to_be_and_the_order_of_families_changes_no_verdict() -> None:
    found = compared(np.random.default_rng(0), 0.25)
    (pair,) = found.pairs
    assert pair.verdict == "a is above b"
    assert pair.below is None
    assert pair.above is not None
    assert 0 < pair.above[0] < pair.above[1] <= found.common_kl
    assert pair.difference.low > 0
    # Nothing is gained without KL, and of that we are sure.
    assert all(c.low[0] == c.frontier[0] == c.high[0] for c in found.curves.values())
    assert all(c.low[-1] < c.frontier[-1] < c.high[-1] for c in found.curves.values())
    gains = [found.curves[name].gain.value for name in ("a", "b")]
    assert pair.difference.value == pytest.approx(gains[0] - gains[1])
    source = np.random.default_rng(1)
    families = {
        name: {str(kl): drawn(source, 0.1 * kl + lift, kl) for kl in (1.0, 3.0)}
        for name, lift in (("a", 0.3), ("b", 0.0))
    }
    origin = np.zeros(100)
    one = compare_frontiers(families, origin, seed=0, num_resamples=300)
    other = compare_frontiers(dict(reversed(families.items())), origin, seed=0, num_resamples=300)
    assert one.pairs[0].verdict == other.pairs[0].verdict == "a is above b"
    assert one.pairs[0].difference.value == pytest.approx(-other.pairs[0].difference.value)
    assert one.common_kl == other.common_kl


def test_frontiers_may_cross() -> None:
    source = np.random.default_rng(0)
    early = {"1": drawn(source, 0.5, 1.0), "2": drawn(source, 0.5, 9.0)}
    late = {"1": drawn(source, 0.0, 1.0), "2": drawn(source, 0.9, 9.0)}
    found = compare_frontiers(
        {"early": early, "late": late}, np.zeros(100), seed=0, num_resamples=300
    )
    (pair,) = found.pairs
    assert pair.verdict == "they cross"
    assert pair.above is not None
    assert pair.below is not None
    assert pair.above[1] < pair.below[0]


def test_a_family_beside_itself_does_not_differ() -> None:
    source = np.random.default_rng(0)
    family = {"1": drawn(source, 0.3, 2.0), "2": drawn(source, 0.5, 6.0)}
    noise = {"1": drawn(source, 0.3, 2.0), "2": drawn(source, 0.5, 6.0)}
    found = compare_frontiers({"a": family, "b": noise}, np.zeros(100), seed=0, num_resamples=300)
    assert found.pairs[0].verdict == "no significant difference"
    assert found.pairs[0].difference.low < 0 < found.pairs[0].difference.high


@pytest.mark.parametrize(("of", "against"), [(4, 4), (4, 2)])
def test_equal_frontiers_are_seldom_told_apart(of: int, against: int) -> None:
    source = np.random.default_rng(0)
    found = [compared(source, 0.0, of=of, against=against, prompts=60) for _ in range(60)]
    wrong = sum(one.pairs[0].verdict != "no significant difference" for one in found)
    assert wrong <= 6  # 10 %: of a true 5 % one in 30 such tests has more


def test_seeds_that_differ_widen_the_interval() -> None:
    errors = [
        compared(np.random.default_rng(0), 0.0, of_seeds=spread).curves["a"].gain.standard_error
        for spread in (0.0, 0.3)
    ]
    assert errors[1] > 2 * errors[0]


def test_one_setting_has_a_place_and_no_frontier() -> None:
    source = np.random.default_rng(0)
    alone = {"only": {"": drawn(source, 0.9, 3.0, seeds=1)}, "worse": {"": drawn(source, -0.5, 4)}}
    found = compare_frontiers(alone, np.zeros(100), seed=0, num_resamples=300)
    assert (found.common_kl, found.curves, found.pairs) == (0.0, {}, [])
    best, worse = found.places["only"][""], found.places["worse"][""]
    assert (best.on_front, worse.on_front) == (True, False)
    assert best.share == 1.0 > worse.share == 0.0
    # Of one training the bootstrap's standard error is that of a mean over prompts.
    rewards = alone["only"][""].reward[0]
    assert best.reward.standard_error == pytest.approx(rewards.std() / 10, rel=0.15)


def test_other_prompts_are_refused() -> None:
    setting = drawn(np.random.default_rng(0), 0.5, 1.0)
    with pytest.raises(ValueError, match="frontier of 'a', beta 1: other prompts than the"):
        compare_frontiers({"a": {"beta 1": setting}}, np.zeros(99), seed=0)
