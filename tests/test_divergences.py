"""Laws of the table of divergences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.divergences import (
    DIVERGENCES,
    Divergence,
    divergence,
    dpo_inducing_divergence,
)

ROWS = [
    *DIVERGENCES.values(),
    *(divergence({"alpha": a}) for a in (0.1, 0.5, 0.9)),
    *(divergence({"squared_log": c}) for c in (0.0, 0.5)),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=repr)

# f of t, as the papers write it.
GENERATORS = {
    "reverse_kl": lambda t: t * math.log(t),
    "forward_kl": lambda t: -math.log(t),
    "jensen_shannon": lambda t: t * math.log(2 * t / (t + 1)) + math.log(2 / (t + 1)),
    "squared_hellinger": lambda t: (math.sqrt(t) - 1) ** 2,
    "jeffreys": lambda t: (t - 1) * math.log(t),
    "pearson_chi_squared": lambda t: (t - 1) ** 2,
    "neyman_chi_squared": lambda t: (t - 1) ** 2 / t,
    "total_variation": lambda t: abs(t - 1) / 2,
    "mixed_chi_squared": lambda t: (t - 1) ** 2 / 2 + t * math.log(t),
    "squared_log": lambda t: math.log(t) ** 2 / 2,
    "squared_log(0.0)": lambda t: math.log(t) ** 2 / 2,
    "squared_log(0.5)": lambda t: (math.log(t) - 0.5) ** 2 / 2,
    **{
        f"alpha({a})": lambda t, a=a: (t ** (1 - a) - (1 - a) * t - a) / (a * (a - 1))
        for a in (0.1, 0.5, 0.9)
    },
}


@every_row
@settings(deadline=None, derandomize=True)
@given(t=st.floats(1e-3, 1e3))
def test_f_is_the_formula(row: Divergence, t: float) -> None:
    u = torch.tensor(math.log(t), dtype=torch.float64)
    assert row.f(u).item() == pytest.approx(GENERATORS[row.name](t), rel=1e-9, abs=1e-12)


@every_row
def test_the_derivative_is_that_of_f(row: Divergence) -> None:
    t = torch.logspace(-3, 3, 60, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(row.f(t.log()).sum(), t)
    assert row.derivative(t.detach().log()).tolist() == pytest.approx(
        slope.tolist(), rel=1e-9, abs=1e-9
    )


@every_row
def test_the_score_is_the_derivative_less_its_value_at_the_reference(row: Divergence) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert row.score(zero).item() == pytest.approx(0, abs=1e-15)
    u = torch.linspace(-3, 3, 60, dtype=torch.float64)
    assert (row.derivative(u) - row.score(u)).tolist() == [pytest.approx(row.slope_at_one)] * 60


@every_row
def test_f_of_one_is_zero_so_that_the_divergence_from_itself_is(row: Divergence) -> None:
    shift = row.slope_at_one if row.name.startswith("squared_log(") else 0.0
    found = row.f(torch.zeros(1, dtype=torch.float64)).item()
    # The shifted one starts at c^2/2, which moves every divergence by the same constant.
    assert found == pytest.approx(shift**2 / 2, abs=1e-12)


@every_row
def test_the_slope_at_zero_is_the_limit_of_the_derivative(row: Divergence) -> None:
    slopes = row.derivative(torch.tensor([-8.0, -16.0, -24.0], dtype=torch.float64)).tolist()
    if row.dpo_inducing:
        assert slopes[2] < slopes[1] < slopes[0] < -math.log(2)
    else:
        assert slopes[2] == pytest.approx(row.slope_at_zero, rel=1e-9)


@every_row
def test_the_argmin_is_where_f_is_smallest(row: Divergence) -> None:
    u = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    where = u[row.f(u).argmin()].exp().item()
    if math.isinf(row.argmin):
        assert where == pytest.approx(math.exp(3))
    else:
        assert where == pytest.approx(row.argmin, rel=2e-4)


@every_row
def test_a_convex_f_has_a_score_that_never_falls_and_another_one_that_does(
    row: Divergence,
) -> None:
    u = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    assert bool((row.score(u).diff() >= 0).all()) == row.convex


def test_the_two_tests_sort_the_table_as_the_paper_does() -> None:
    not_inducing = {"pearson_chi_squared", "total_variation"}
    not_resistant = {"reverse_kl", "mixed_chi_squared"}
    assert {name for name, d in DIVERGENCES.items() if not d.dpo_inducing} == not_inducing
    assert {name for name, d in DIVERGENCES.items() if not d.displacement_resistant} == (
        not_resistant
    )


def test_a_divergence_that_does_not_induce_dpo_is_refused_with_its_counter_example() -> None:
    message = (
        r"'pearson_chi_squared' is not DPO-inducing: f'\(0\+\) = -2 is finite.*optimum "
        r"\(0, 0, 1/3, 2/3\).*or the loss f_dpg"
    )
    with pytest.raises(ValueError, match=message):
        dpo_inducing_divergence("pearson_chi_squared")
    with pytest.raises(ValueError, match=r"'\(t-1\)\*\*2' is not DPO-inducing"):
        dpo_inducing_divergence("(t-1)**2")
    assert dpo_inducing_divergence("(t-1)**2 + t*log(t)").dpo_inducing


def test_forward_kl_has_no_smallest_value() -> None:
    u = torch.linspace(-30, 30, 601, dtype=torch.float64)
    assert (DIVERGENCES["forward_kl"].f(u).diff() < 0).all()


@every_row
@pytest.mark.parametrize("u", [-300.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_derivative_and_their_gradients_are_finite(
    row: Divergence, u: float, dtype: torch.dtype
) -> None:
    for function in (row.f, row.derivative):
        leaf = torch.tensor([u], dtype=dtype, requires_grad=True)
        value = function(leaf)
        value.sum().backward()
        assert leaf.grad is not None
        assert value.isfinite().all(), function
        assert leaf.grad.isfinite().all(), function


def test_half_alpha_is_twice_the_squared_hellinger() -> None:
    u = torch.linspace(-2, 2, 41, dtype=torch.float64)
    hellinger = ((u / 2).exp() - 1) ** 2
    found = divergence({"alpha": 0.5}).f(u)
    assert found.tolist() == pytest.approx((2 * hellinger).tolist(), abs=1e-12)


def test_a_divergence_between_two_distributions_is_their_divergence() -> None:
    policy = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    u = (policy / reference).log()
    middle = (policy + reference) / 2

    def kl(p: torch.Tensor, q: torch.Tensor) -> float:
        return (p * (p / q).log()).sum().item()

    expected = {
        "reverse_kl": kl(policy, reference),
        "forward_kl": kl(reference, policy),
        "jensen_shannon": kl(policy, middle) + kl(reference, middle),
    }
    for name, value in expected.items():
        assert (reference * DIVERGENCES[name].f(u)).sum().item() == pytest.approx(value, rel=1e-12)


def test_a_divergence_is_found_by_its_name() -> None:
    assert [divergence(name) for name in DIVERGENCES] == list(DIVERGENCES.values())


def test_an_unknown_divergence_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown divergence 'foo'; known: reverse_kl, .*\{alpha: a\}"
    ):
        divergence("foo")


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5, 2.0])
def test_an_alpha_outside_its_domain_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha must lie in \(0, 1\), got {alpha}"):
        divergence({"alpha": alpha})


@pytest.mark.parametrize("spec", [{"aplha": 0.5}, {"alpha": True}, {"alpha": 0.5, "c": 1}, 3, None])
def test_what_is_no_divergence_is_refused(spec: object) -> None:
    with pytest.raises(ValueError, match="unknown divergence"):
        divergence(spec)


def test_a_shift_that_would_force_probabilities_down_is_refused() -> None:
    with pytest.raises(ValueError, match=r"squared_log's shift must lie in \[0, 50\], got -0.5"):
        divergence({"squared_log": -0.5})


def test_a_formula_is_a_divergence() -> None:
    assert divergence("t*log(t)").argmin == pytest.approx(1 / math.e)
    with pytest.raises(ValueError, match=r"'x' is not known here, got 'x' in 'x\*\*2'"):
        divergence("x**2")
