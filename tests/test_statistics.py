"""Laws of the statistics of verdicts."""

import json
import math

import numpy as np
import pytest
from conftest import PROJECT
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from benchmarks.coverage import (
    CLAIMED,
    DESIGNS,
    PAGE,
    RESULTS,
    TOLERATED,
    TOLERATED_OVER,
    measure,
    outside,
    page,
)
from prefopt.statistics.comparison import compare, sign_flip
from prefopt.statistics.correction import corrected_win_rate
from prefopt.statistics.intervals import Estimate, cells, points, squared_half_width, win_rate
from prefopt.statistics.length import length_controlled
from prefopt.statistics.power import Design, detectable_effect, prompts_needed, variance
from prefopt.statistics.ratings import Games, ratings
from stages.families import families

NO_DIFFERENCE = "no significant difference"


def of(verdicts: str) -> list[str]:
    words = {"w": "policy", "t": "tie", "l": "opponent", "?": "unparsed"}
    return [words[letter] for letter in verdicts]


def drawn(rate: float, count: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < rate).astype(float)


# Win rates


def test_a_win_rate_counts_ties_as_halves() -> None:
    found = win_rate(points(of("wwwttlllll")), np.arange(10))
    assert found.value == pytest.approx((3 + 2 / 2) / 10)
    assert found.low < found.value < found.high


def test_an_unknown_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'policyy'"):
        points(["policy", "policyy"])


@pytest.mark.parametrize("wins", [1, 130, 256])
def test_of_plain_wins_the_interval_is_about_wilsons(wins: int) -> None:
    found = win_rate(np.repeat([1.0, 0.0], [wins, 256 - wins]), np.arange(256))
    low, high = proportion_confint(wins, 256, method="wilson")
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)


def test_verdicts_repeated_on_the_same_prompts_narrow_nothing() -> None:
    values = drawn(0.6, 60)
    once = win_rate(values, np.arange(60))
    often = win_rate(np.repeat(values, 8), np.repeat(np.arange(60), 8))
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))
    alone = win_rate(np.repeat(values, 8), np.arange(480))
    assert alone.high - alone.low < 0.5 * (often.high - often.low)


def test_every_prompt_counts_the_same_however_often_it_was_judged() -> None:
    assert win_rate(points(of("wwwl")), np.array([0, 0, 0, 1])).value == 0.5


def test_seeds_that_differ_widen_the_interval() -> None:
    prompts, seeds = np.tile(np.arange(200), 3), np.repeat(np.arange(3), 200)
    equal = np.concatenate([drawn(0.6, 200, seed) for seed in range(3)])
    apart = np.concatenate([drawn(p, 200, seed) for seed, p in enumerate((0.4, 0.6, 0.8))])
    narrow, wide = (win_rate(values, prompts, seeds) for values in (equal, apart))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_missing_verdicts_are_counted_and_bound_the_win_rate() -> None:
    found = win_rate(points(of("wwl?w?")), np.arange(6))
    assert (found.missing, found.num_prompts, found.value) == (2, 4, 3 / 4)
    assert (found.worst, found.best) == pytest.approx((3 / 6, 5 / 6))


def test_equal_verdicts_claim_no_certainty() -> None:
    for verdicts in ("t" * 50, "w" * 50):
        found = win_rate(points(of(verdicts)), np.arange(50))
        assert found.high - found.low > 1 / 50


def test_cells_are_means_by_seed_and_prompt() -> None:
    found = cells(np.array([1.0, 0.0, 0.5, np.nan]), np.array([7, 7, 7, 9]), np.array([1, 1, 0, 0]))
    np.testing.assert_equal(found, [[0.5, np.nan], [0.5, np.nan]])


def test_squared_half_widths_add_and_what_has_no_degrees_adds_none() -> None:
    one = np.ones(1)
    assert squared_half_width([(one, 2), (one, 0)], 0.95)[0] == pytest.approx(4.302653**2, rel=1e-6)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="too few prompts with verdicts, got 1"):
        win_rate(points(of("w?")), np.arange(2))


# Coverage


def test_intervals_cover_what_they_claim() -> None:
    count = 400
    found = measure(count, designs=(DESIGNS[0], DESIGNS[3]), sizes=(50, 256))
    # Four standard errors beside what the benchmark tolerates.
    slack = TOLERATED + 4 * math.sqrt(CLAIMED * (1 - CLAIMED) / count)
    for cell in found["cells"]:
        assert cell["coverage"] > CLAIMED - slack, cell
    clustered = [c["coverage"] for c in found["cells"] if len(c["truths"]) == 1]
    assert abs(np.mean(clustered) - CLAIMED) < 0.02


def test_the_committed_coverage_is_within_what_is_tolerated_and_its_page_is_generated() -> None:
    results = json.loads((PROJECT / RESULTS).read_text())
    assert results["simulations"] >= 2000
    assert outside(results) == []
    assert PAGE.read_text() == page(results)


@pytest.mark.parametrize(("truths", "most"), [([0.6], TOLERATED), ([0.95, 0.97], TOLERATED_OVER)])
def test_a_win_rate_and_a_difference_may_not_cover_less_or_much_more_than_they_claim(
    truths: list[float], most: float
) -> None:
    within = [CLAIMED - TOLERATED, CLAIMED, CLAIMED + most]
    beyond = [CLAIMED - TOLERATED - 1e-4, CLAIMED + most + 1e-4]
    cells = [{"truths": truths, "coverage": coverage} for coverage in [*within, *beyond]]
    assert [cell["coverage"] for cell in outside({"cells": cells})] == beyond


def test_the_page_names_the_differences_that_cover_more_than_a_win_rate_may() -> None:
    results = json.loads((PROJECT / RESULTS).read_text())
    said = page(results)
    assert "Of 64 differences 2 cover more than 0.97: 0.95 against 0.97 on 50 prompts" in said
    narrower = [cell | {"coverage": min(cell["coverage"], 0.97)} for cell in results["cells"]]
    assert "cover more than" not in page(results | {"cells": narrower})


# Comparison


def test_few_signs_are_all_tried() -> None:
    assert sign_flip(np.ones(5), seed=0, num_flips=10) == 2 / 2**5
    assert sign_flip(np.array([1.0, 1.0, -1.0, 0.0]), seed=0, num_flips=10) == 1.0
    assert sign_flip(np.zeros(4), seed=0, num_flips=10) == 1.0


def test_random_signs_never_give_a_p_of_zero_and_agree_with_the_normal_test() -> None:
    assert sign_flip(np.ones(100), seed=0, num_flips=999) == 1 / 1000
    differences = np.repeat([1.0, -1.0], [60, 40])
    exact = 2 * sum(math.comb(100, k) for k in range(41)) / 2**100
    assert sign_flip(differences, seed=0, num_flips=20_000) == pytest.approx(exact, abs=0.01)


def test_a_comparison_is_paired_on_prompts() -> None:
    base = drawn(0.5, 200)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:12]] = 1.0
    shuffled = np.random.default_rng(3).permutation(better)
    (paired,) = compare({"a": better[None], "b": base[None]}, seed=0)
    (apart,) = compare({"a": shuffled[None], "b": base[None]}, seed=0)
    assert paired.value == apart.value == pytest.approx(12 / 200)
    assert paired.verdict == "a beats b"
    assert apart.verdict == NO_DIFFERENCE
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_the_loser_may_come_first() -> None:
    (found,) = compare({"a": np.zeros((1, 20)), "b": np.ones((1, 20))}, seed=0)
    assert found.value == -1
    assert found.verdict == "b beats a"


def test_holm_corrects_over_all_pairs() -> None:
    runs = {str(n): drawn(0.5 + 0.04 * n, 150, seed=n)[None] for n in range(5)}
    found = compare(runs, seed=0, num_flips=2000)
    expected = multipletests([pair.p for pair in found], method="holm")[1]
    assert [pair.corrected for pair in found] == pytest.approx(list(expected))
    only_without = [pair for pair in found if pair.p <= 0.05 < pair.corrected]
    assert only_without
    assert {pair.verdict for pair in only_without} == {NO_DIFFERENCE}


def test_equal_runs_are_hardly_ever_told_apart() -> None:
    wrong = 0
    for trial in range(100):
        runs = {str(n): drawn(0.6, 60, seed=10 * trial + n)[None] for n in range(4)}
        pairs = compare(runs, seed=trial, num_flips=500)
        wrong += any(pair.verdict != NO_DIFFERENCE for pair in pairs)
    # Of 100, five are expected at most; their standard deviation is 2.2.
    assert wrong <= 5 + 3 * 2.2


def test_of_trainings_anew_p_and_interval_agree() -> None:
    rates = [(0.5, 0.6, 0.7), (0.42, 0.5, 0.55)]
    first, second = (
        np.stack([drawn(p, 300, seed=7 * i + j) for j, p in enumerate(row)])
        for i, row in enumerate(rates)
    )
    (found,) = compare({"a": first, "b": second}, seed=0)
    (at_p,) = compare({"a": first, "b": second}, seed=0, level=1 - found.p)
    assert at_p.low == pytest.approx(0, abs=1e-9)
    # Prompts alone would have found a difference that the trainings do not bear out.
    assert sign_flip(first.mean(0) - second.mean(0), seed=0, num_flips=2000) < 0.01 < found.p


def test_families_are_runs_that_differ_in_their_seed_alone() -> None:
    row = {"loss": "dpo", "beta": 0.1}
    runs = {"a": {**row, "seed": 0}, "b": {"loss": "ipo", "tau": 1.0}, "c": {**row, "seed": 1}}
    assert families(runs) == {"a + c": ["a", "c"], "b": ["b"]}


# Length


@pytest.mark.parametrize("bias", [0.0, 1.0, 2.0])
def test_policies_that_differ_in_length_alone_are_equal_at_equal_length(bias: float) -> None:
    generator, count, values, plain = np.random.default_rng(1), 400, [], []
    for _ in range(30):
        longer = generator.poisson(30, count) - generator.poisson(24, count)
        chance = 1 / (1 + np.exp(-bias * np.tanh(longer / longer.std())))
        won = (generator.random(count) < chance).astype(float)
        found = length_controlled(won, longer, np.arange(count), seed=0, num_resamples=2)
        values.append(found.value)
        plain.append(won.mean())
    # Three standard errors of the mean over the simulations.
    assert abs(np.mean(values) - 0.5) < 3 * np.std(values) / math.sqrt(30)
    if bias:
        assert np.mean(plain) > 0.6


def test_where_no_length_differs_length_control_changes_nothing() -> None:
    won = drawn(0.7, 200)
    found = length_controlled(won, np.zeros(200), np.arange(200), seed=0, num_resamples=500)
    assert found.value == pytest.approx(won.mean(), abs=1e-3)
    assert found.low < won.mean() < found.high


def test_separated_verdicts_are_said_to_be_and_stay_finite() -> None:
    longer = np.concatenate([np.arange(1, 51), -np.arange(1, 51)])
    won = (longer > 0).astype(float)
    found = length_controlled(won, longer, np.arange(100), seed=0, num_resamples=50)
    assert found.is_separated
    assert found.value == pytest.approx(0.5, abs=1e-6)
    won[10] = 0.0
    assert not length_controlled(won, longer, np.arange(100), seed=0, num_resamples=5).is_separated


def test_a_length_that_always_differs_by_the_same_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be told apart"):
        length_controlled(drawn(0.5, 9), np.full(9, 3), np.arange(9), seed=0)


# Ratings


def games(points_of: dict[tuple[str, str], np.ndarray], *others: str) -> Games:
    names = list(dict.fromkeys([name for pair in points_of for name in pair] + list(others)))
    sizes = [len(values) for values in points_of.values()]
    place = np.array([[names.index(name) for name in pair] for pair in points_of])
    return Games(
        names,
        np.repeat(place[:, 0], sizes),
        np.repeat(place[:, 1], sizes),
        np.concatenate(list(points_of.values())),
        np.concatenate([np.arange(size) for size in sizes]),
    )


def test_elo_of_two_is_the_logit_of_the_win_rate() -> None:
    won = np.repeat([1.0, 0.5, 0.0], [60, 20, 20])
    found = ratings(games({("a", "sft"): won}), anchor="sft", seed=0, num_resamples=500)
    rate = (won.sum() + 0.5) / 101  # one tie is given
    assert found["a"].elo == pytest.approx(1000 + 400 * math.log10(rate / (1 - rate)))
    assert found["sft"].low == found["sft"].high == 1000
    assert 1000 < found["a"].low < found["a"].elo < found["a"].high


def test_strengths_of_many_are_found_again_and_those_who_win_all_are_finite() -> None:
    truth = {"sft": 0.0, "a": 100.0, "b": 200.0}
    pairs = [("a", "sft"), ("b", "sft"), ("b", "a")]
    chance = [1 / (1 + 10 ** ((truth[j] - truth[i]) / 400)) for i, j in pairs]
    played = {pair: np.repeat([1.0, 0.0], [round(9999 * p), 9999 - round(9999 * p)])
              for pair, p in zip(pairs, chance, strict=True)}  # fmt: skip
    played[("c", "b")] = np.ones(10)
    found = ratings(games(played), anchor="sft", seed=0, num_resamples=20)
    for name, elo in truth.items():
        assert found[name].elo - 1000 == pytest.approx(elo, abs=2)
    assert found["b"].elo + 200 < found["c"].elo < math.inf


def test_who_never_met_anybody_connected_is_named() -> None:
    apart = games({("a", "sft"): drawn(0.5, 9), ("x", "y"): drawn(0.5, 9)})
    with pytest.raises(ValueError, match="no chain of games leads from 'sft' to some, got x, y"):
        ratings(apart, anchor="sft", seed=0)


# Power


def test_the_prompts_needed_have_the_power_that_was_asked_for() -> None:
    design, rate = Design(ties=0.2), 0.58
    count = prompts_needed(rate - 0.5, design)
    shares = [rate - 0.1, 0.2, 1 - 0.2 - (rate - 0.1)]
    drawn = np.random.default_rng(0).multinomial(count, shares, 4000) / count
    mean = drawn[:, 0] + drawn[:, 1] / 2
    spread = np.sqrt(drawn[:, 0] + drawn[:, 1] / 4 - mean**2) / math.sqrt(count)
    assert abs((np.abs(mean - 0.5) > 1.96 * spread).mean() - 0.8) < 0.02


def test_the_prompts_of_a_paired_difference_have_their_power() -> None:
    shared, generator = 0.4, np.random.default_rng(1)
    # With probability `shared` both runs' verdicts come of one draw.
    ours, theirs = 0.6, 0.5
    covariance = shared * (min(ours, theirs) - ours * theirs)
    correlation = covariance / math.sqrt(variance(ours, 0.0) * variance(theirs, 0.0))
    count = prompts_needed(0.1, Design(correlation=correlation))
    one, other = generator.random((2, 3000, count))
    other = np.where(generator.random(one.shape) < shared, one, other)
    differences = (one < ours).astype(float) - (other < theirs)
    z = differences.mean(1) / differences.std(1) * math.sqrt(count)
    assert abs((np.abs(z) > 1.96).mean() - 0.8) < 0.025


def test_the_variance_is_that_of_points() -> None:
    wins, ties = 0.5, 0.2
    assert variance(0.6, ties) == pytest.approx(np.var(np.repeat([1.0, 0.5, 0.0], [50, 20, 30]))), (
        wins,
        ties,
    )


def test_effect_and_prompts_are_each_others_inverse() -> None:
    for design in (Design(), Design(ties=0.1), Design(correlation=0.3, rate=0.7)):
        seen = detectable_effect(500, design)
        assert seen is not None
        assert prompts_needed(seen + 1e-9, design) == 500
    assert detectable_effect(2, Design(ties=0.9)) is None


# Correction


def test_a_perfect_judge_with_a_large_exam_changes_little() -> None:
    exam = of("w" * 5000 + "l" * 5000)
    observed = Estimate(0.6, 0.5, 0.7, 0.05)
    found = corrected_win_rate(observed, exam, exam)
    assert found.value == pytest.approx(0.6, abs=1e-3)
    assert found.standard_error == pytest.approx(0.05, rel=0.01)


def test_a_judges_errors_are_taken_out_and_a_small_exam_widens() -> None:
    # Points 0.8 of wins, 0.3 of losses: 0.6 * 0.8 + 0.4 * 0.3 = 0.6.
    def exam(n: int) -> tuple[list[str], list[str]]:
        judge = of("w" * (8 * n) + "l" * (2 * n) + "w" * (3 * n) + "l" * (7 * n))
        return judge, of("w" * (10 * n) + "l" * (10 * n))

    observed = Estimate(0.6, 0.58, 0.62, 0.01)
    large, small = (corrected_win_rate(observed, *exam(n)) for n in (500, 5))
    assert large.value == pytest.approx(0.6, abs=1e-3)
    assert small.high - small.low > 3 * (large.high - large.low)


def test_the_corrected_interval_covers() -> None:
    generator, truth, when_won, when_lost, held = np.random.default_rng(0), 0.7, 0.85, 0.2, 0
    gold = of("w" * 60 + "l" * 60)
    for _ in range(400):
        seen = generator.random(256) < when_won * truth + when_lost * (1 - truth)
        observed = Estimate(float(seen.mean()), 0.0, 1.0, float(seen.std() / 16))
        chance = np.repeat([when_won, when_lost], 60)
        judge = ["policy" if won else "opponent" for won in generator.random(120) < chance]
        found = corrected_win_rate(observed, judge, gold)
        held += found.low <= truth <= found.high
    assert abs(held / 400 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)


def test_a_judge_that_guesses_is_refused() -> None:
    with pytest.raises(ValueError, match="better than chance"):
        corrected_win_rate(Estimate(0.6, 0.5, 0.7, 0.05), of("wl" * 20), of("ww" * 10 + "ll" * 10))
