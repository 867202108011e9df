"""Laws of labelling: which candidates become a pair, and with what preference."""

import dataclasses
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
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
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
    groups: list[list[str]], method: str, scale: float = 1.0, seed: int = 0
) -> list[label.Pair]:
    settings = Label(method=method, reward="vader", scale=scale)
    prompts, candidates = prompts_of(len(groups)), candidates_of(groups)
    return list(label.judged(prompts, candidates, VADER, settings, seed))


def test_the_best_goes_against_the_worst_of_its_own_prompt() -> None:
    groups = [list(group) for group in itertools.permutations(TEXTS, 3)]
    pairs = judged(groups, "best_against_worst")
    for number, (group, pair) in enumerate(zip(groups, pairs, strict=True)):
        rewards = VADER([Text("A review.", text) for text in group])
        assert pair.chosen == 3 * number + rewards.index(max(rewards))
        assert pair.rejected == 3 * number + rewards.index(min(rewards))
        assert pair.preference == 1.0


@pytest.mark.parametrize("method", ["best_against_worst", "bradley_terry"])
def test_ties_give_no_pair(method: str) -> None:
    pairs = judged([[" same", " same"], [" a film", " a movie"], TEXTS[:2]], method)
    assert [{pair.chosen, pair.rejected} for pair in pairs] == [{4, 5}]


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_bradley_terry_prefers_as_often_as_the_sigmoid_says(scale: float) -> None:
    count = 4000
    pairs = judged([[TEXTS[1], TEXTS[3]]] * count, "bradley_terry", scale)
    good, bad = VADER([Text("A review.", TEXTS[1]), Text("A review.", TEXTS[3])])
    gap = good - bad
    expected = 1 / (1 + math.exp(-gap / scale))
    good_won = [pair.chosen % 2 == 0 for pair in pairs]
    share = sum(good_won) / count
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))
    for won, pair in zip(good_won, pairs, strict=True):
        assert pair.preference == pytest.approx(expected if won else 1 - expected, rel=1e-9)


def test_a_tiny_scale_always_prefers_the_better() -> None:
    pairs = judged([[TEXTS[0], TEXTS[4]]] * 50, "bradley_terry", scale=1e-6)
    assert {(pair.chosen % 2, pair.preference) for pair in pairs} == {(0, 1.0)}


def test_bradley_terry_is_a_function_of_the_seed() -> None:
    groups = [TEXTS] * 30
    assert judged(groups, "bradley_terry") == judged(groups, "bradley_terry")
    assert judged(groups, "bradley_terry") != judged(groups, "bradley_terry", seed=1)


def test_given_pairs_are_those_of_the_training_split_then_of_the_validation_split() -> None:
    prompts = prompts_of(
        5,
        split=["train", "test", "train", "validation", "train"],
        gold_tokens=[[10], [11], [12], [13], [14]],
        rejected=["no", "no", "", "no", "no"],
        rejected_tokens=[[20], [21], [], [23], [24]],
    )
    assert list(label.given(prompts)) == [
        label.Written("train", [0, 0], ([10], [20]), chosen=0, preference=1.0),
        label.Written("train", [0, 4], ([14], [24]), chosen=0, preference=1.0),
        label.Written("validation", [0, 3], ([13], [23]), chosen=0, preference=1.0),
    ]


@pytest.mark.parametrize("method", ["best_against_worst", "bradley_terry"])
def test_a_pair_is_of_its_prompts_split_and_validation_changes_no_training_pair(
    method: str,
) -> None:
    groups = [TEXTS, TEXTS[:2], TEXTS[2:], TEXTS[1:4]]
    prompts = prompts_of(4, split=["train", "train", "validation", "validation"])
    candidates = candidates_of(groups)
    pairs = judged(groups, method)
    assert pairs[:2] == judged(groups[:2], method)
    splits = [pair.split for pair in label.written(prompts, candidates, pairs)]
    assert splits == ["train", "train", "validation", "validation"]


def test_the_earlier_candidate_is_written_first() -> None:
    candidates = candidates_of([TEXTS[:2], TEXTS[:2]])
    pairs = [label.Pair(0, 1, 0.75), label.Pair(3, 2, 1.0)]
    first, second = (list(TEXTS[i].encode()) for i in (0, 1))
    assert list(label.written(prompts_of(2), candidates, pairs)) == [
        label.Written("train", [0, 0], (first, second), chosen=0, preference=0.75),
        label.Written("train", [0, 1], (first, second), chosen=1, preference=1.0),
    ]


PAIR = label.Written("train", [0, 5], ([6, 1], [7, 8]), chosen=1, preference=1.0)
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


@pytest.mark.parametrize("place", [0, 1])
def test_pointers_find_each_side_under_each_prompt(place: int) -> None:
    pair = dataclasses.replace(PAIR, chosen=place)
    rows = [None] * 100 + pair.rows(TEMPLATES_OF_TEST)
    chosen, rejected = pair.completions[place], pair.completions[1 - place]
    found = {
        name: rows[row]
        for name, row in {**pair.pointers(100), **pair.revision_pointers(100)}.items()
    }
    after_chosen, after_rejected = (
        TEMPLATES_OF_TEST.revision_of(pair.prompt, shown) for shown in (chosen, rejected)
    )
    assert found == {
        "chosen": (pair.prompt, chosen),
        "rejected": (pair.prompt, rejected),
        "chosen_given_rejected": (after_rejected, chosen),
        "rejected_given_rejected": (after_rejected, rejected),
        "chosen_given_chosen": (after_chosen, chosen),
        "rejected_given_chosen": (after_chosen, rejected),
    }


def write_inputs(groups: list[list[str]]) -> None:
    PROMPTS.parent.mkdir()
    write_templates(TEMPLATES, TEMPLATES_OF_TEST)
    write_table(PROMPTS, prompts_of(len(groups)), PROMPTS_SCHEMA)
    write_table(CANDIDATES, candidates_of(groups), CANDIDATES_SCHEMA)


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
