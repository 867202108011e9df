"""A step is cheaper than TRL's, and the benchmark's page shows the benchmark's results."""

import json
from typing import Any

import pytest
import torch
from conftest import PROJECT

from benchmarks import costs
from benchmarks.arms import Settings
from benchmarks.data import HH, TLDR, examples
from benchmarks.report import END, README, SAMPLING_START, START, sampling_tables, tables
from benchmarks.steps import (
    LOSS_TOLERANCE,
    MEMORY_ROUNDS,
    NORM_TOLERANCE,
    TINY,
    Table,
    measure,
)
from prefopt.costs import necessary, useful_tokens
from prefopt.packing import packed, slots_of

AGAINST_TRL = Table("hh", "HH", TINY, HH, ("trl", "packed"), prompts=4, rounds=3)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(AGAINST_TRL, Settings(torch.device("cpu"), torch.float32))
    finally:
        torch.set_num_threads(threads)


def test_a_step_takes_less_time_than_trls_at_its_best(measured: dict[str, Any]) -> None:
    ours, theirs = (sum(measured["arms"][arm]["compute_seconds"]) for arm in ("packed", "trl"))
    assert ours / theirs < 0.75


def test_a_step_takes_less_memory_than_trls_at_its_best(measured: dict[str, Any]) -> None:
    for ours, theirs in zip(
        *(measured["arms"][arm]["memory_bytes"] for arm in ("packed", "trl")), strict=True
    ):
        assert ours < theirs


def test_both_make_the_same_loss_and_gradients(measured: dict[str, Any]) -> None:
    for arm in measured["arms"].values():
        assert arm["loss_deviation"] <= LOSS_TOLERANCE
        assert arm["norm_deviation"] <= NORM_TOLERANCE


def test_slots_are_those_of_the_formula(measured: dict[str, Any]) -> None:
    batches = AGAINST_TRL.batches(seed=0)[MEMORY_ROUNDS:]
    sums = [
        sum(
            len(example.rows[0].prompt) + sum(len(row.completion) - 1 for row in example.rows)
            for example in batch
        )
        for batch in batches
    ]
    laid = [packed([row for example in batch for row in example.rows]) for batch in batches]
    assert [len(layout.tokens) for layout in laid] == sums
    assert measured["arms"]["packed"]["slots"] == sums
    longest = [max(map(len, batch)) for batch in batches]
    assert measured["arms"]["trl"]["slots"] == [2 * 4 * time for time in longest]


def test_costs_are_those_of_the_layouts() -> None:
    batch = examples(TLDR, 3, completions=4, vocab_size=4096, seed=1)
    rows = [row for example in batch for row in example.rows]
    assert costs.packed(batch).slots == slots_of(rows)
    assert useful_tokens(rows) == slots_of(rows) + len(rows)
    lines = [
        (int(first), int(1 + line[1:].count_nonzero()))
        for tile in packed(rows).tiles
        for line, first in zip(
            tile.keys, [0] * len(tile.keys) if tile.first is None else tile.first, strict=True
        )
    ]
    pairs = sum(end * (end + 1) // 2 - first * (first + 1) // 2 for first, end in lines)
    assert costs.packed(batch).attended == pairs
    alone = sum(len(row) * (len(row) - 1) // 2 for row in rows)
    prompts = sum(len(e.rows[0].prompt) * (len(e.rows[0].prompt) + 1) // 2 for e in batch)
    assert necessary(rows).attended == alone - 3 * prompts
    assert (
        costs.padded(batch).scored
        == costs.packed(batch).scored
        == sum(len(row.completion) for row in rows)
    )


def test_the_page_shows_the_results() -> None:
    results = json.loads((PROJECT / "benchmarks/results/cpu.json").read_text())
    text = README.read_text()
    sampling = json.loads((PROJECT / "benchmarks/results/generation-cpu.json").read_text())
    for start, shown in ((START, tables(results)), (SAMPLING_START, sampling_tables(sampling))):
        assert text.split(start)[1].split(END)[0] == shown
