"""Laws of the formulas that people write: what is refused, and that the rest means what it says."""

import math
from fractions import Fraction

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.expressions import evaluate, log_sigmoid, parse, sigmoid

T = sympy.Symbol("t", positive=True)
IN_TORCH = {
    "exp": torch.exp,
    "log": torch.log,
    "Abs": torch.abs,
    "sign": torch.sign,
    "Max": lambda *xs: torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in xs]).amax(0),
    "Min": lambda *xs: torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in xs]).amin(0),
    "sigmoid": torch.sigmoid,
    "log_sigmoid": torch.nn.functional.logsigmoid,
}
IN_MATH = {
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "abs": abs,
    "sign": lambda x: math.copysign(1.0, x) if x else 0.0,
    "max": max,
    "min": min,
}


def at(text: str, t: float) -> float:
    expression = parse(text, {"t": T})
    value = evaluate(expression, {"t": torch.tensor(t, dtype=torch.float64)}, IN_TORCH)
    return float(value)


def refusal(text: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers look into the message)
        parse(text, {"t": T})
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("t*t.__class__", "t.__class__"),
        ("(1).real*t", "(1).real"),
        ("t*().__class__", "().__class__"),
        ("t + (lambda: t)()", "(lambda: t)()"),
        ("log(lambda: t)", "lambda: t"),
        ("2*(t < 1)", "t < 1"),
        ("t + (t == 1)", "t == 1"),
        ("t*[t][0]", "[t][0]"),
        ("t + (s := t)", "s := t"),
        ("t*(t if t else 1)", "t if t else 1"),
        ("t*(t and 1)", "t and 1"),
        ("t + (not t)", "not t"),
        ("t + ~t", "~t"),
        ("log((t, 1))", "(t, 1)"),
        ("t*sum([t for t in t])", "sum([t for t in t])"),
        ("t + 'a'", "'a'"),
        ("t + True", "True"),
        ("t + 1j", "1j"),
        ("t + f'{t}'", "f'{t}'"),
        ("t + (await t)", "await t"),
        ("t + __import__('os').system('true')", "__import__('os').system('true')"),
    ],
)
def test_what_is_not_arithmetic_is_refused_with_its_place(text: str, place: str) -> None:
    message = refusal(text)
    assert f"got '{place}' in '{text}'" in message
    assert "allowed: numbers, + - * / **, t, log, exp, sqrt, abs, sign, max, min" in message


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("x*log(t)", "x"),
        ("t*ln(t)", "ln"),
        ("t + __import__('os')", "__import__"),
        ("open(t)", "open"),
        ("t*__builtins__", "__builtins__"),
        ("t(1)", "t"),
        ("log + t", "log"),
        ("t + pi", "pi"),
        ("t + nan", "nan"),
        ("t + inf", "inf"),
    ],
)
def test_a_name_that_is_not_on_the_list_is_refused(text: str, name: str) -> None:
    message = refusal(text)
    assert message.startswith(f"'{name}' is not known here, got '{name}")
    assert f"in '{text}'" in message


@pytest.mark.parametrize("operator", ["//", "%", "@", "<<", ">>", "&", "|", "^"])
def test_other_operators_are_refused(operator: str) -> None:
    text = f"t {operator} 2"
    assert refusal(text).startswith(f"an operator other than + - * / **, got '{text}' in '{text}'")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("t**101", "t**101"),
        ("1 + t**-101", "t**-101"),
        ("t**1e9", "t**1e9"),
        ("2**100**100*t", "2**100**100"),
        ("t*(2**100)**100", "(2**100)**100"),
        ("t + 1e10", "1e10"),
        ("t + 1e999", "1e999"),
        ("t + 99999999999", "99999999999"),
    ],
)
def test_what_would_fill_the_memory_is_refused(text: str, place: str) -> None:
    assert f"got '{place}' in '{text}'" in refusal(text)


@pytest.mark.parametrize("text", ["1/0", "t/(t - t)", "log(t)/(2 - 2)"])
def test_a_division_by_zero_is_refused(text: str) -> None:
    assert refusal(text).startswith("a division by zero")


@pytest.mark.parametrize(("text", "count"), [("log(t, t, t)", 3), ("exp()", 0), ("abs(t, t)", 2)])
def test_a_function_takes_the_arguments_that_it_takes(text: str, count: int) -> None:
    assert f"does not take {count} arguments, got '{text}'" in refusal(text)


@pytest.mark.parametrize("text", ["", "  ", "t +", "t t", "(t", "t)", "t\0", "*t", "#", "t; t"])
def test_what_python_cannot_read_is_no_formula(text: str) -> None:
    assert refusal(text).startswith("not a formula, got '")


def test_a_formula_is_at_most_400_characters_long() -> None:
    parse("t" + "+t" * 199, {"t": T})
    assert refusal("t" + "+t" * 200) == "a formula of 401 characters; at most 400 are read"


def test_nesting_changes_nothing() -> None:
    assert parse("-" * 100 + "t", {"t": T}) == T
    assert parse("(" * 100 + "t" + ")" * 100, {"t": T}) == T


@pytest.mark.parametrize("text", ["0x10*t", "0b1*t", "0o7*t"])
def test_numbers_are_decimal(text: str) -> None:
    assert refusal(text).startswith("a number in another notation than decimal")


@settings(deadline=None, derandomize=True)
@given(digits=st.decimals(0, 10**6, allow_nan=False, places=6))
def test_a_number_is_the_fraction_that_it_is_written_as(digits: object) -> None:
    fraction = Fraction(str(digits))
    expected = sympy.Rational(fraction.numerator, fraction.denominator)
    assert parse(str(digits), {}) == expected


def test_numbers_are_exact_so_that_what_follows_from_them_is() -> None:
    assert parse("0.1 + 0.2", {}) == sympy.Rational(3, 10)
    assert parse("1e-3", {}) == sympy.Rational(1, 1000)
    assert parse("1_000.5", {}) == sympy.Rational(2001, 2)


# Sums, products and functions of positive numbers, in which no digits cancel.
FORMULAS = st.recursive(
    st.sampled_from(["t", "2", "0.5", "1.25"]),
    lambda parts: st.one_of(
        st.builds("({} + {})".format, parts, parts),
        st.builds("({} * {})".format, parts, parts),
        st.builds("({} / {})".format, parts, parts),
        st.builds("({})**1.5".format, parts),
        st.builds("log(1 + {})".format, parts),
        st.builds("exp(-{})".format, parts),
        st.builds("sqrt({})".format, parts),
        st.builds("max({}, {})".format, parts, parts),
        st.builds("min({}, 3)".format, parts),
        st.builds("abs(-{})".format, parts),
    ),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(text=FORMULAS, t=st.floats(0.1, 5))
def test_a_formula_means_in_torch_what_it_means_in_math(text: str, t: float) -> None:
    expected = eval(text, {**IN_MATH, "t": t})
    assert at(text, t) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@settings(deadline=None, derandomize=True)
@given(t=st.floats(0.1, 5))
def test_differences_and_signs_mean_what_they_mean_in_math(t: float) -> None:
    assert at("t*log(t) - t + 1", t) == pytest.approx(t * math.log(t) - t + 1, abs=1e-12)
    assert at("-(t - 2)**3", t) == pytest.approx(-((t - 2) ** 3), abs=1e-9)
    assert at("sign(t - 2)*2", t) == 2 * IN_MATH["sign"](t - 2)
    assert at("abs(t - 2)", t) == pytest.approx(abs(t - 2), abs=1e-12)


def test_powers_bind_as_they_do_in_python() -> None:
    assert at("-t**2", 3.0) == -9
    assert at("2**t**2", 2.0) == 16
    assert at("t/2*3", 4.0) == 6


@settings(deadline=None, derandomize=True)
@given(t=st.floats(0.1, 5))
def test_the_value_carries_the_gradient(t: float) -> None:
    leaf = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    value = evaluate(parse("t*log(t)", {"t": T}), {"t": leaf}, IN_TORCH)
    value.backward()
    assert leaf.grad is not None
    assert leaf.grad.item() == pytest.approx(math.log(t) + 1, abs=1e-12)


@settings(deadline=None, derandomize=True)
@given(z=st.floats(-30, 30))
def test_derivatives_of_the_sigmoids_are_theirs(z: float) -> None:
    symbol = sympy.Symbol("z", real=True)
    p = 1 / (1 + math.exp(-z))
    values = {"z": torch.tensor(z, dtype=torch.float64)}
    for function, slope in ((sigmoid, p / (1 + math.exp(z))), (log_sigmoid, 1 / (1 + math.exp(z)))):
        found = evaluate(sympy.diff(function(symbol), symbol), values, IN_TORCH)
        assert float(found) == pytest.approx(slope, rel=1e-9)
