"""Laws of the order of rows and of their cut into micro-batches."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.packing import Steps, micro_batches

quick = settings(deadline=None, derandomize=True)


@quick
@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 3), st.integers(0, 9))
def test_every_epoch_holds_every_row_once(
    num_rows: int, batch_size: int, num_epochs: int, seed: int
) -> None:
    steps = list(Steps(num_rows, batch_size, num_epochs, seed))
    rows = [row for step in steps for row in step]
    epochs = [rows[i : i + num_rows] for i in range(0, len(rows), num_rows)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(num_rows))] * num_epochs
    assert all(1 <= len(step) <= batch_size for step in steps)


def test_the_order_depends_on_the_seed_and_the_epoch_and_nothing_else() -> None:
    steps = Steps(50, 50, 2, seed=1)
    assert list(steps) == list(Steps(50, 50, 2, seed=1))
    assert steps[0] != steps[1]
    assert steps[0] != Steps(50, 50, 2, seed=2)[0]
    assert steps[0] == Steps(50, 50, 1, seed=1)[0]


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    in_order = list(Steps(20, 6, 3, seed=0))
    steps = Steps(20, 6, 3, seed=0)
    assert len(steps) == len(in_order) == 12
    for step in [11, 0, 5, 4, 11, 3]:
        assert steps[step] == in_order[step]
    for beyond in (12, -1):
        with pytest.raises(IndexError):
            steps[beyond]


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 100))
def test_micro_batches_hold_every_row_once_and_keep_the_budget(
    lengths: list[int], budget: int
) -> None:
    batches = list(micro_batches(range(len(lengths)), lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[row] for row in batch)
        assert padded <= budget or len(batch) == 1


def test_rows_of_like_length_lie_together() -> None:
    lengths = [9, 1, 9, 1, 9, 1]
    assert list(micro_batches(range(6), lengths, 27)) == [[1, 3, 5], [0, 2, 4]]


def test_a_row_beyond_the_budget_makes_its_own_micro_batch() -> None:
    assert list(micro_batches([0, 1, 2], [3, 50, 3], 6)) == [[0, 2], [1]]


def test_no_rows_make_no_micro_batch() -> None:
    assert list(micro_batches([], [], 10)) == []
