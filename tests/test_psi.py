"""Laws of the utilities Psi, and what is refused with its reason."""

import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.psi import psi

ODD: list[Any] = [
    "identity",
    "q",
    "3*q**2 - 2*q**3",
    "exp(q) - exp(1 - q)",
    "sign(q - 0.5)",
    {"logit": 0.01},
    {"log(q/(1 - q))": 0.2},
    {"1/(1 - q) - 1/q": 0.1},
]


def at(spec: Any, q: float) -> float:
    return psi(spec)(torch.tensor([q], dtype=torch.float64)).item()


@settings(deadline=None, derandomize=True)
@given(q=st.floats(0, 1))
def test_the_identity_is_the_probability(q: float) -> None:
    assert at("identity", q) == q
    assert at("q", q) == q


@settings(deadline=None, derandomize=True)
@given(q=st.floats(0, 1), clip=st.floats(1e-3, 0.4))
def test_the_logit_is_that_of_the_clipped_probability(q: float, clip: float) -> None:
    clipped = min(max(q, clip), 1 - clip)
    expected = math.log(clipped) - math.log1p(-clipped)
    assert at({"logit": clip}, q) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("spec", ODD, ids=str)
@settings(deadline=None, derandomize=True)
@given(q=st.floats(0, 1))
def test_what_is_accepted_is_odd_about_one_half(spec: Any, q: float) -> None:
    middle = at(spec, 0.5)
    assert at(spec, q) + at(spec, 1 - q) == pytest.approx(2 * middle, abs=1e-7)


@pytest.mark.parametrize("spec", ODD, ids=str)
def test_what_is_accepted_never_decreases(spec: Any) -> None:
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (psi(spec)(q).diff() >= -1e-12).all()


def test_the_logit_without_a_clip_is_refused_and_told_how_to_clip() -> None:
    with pytest.raises(ValueError, match=r"'logit' is not finite on \[0.0, 1\].*\{logit: 0.01\}"):
        psi("logit")


@pytest.mark.parametrize("spec", ["log(q)", "-1/q", "1/(1 - q)", {"1/(q - 0.5)": 0.1}])
def test_what_is_not_finite_is_refused(spec: Any) -> None:
    with pytest.raises(ValueError, match="is not finite on"):
        psi(spec)


@pytest.mark.parametrize(
    ("text", "odd"), [("q**2", "q - 1/2"), ("sqrt(q)", "sqrt(q)/2 - sqrt(1 - q)/2")]
)
def test_a_psi_that_is_not_odd_is_refused_with_its_odd_part(text: str, odd: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is looked into)
        psi(text)
    q = sympy.Symbol("q", positive=True)
    written = sympy.sympify(text, {"q": q})
    # Psi(q) + Psi(1 - q), which should be constant, at both ends.
    ends = [float((written + written.subs(q, 1 - q)).subs(q, x)) for x in (0, sympy.Rational(1, 2))]
    assert ends[0] != ends[1]
    assert f"({ends[0]:.4g} at q = 0, {ends[1]:.4g} at q = 1/2)" in str(caught.value)
    assert "three completions a prompt are needed" in str(caught.value)
    assert f"odd part '{odd}'" in str(caught.value)
    assert psi(odd)(torch.tensor([0.75], dtype=torch.float64)).item() == pytest.approx(
        float((written.subs(q, 0.75) - written.subs(q, 0.25)) / 2)
    )


@pytest.mark.parametrize("text", ["-q", "1 - q", "-log(1 + q)", "abs(q - 0.5)", "q**3 - 1.5*q**2"])
def test_a_psi_that_decreases_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"decreases; a greater probability must not be worth"):
        psi(text)


@pytest.mark.parametrize("spec", ["foo", "logits", 3, None, True, {"a": 0.1, "b": 0.1}, {}, {3: 0}])
def test_what_is_no_psi_is_refused_with_the_known_ones(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown psi .*; known: identity, logit, a formula in q"):
        psi(spec)


@pytest.mark.parametrize("text", ["q + t", "logit(q)", "q.real", "q**"])
def test_a_formula_with_anything_but_q_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not known here|may not stand|not a formula"):
        psi(text)


@pytest.mark.parametrize("clip", [-0.1, 0.5, 1, "0.1", None, True])
def test_a_clip_lies_between_nothing_and_one_half(clip: Any) -> None:
    with pytest.raises(ValueError, match=r"psi's clip must lie in \[0, 0.5\), got"):
        psi({"logit": clip})


def test_only_an_affine_psi_takes_a_label_for_its_probability() -> None:
    assert psi("identity").affine
    assert psi("3*q + 1").affine
    assert not psi({"logit": 0.01}).affine
    assert not psi("3*q**2 - 2*q**3").affine
