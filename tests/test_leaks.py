"""Laws of leaks: a few changed words hide nothing, and different texts are let be."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.leaks import NUM_SHOWN, THRESHOLD, Leak, leaks, refuse, trigrams

WORDS = [f"word{i}" for i in range(2000)]


def texts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=20)) for _ in range(count)]


def test_texts_at_random_do_not_leak() -> None:
    assert list(leaks(texts(500, 0), texts(50, 1))) == []


@pytest.mark.parametrize("change", ["case", "spaces", "last word", "first two words", "added"])
def test_a_text_changed_a_little_leaks(change: str) -> None:
    evaluation = texts(50, 1)
    words = evaluation[7].split()
    changed = {
        "case": evaluation[7].upper(),
        "spaces": "  ".join(words),
        "last word": " ".join([*words[:-1], "other"]),
        "first two words": " ".join(["an", "other", *words[2:]]),
        "added": " ".join([*words, "and", "more"]),
    }[change]
    (leak,) = leaks([*texts(100, 0), changed], evaluation)
    assert (leak.training, leak.evaluation) == (100, 7)


def test_half_a_text_is_no_leak() -> None:
    evaluation = texts(5, 1)
    half = " ".join(evaluation[0].split()[:10] + texts(1, 2)[0].split()[:10])
    assert list(leaks([half], evaluation)) == []


def test_similarity_is_jaccards_of_word_trigrams() -> None:
    a, b = "one two three four five six", "one two three four five seven"
    assert trigrams(a) & trigrams(b) == {w for w in trigrams(a) if "six" not in w}
    assert list(leaks([a], [b])) == []  # 3 of 5
    (leak,) = leaks([a + " eight nine ten"], [a + " eight nine eleven"])
    assert leak.similarity == pytest.approx(6 / 8)
    assert 3 / 5 < THRESHOLD < 6 / 8


@given(st.lists(st.lists(st.sampled_from("abcde"), max_size=12), max_size=12), st.data())
def test_no_leak_is_missed(rows: list[list[str]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(rows)))
    found = [" ".join(row) for row in rows]
    training, evaluation = found[:cut], found[cut:]
    grams = [trigrams(text) for text in found]
    expected = [
        (i, j)
        for i in range(cut)
        for j in range(len(evaluation))
        if len(grams[i] & grams[cut + j]) >= THRESHOLD * len(grams[i] | grams[cut + j])
    ]
    assert [(leak.training, leak.evaluation) for leak in leaks(training, evaluation)] == expected


def test_short_texts_leak_only_as_wholes() -> None:
    (leak,) = leaks(["Good film"], ["good film", "good movie"])
    assert leak == Leak(0, 0, 1.0)


def test_a_leak_is_refused_with_its_rows_and_the_first_of_many_are_named() -> None:
    found = [Leak(i, 0, 0.9) for i in range(NUM_SHOWN + 2)]
    training = [f"data.jsonl:{i + 1}" for i in range(NUM_SHOWN + 2)]
    with pytest.raises(
        ValueError, match=r"got 7 pairs .*data.jsonl:1 and test.jsonl:9 \(90%\).* and 2 more"
    ) as error:
        refuse(found, training.__getitem__, ["test.jsonl:9"].__getitem__)
    assert len(re.findall(r"data\.jsonl:\d", str(error.value))) == NUM_SHOWN


def test_nothing_found_is_nothing_refused() -> None:
    refuse([], str, str)
