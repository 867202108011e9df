"""Laws of diversity on words."""

import math

import pytest

from prefopt.diversity import distinct_within, self_bleu, words


def test_words_are_without_case_and_signs_stand_alone() -> None:
    assert words("Don't stop, DON'T.") == ["don't", "stop", ",", "don't", "."]


def test_distinct_is_counted_text_by_text_over_words() -> None:
    texts = [["a", "b", "a", "b"], ["a", "b"], []]
    assert distinct_within(texts, 1) == (2 / 4 + 2 / 2) / 2
    assert distinct_within(texts, 2) == (2 / 4 + 1 / 2) / 2
    assert distinct_within([[]], 1) == 0.0


def test_texts_that_are_all_the_same_have_a_self_bleu_of_one() -> None:
    assert self_bleu([["a", "b", "c", "d", "e"]] * 3) == pytest.approx(1)
    assert self_bleu([["a"]]) == 0.0


def test_self_bleu_is_the_mean_bleu_of_each_text_against_all_others() -> None:
    texts = [["a", "b", "c"], ["a", "b", "d", "d"], ["a", "x"]]
    # By hand, to bigrams: clipped matches over n-grams, 0.1 for none, and brevity to the nearest.
    first = math.sqrt(2 / 3 * 1 / 2)
    second = math.sqrt(2 / 4 * 1 / 3)
    third = math.sqrt(1 / 2 * 0.1 / 1) * math.exp(1 - 3 / 2)
    assert self_bleu(texts, 2) == pytest.approx((first + second + third) / 3, rel=1e-12)
