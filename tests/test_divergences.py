"""Laws of the table of divergences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.divergences import DIVERGENCES, Divergence, divergence

ROWS = [*DIVERGENCES.values(), *(divergence({"alpha": a}) for a in (0.1, 0.5, 0.9))]
every_row = pytest.mark.parametrize("row", ROWS, ids=repr)

# f of t, as methods.md 3.4 writes it.
GENERATORS = {
    "reverse_kl": lambda t: t * math.log(t),
    "forward_kl": lambda t: -math.log(t),
    "jensen_shannon": lambda t: t * math.log(2 * t / (t + 1)) + math.log(2 / (t + 1)),
    "squared_log": lambda t: math.log(t) ** 2 / 2,
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
def test_the_derivative_is_that_of_f_up_to_a_constant(row: Divergence) -> None:
    t = torch.logspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(row.f(t.log()).sum(), t)
    difference = slope - row.derivative(t.detach().log())
    assert difference.tolist() == pytest.approx([difference[30].item()] * 61, rel=1e-9, abs=1e-9)


@every_row
def test_f_of_one_is_zero_so_that_the_divergence_from_itself_is(row: Divergence) -> None:
    assert row.f(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-12)


@every_row
def test_the_derivative_falls_without_bound_towards_zero_so_f_induces_dpo(row: Divergence) -> None:
    slopes = row.derivative(torch.tensor([-10.0, -100.0, -1000.0], dtype=torch.float64)).tolist()
    # Forward KL and alpha reach the clamp's exponent; the others fall on.
    assert slopes[0] < -math.log(2)
    assert slopes[1] < slopes[0]
    assert slopes[2] <= slopes[1]


@pytest.mark.parametrize(
    ("row", "smallest"),
    [
        (row, {"reverse_kl": 1 / math.e}.get(row.name, 1.0))
        for row in ROWS
        if row.name != "forward_kl"
    ],
    ids=lambda value: str(value),
)
def test_f_is_smallest_where_the_table_of_the_methods_says(
    row: Divergence, smallest: float
) -> None:
    u = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    assert u[row.f(u).argmin()].exp().item() == pytest.approx(smallest, rel=2e-4)


def test_forward_kl_has_no_smallest_value() -> None:
    u = torch.linspace(-30, 30, 601, dtype=torch.float64)
    assert (DIVERGENCES["forward_kl"].f(u).diff() < 0).all()


@every_row
@pytest.mark.parametrize("u", [-300.0, 300.0])
def test_value_derivative_and_their_gradients_are_finite_in_float32(
    row: Divergence, u: float
) -> None:
    for function in (row.f, row.derivative):
        leaf = torch.tensor([u], requires_grad=True)
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


def test_a_mapping_that_is_no_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown divergence"):
        divergence({"aplha": 0.5})
