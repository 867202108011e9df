"""Laws of the figures of a run."""

import numpy as np

from prefopt.metrics import displacement, distinct


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
