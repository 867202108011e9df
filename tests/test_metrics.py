"""Laws of the figures of a run."""

import math

import numpy as np
import pytest

from prefopt.metrics import bootstrap, displacement, distinct, points


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_claims() -> None:
    generator = np.random.default_rng(0)
    truth, trials = 0.6, 400
    covered = 0
    for trial in range(trials):
        wins = (generator.random(200) < truth).astype(float)
        estimate = bootstrap(wins, seed=trial, num_resamples=1000)
        covered += estimate.low <= truth <= estimate.high
    # Three standard errors of a share of 0.95 in 400 trials, and the percentile interval's bias.
    assert abs(covered / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials) + 0.01


def test_the_bootstrap_interval_is_about_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 1000)
    estimate = bootstrap(values, seed=0)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert estimate.value == values.mean()
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_a_bootstrap_is_a_function_of_its_seed() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


@pytest.mark.parametrize("num_resamples", [1, 999, 1000, 1001])
def test_any_number_of_resamples_is_filled(num_resamples: int) -> None:
    estimate = bootstrap(np.ones(5), seed=0, num_resamples=num_resamples)
    assert (estimate.low, estimate.value, estimate.high) == (1.0, 1.0, 1.0)


def test_a_lower_level_is_a_narrower_interval() -> None:
    values = np.random.default_rng(0).normal(size=100)
    wide, narrow = (bootstrap(values, seed=0, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_mean_of_points_is_the_win_rate_with_ties_as_halves() -> None:
    verdicts = ["policy"] * 3 + ["tie"] * 2 + ["opponent"] * 5
    assert points(verdicts).mean() == (3 + 2 / 2) / 10


def test_a_verdict_that_is_none_is_refused() -> None:
    with pytest.raises(KeyError, match="unparsed"):
        points(["policy", "unparsed"])


def test_displacement_counts_what_fell() -> None:
    found = displacement(np.array([-1.0, -2.0, 3.0, 0.0]), np.array([-5.0, 1.0, -1.0, -2.0]))
    assert found.chosen_fell == 2 / 4
    assert found.both_fell == 1 / 4
    assert found.median_chosen == (-1.0 + 0.0) / 2
    assert found.median_rejected == (-2.0 + -1.0) / 2


def test_nothing_is_displaced_at_the_reference() -> None:
    found = displacement(np.zeros(4), np.zeros(4))
    assert (found.chosen_fell, found.both_fell, found.median_chosen) == (0, 0, 0)


def test_distinct_is_the_share_of_different_n_grams_over_all_completions() -> None:
    # Bigrams 12 23 31 12 | 12 23: three different ones of six.
    assert distinct([[1, 2, 3, 1, 2], [1, 2, 3]], 2) == 3 / 6
    assert distinct([[1, 2, 3, 1, 2], [1, 2, 3]], 1) == 3 / 8


def test_n_grams_do_not_cross_completions() -> None:
    assert distinct([[1], [2]], 2) == 0.0
    assert distinct([[1, 2], [2, 1]], 2) == 1.0
