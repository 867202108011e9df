"""Laws of labelling: what becomes a pair, with what preference, and what a ranking."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

from stages import label
from stages.artefacts import (
    CANDIDATES,
    CANDIDATES_SCHEMA,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    LISTS,
    LISTS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    RANKINGS,
    RANKINGS_SCHEMA,
    REVISIONS,
    REVISIONS_SCHEMA,
    TEMPLATES,
    read_table,
    write_table,
)
from stages.params import Label, load_params
from stages.rewards import Text, load_reward
from stages.templates import Template, Templates, write_templates

TEXTS = [
    " a great and wonderful film",
    " a good film",
    " a film",
    " a bad film",
    " a horrible mess",
]


VADER = load_reward(load_params(PROJECT / "params.yaml"), "vader")


def candidates_of(groups: list[list[str]]) -> dict[str, list[Any]]:
    rows = [(prompt, text) for prompt, group in enumerate(groups) for text in group]
    return {
        "prompt": [prompt for prompt, _ in rows],
        "text": [text for _, text in rows],
        "tokens": [[*text.encode()] for _, text in rows],
    }


def prompts_of(count: int, **columns: list[Any]) -> dict[str, list[Any]]:
    return {
        "split": ["train"] * count,
        "text": ["A review."] * count,
        "tokens": [[0, i] for i in range(count)],
        "gold": ["gold"] * count,
        "gold_tokens": [[7, 1]] * count,
        "rejected": [""] * count,
        "rejected_tokens": [[]] * count,
    } | columns


def judged(
    groups: list[list[str]],
    method: str,
    scale: float = 1.0,
    seed: int = 0,
    num_ranked: int | None = None,
) -> list[label.Written]:
    settings = Label(method=method, reward="vader", scale=scale, num_ranked=num_ranked)
    prompts, candidates = prompts_of(len(groups)), candidates_of(groups)
    return list(label.judged(prompts, candidates, VADER, settings, seed))


def sides(labels: label.Written) -> tuple[str, str, float] | None:
    """Texts of the chosen and of the rejected completion, and the preference."""
    pair = labels.pair
    if pair is None:
        return None
    chosen, rejected = (bytes(labels.completions[i]).decode() for i in (pair.chosen, pair.rejected))
    return chosen, rejected, pair.preference


def test_the_best_goes_against_the_worst_of_its_own_prompt() -> None:
    groups = [list(group) for group in itertools.permutations(TEXTS, 3)]
    for group, labels in zip(groups, judged(groups, "best_against_worst"), strict=True):
        rewards = VADER([Text("A review.", text) for text in group])
        best, worst = (group[rewards.index(end(rewards))] for end in (max, min))
        assert sides(labels) == (best, worst, 1.0)


@pytest.mark.parametrize("method", ["best_against_worst", "bradley_terry"])
def test_ties_give_no_pair(method: str) -> None:
    found = judged([[" same", " same"], [" a film", " a movie"], TEXTS[:2]], method)
    assert [labels.pair is None for labels in found] == [True, True, False]
    assert [len(labels.completions) for labels in found] == [0, 0, 2]


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_bradley_terry_prefers_as_often_as_the_sigmoid_says(scale: float) -> None:
    count = 4000
    found = judged([[TEXTS[1], TEXTS[3]]] * count, "bradley_terry", scale)
    good, bad = VADER([Text("A review.", TEXTS[1]), Text("A review.", TEXTS[3])])
    gap = good - bad
    expected = 1 / (1 + math.exp(-gap / scale))
    pairs = [labels.pair for labels in found if labels.pair is not None]
    good_won = [pair.chosen == 0 for pair in pairs]
    share = sum(good_won) / count
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))
    for won, pair in zip(good_won, pairs, strict=True):
        assert pair.preference == pytest.approx(expected if won else 1 - expected, rel=1e-9)


def test_a_tiny_scale_always_prefers_the_better() -> None:
    found = judged([[TEXTS[0], TEXTS[4]]] * 50, "bradley_terry", scale=1e-6)
    assert {sides(labels) for labels in found} == {(TEXTS[0], TEXTS[4], 1.0)}


def test_bradley_terry_is_a_function_of_the_seed() -> None:
    groups = [TEXTS] * 30
    assert judged(groups, "bradley_terry") == judged(groups, "bradley_terry")
    assert judged(groups, "bradley_terry") != judged(groups, "bradley_terry", seed=1)


def lists_of(*groups: tuple[list[list[int]], list[float]]) -> dict[str, list[Any]]:
    return {"completions": [g[0] for g in groups], "rewards": [g[1] for g in groups]}


NO_LIST: tuple[list[list[int]], list[float]] = ([], [])


def test_given_pairs_are_those_of_the_training_split_then_of_the_validation_split() -> None:
    prompts = prompts_of(
        5,
        split=["train", "test", "train", "validation", "train"],
        gold_tokens=[[10], [11], [12], [13], [14]],
        rejected=["no", "no", "", "no", "no"],
        rejected_tokens=[[20], [21], [], [23], [24]],
    )
    assert list(label.given(prompts, lists_of(*[NO_LIST] * 5), None)) == [
        label.Written("train", [0, 0], ([10], [20]), label.Pair(0, 1, 1.0)),
        label.Written("train", [0, 4], ([14], [24]), label.Pair(0, 1, 1.0)),
        label.Written("validation", [0, 3], ([13], [23]), label.Pair(0, 1, 1.0)),
    ]


def test_a_given_list_is_ranked_by_its_first_k_and_its_pair_is_of_the_same() -> None:
    lists = lists_of(
        ([[10], [11], [12], [13]], [0.0, 2.0, -1.0, 9.0]), ([[14], [15]], [1.0, 0.0]), NO_LIST
    )
    prompts = prompts_of(3, rejected=["no"] * 3, rejected_tokens=[[20]] * 3)
    assert list(label.given(prompts, lists, 3)) == [
        label.Written(
            "train",
            [0, 0],
            [[10], [11], [12]],
            label.Pair(1, 2, 1.0),
            label.Ranking([0, 1, 2], [0.0, 2.0, -1.0]),
        ),
        # Fewer than K: a pair, and no ranking.
        label.Written("train", [0, 1], [[14], [15]], label.Pair(0, 1, 1.0)),
        label.Written("train", [0, 2], ([7, 1], [20]), label.Pair(0, 1, 1.0)),
    ]


@pytest.mark.parametrize("method", ["best_against_worst", "bradley_terry"])
def test_labels_are_of_their_prompts_split_and_validation_changes_no_training_pair(
    method: str,
) -> None:
    groups = [TEXTS, TEXTS[:2], TEXTS[2:], TEXTS[1:4]]
    split = ["train", "train", "validation", "validation"]
    settings = Label(method=method, reward="vader", scale=1.0, num_ranked=None)
    found = list(
        label.judged(prompts_of(4, split=split), candidates_of(groups), VADER, settings, 0)
    )
    assert found[:2] == judged(groups[:2], method)
    assert [labels.split for labels in found] == split


def test_the_earlier_candidate_is_written_first() -> None:
    for group in (TEXTS[:2], TEXTS[1::-1]):
        (labels,) = judged([group], "best_against_worst")
        assert labels.completions == [list(text.encode()) for text in group]
        assert sides(labels) == (TEXTS[0], TEXTS[1], 1.0)


def test_a_ranking_is_the_first_k_candidates_and_its_pair_is_of_the_same() -> None:
    for group in itertools.permutations(TEXTS, 4):
        (labels,) = judged([list(group)], "best_against_worst", num_ranked=3)
        rewards = VADER([Text("A review.", text) for text in group[:3]])
        assert labels.completions == [list(text.encode()) for text in group[:3]]
        assert labels.ranking == label.Ranking([0, 1, 2], rewards)
        assert [labels] == judged([list(group[:3])], "best_against_worst", num_ranked=3)
        pair = judged([list(group[:3])], "best_against_worst")[0]
        assert sides(labels) == sides(pair)


def test_what_was_drawn_twice_is_one_row_that_a_ranking_names_twice() -> None:
    (labels,) = judged(
        [[TEXTS[3], TEXTS[0], TEXTS[3], TEXTS[1]]], "best_against_worst", num_ranked=4
    )
    assert labels.completions == [list(TEXTS[i].encode()) for i in (3, 0, 1)]
    assert labels.ranking is not None
    assert labels.ranking.completions == [0, 1, 0, 2]
    assert labels.ranking.rewards[0] == labels.ranking.rewards[2]
    assert sides(labels) == (TEXTS[0], TEXTS[3], 1.0)


def test_equal_rewards_are_a_ranking_and_no_pair_and_one_completion_alone_is_neither() -> None:
    tied, alone = judged(
        [[" a film", " a movie"], [" x", " x"]], "best_against_worst", num_ranked=2
    )
    assert tied.pair is None
    assert tied.ranking is not None
    assert tied.ranking.rewards[0] == tied.ranking.rewards[1]
    assert (alone.pair, alone.ranking, alone.completions) == (None, None, [])


PAIR = label.Written("train", [0, 5], ([6, 1], [7, 8]), label.Pair(1, 0, 1.0))
TEMPLATES_OF_TEST = Templates(
    Template([[0], "prompt", []]), Template([[0], "completion", [9], "prompt"]), eos=1
)


def test_a_pair_has_its_two_rows_and_with_templates_six() -> None:
    plain = [([0, 5], [6, 1]), ([0, 5], [7, 8])]
    assert PAIR.rows(None) == plain
    assert PAIR.rows(TEMPLATES_OF_TEST) == [
        *plain,
        ([0, 6, 9, 5], [6, 1]),
        ([0, 6, 9, 5], [7, 8]),
        ([0, 7, 8, 9, 5], [6, 1]),
        ([0, 7, 8, 9, 5], [7, 8]),
    ]


@pytest.mark.parametrize(("chosen", "rejected"), [(0, 1), (1, 0), (0, 2), (2, 1)])
def test_pointers_find_each_side_under_each_prompt(chosen: int, rejected: int) -> None:
    labels = label.Written(
        "train", [0, 5], ([6, 1], [7, 8], [3]), label.Pair(chosen, rejected, 1.0)
    )
    rows = [None] * 100 + labels.rows(TEMPLATES_OF_TEST)
    y_w, y_l = labels.completions[chosen], labels.completions[rejected]
    pair = labels.pair_row(100)
    found = {
        name: rows[row]
        for name, row in {
            "chosen": pair["chosen"],
            "rejected": pair["rejected"],
            **labels.revision_row(100),
        }.items()
    }
    after_chosen, after_rejected = (
        TEMPLATES_OF_TEST.revision_of(labels.prompt, shown) for shown in (y_w, y_l)
    )
    assert found == {
        "chosen": (labels.prompt, y_w),
        "rejected": (labels.prompt, y_l),
        "chosen_given_rejected": (after_rejected, y_w),
        "rejected_given_rejected": (after_rejected, y_l),
        "chosen_given_chosen": (after_chosen, y_w),
        "rejected_given_chosen": (after_chosen, y_l),
    }


def write_inputs(groups: list[list[str]]) -> None:
    PROMPTS.parent.mkdir()
    write_templates(TEMPLATES, TEMPLATES_OF_TEST)
    write_table(PROMPTS, prompts_of(len(groups)), PROMPTS_SCHEMA)
    write_table(CANDIDATES, candidates_of(groups), CANDIDATES_SCHEMA)
    write_table(LISTS, lists_of(*[NO_LIST] * len(groups)), LISTS_SCHEMA)


def test_pairs_point_at_rows_of_completions(
    workplace: Path, write_params: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params()
    monkeypatch.setattr(label, "BLOCK", 2)
    groups = [TEXTS[:3], TEXTS[2:], TEXTS[:2][::-1]]
    write_inputs(groups)
    label.main()
    completions = read_table(COMPLETIONS, COMPLETIONS_SCHEMA)
    pairs = read_table(PAIRS, PAIRS_SCHEMA)
    found = [
        (bytes(completions["completion"][w]).decode(), bytes(completions["completion"][r]).decode())
        for w, r in zip(pairs["chosen"], pairs["rejected"], strict=True)
    ]
    assert found == [(TEXTS[0], TEXTS[2]), (TEXTS[2], TEXTS[4]), (TEXTS[0], TEXTS[1])]
    assert [completions["prompt"][w] for w in pairs["chosen"]] == [[0, 0], [0, 1], [0, 2]]
    assert pairs["chosen"] == [0, 2, 5]
    assert read_table(REVISIONS, REVISIONS_SCHEMA)["chosen_given_chosen"] == []


def test_pairs_under_revision_prompts_are_written_where_they_are_wanted(
    workplace: Path, write_params: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(**{"revision.train": True})
    monkeypatch.setattr(label, "BLOCK", 2)
    write_inputs([TEXTS[:3], TEXTS[2:], TEXTS[:2][::-1]])
    label.main()
    completions = read_table(COMPLETIONS, COMPLETIONS_SCHEMA)
    pairs, revisions = read_table(PAIRS, PAIRS_SCHEMA), read_table(REVISIONS, REVISIONS_SCHEMA)
    assert len(completions["prompt"]) == 6 * len(pairs["chosen"]) == 18
    for number in range(3):
        shown = completions["completion"][pairs["rejected"][number]]
        row = revisions["chosen_given_rejected"][number]
        assert completions["completion"][row] == completions["completion"][pairs["chosen"][number]]
        assert completions["prompt"][row] == [0, *shown, 9, number]


@pytest.mark.parametrize("revising", [False, True])
def test_rankings_and_pairs_point_at_the_same_rows_and_what_has_none_is_counted(
    workplace: Path,
    write_params: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    revising: bool,
) -> None:
    write_params(**{"label.num_ranked": 3, "revision.train": revising})
    monkeypatch.setattr(label, "BLOCK", 2)
    tied = [" a film", " a movie", " a film"]
    groups = [TEXTS[:3], [" x", " x", " x"], tied, TEXTS[2:]]
    write_inputs(groups)
    label.main()
    completions = read_table(COMPLETIONS, COMPLETIONS_SCHEMA)
    rankings, pairs = read_table(RANKINGS, RANKINGS_SCHEMA), read_table(PAIRS, PAIRS_SCHEMA)
    texts = [
        [bytes(completions["completion"][row]).decode() for row in rows]
        for rows in rankings["completions"]
    ]
    assert texts == [groups[0], tied, groups[3]]
    # Pairs have no rows of their own: 3 + 2 + 3, and four more a pair under its revision prompts.
    assert len(completions["prompt"]) == 8 + (8 if revising else 0)
    for number, ranking in ((0, 0), (1, 2)):
        rows, rewards = rankings["completions"][ranking], rankings["rewards"][ranking]
        assert pairs["chosen"][number] == rows[rewards.index(max(rewards))]
        assert pairs["rejected"][number] == rows[rewards.index(min(rewards))]
    said = capsys.readouterr().err
    assert (
        "label: 2 of 4 prompts have a pair; what is compared of the others does not differ" in said
    )
    assert (
        "label: 3 of 4 prompts have a ranking of 3; the others have fewer completions, or" in said
    )


def test_without_rankings_there_is_an_empty_table_and_pairs_are_as_ever(
    workplace: Path, write_params: Callable[..., Any]
) -> None:
    write_inputs([TEXTS[:2], TEXTS[2:4]])
    tables = []
    for num_ranked in (None, 2):
        write_params(**{"label.num_ranked": num_ranked})
        label.main()
        tables.append(
            [read_table(PAIRS, PAIRS_SCHEMA), read_table(COMPLETIONS, COMPLETIONS_SCHEMA)]
        )
        assert len(read_table(RANKINGS, RANKINGS_SCHEMA)["rewards"]) == (2 if num_ranked else 0)
    assert tables[0] == tables[1]


def test_rankings_that_no_training_prompt_has_are_refused(
    workplace: Path, write_params: Callable[..., Any]
) -> None:
    write_params(**{"label.method": "given", "label.num_ranked": 3})
    write_inputs([TEXTS[:2]])
    prompts = prompts_of(1, rejected=["no"], rejected_tokens=[[20]])
    write_table(PROMPTS, prompts, PROMPTS_SCHEMA)
    with pytest.raises(
        ValueError, match=r"label.num_ranked: no training prompt has so many .* got 3"
    ):
        label.main()
    assert not RANKINGS.exists()


@pytest.mark.parametrize("method", ["best_against_worst", "given"])
def test_no_training_pair_at_all_is_refused(
    workplace: Path, write_params: Callable[..., Any], method: str
) -> None:
    write_params(**{"label.method": method})
    write_inputs([[" same", " same"]])
    with pytest.raises(
        ValueError, match="label: no pair was found, got 1 prompts and 2 candidates"
    ):
        label.main()
    assert not PAIRS.exists()
