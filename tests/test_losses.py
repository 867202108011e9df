"""Laws of the losses. Expected values are formulas of `math`, in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefopt.batches import Pairs, Scored
from prefopt.divergences import DIVERGENCES, Divergence, divergence
from prefopt.losses import LOSSES
from prefopt.losses.pairwise import dpo, exo_pref, f_dpo, ipo, slic

# The vector of methods.md 2.1: u_w = 0.5, u_l = -1, h = 1.5.
LOGP = {"chosen": -12.0, "rejected": -15.0}
REFERENCE_LOGP = {"chosen": -12.5, "rejected": -14.0}


def pairs_of(
    chosen: Any, rejected: Any, *, reference: float = 0.0, dtype: torch.dtype = torch.float64
) -> Pairs:
    """Pairs with the given log-ratios, over references of `reference` nats."""

    def scored(logratios: Any) -> Scored:
        u = torch.atleast_1d(torch.as_tensor(logratios, dtype=dtype))
        constant = torch.full_like(u, reference)
        return Scored(u + constant, constant, torch.ones(u.shape, dtype=torch.long))

    batch = torch.atleast_1d(torch.as_tensor(chosen)).shape
    return Pairs(scored(chosen), scored(rejected), torch.ones(batch))


def gradients(
    loss: Callable[[Pairs], Tensor], chosen: float, rejected: float
) -> tuple[float, float]:
    """d loss / d u of the chosen and of the rejected completion."""
    u = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    loss(pairs_of(u[:1], u[1:])).sum().backward()
    assert u.grad is not None
    return u.grad[0].item(), u.grad[1].item()


def log_sigmoid(z: float) -> float:
    return min(z, 0.0) - math.log1p(math.exp(-abs(z)))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def exo_formula(z: float, epsilon: float) -> float:
    q = (sigmoid(z), sigmoid(-z))
    p = (1 - epsilon, epsilon)
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def cdpo_formula(z: float, epsilon: float) -> float:
    return -(1 - epsilon) * log_sigmoid(z) - epsilon * log_sigmoid(-z)


@dataclass(frozen=True)
class Case:
    """A loss with its hyperparameters, and its formula in the two log-ratios."""

    id: str
    name: str
    hyperparameters: dict[str, Any]
    formula: Callable[[float, float], float]

    @property
    def loss(self) -> Callable[[Pairs], Tensor]:
        return partial(LOSSES[self.name].function, **self.hyperparameters)

    @property
    def at_reference(self) -> float:
        return LOSSES[self.name].at_reference(**self.hyperparameters)


# f'(e^u) in u, up to a constant, as methods.md 3.4 gives it.
DERIVATIVES: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda u: u,
    "forward_kl": lambda u: -math.exp(-u),
    "jensen_shannon": lambda u: math.log(2 * math.exp(u) / (math.exp(u) + 1)),
    "squared_log": lambda u: u / math.exp(u),
    "alpha(0.5)": lambda u: (1 - math.exp(u) ** -0.5) / 0.5,
    "alpha(0.2)": lambda u: (1 - math.exp(u) ** -0.2) / 0.2,
}
ALL_DIVERGENCES = [*DIVERGENCES.values(), divergence({"alpha": 0.5}), divergence({"alpha": 0.2})]


def f_dpo_case(d: Divergence) -> Case:
    score = DERIVATIVES[d.name]
    return Case(
        f"f_dpo-{d.name}",
        "f_dpo",
        {"beta": 0.1, "divergence": d},
        lambda w, r: -log_sigmoid(0.1 * score(w) - 0.1 * score(r)),
    )


CASES = [
    Case("dpo", "dpo", {"beta": 0.1}, lambda w, r: -log_sigmoid(0.1 * (w - r))),
    Case(
        "cdpo",
        "dpo",
        {"beta": 0.1, "label_smoothing": 0.1},
        lambda w, r: cdpo_formula(0.1 * (w - r), 0.1),
    ),
    Case("ipo", "ipo", {"tau": 0.1}, lambda w, r: (w - r - 1 / 0.2) ** 2),
    *map(f_dpo_case, ALL_DIVERGENCES),
    Case(
        "exo_pref",
        "exo_pref",
        {"beta": 0.1, "label_smoothing": 0.001},
        lambda w, r: exo_formula(0.1 * (w - r), 0.001),
    ),
    Case("slic", "slic", {"beta": 0.1}, lambda w, r: max(0.0, 1 - 0.1 * (w - r))),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def test_every_loss_and_every_divergence_of_the_tables_has_a_case_here() -> None:
    assert {case.name for case in CASES} == set(LOSSES)
    used = {case.hyperparameters["divergence"].name for case in CASES if case.name == "f_dpo"}
    assert used >= set(DIVERGENCES)


@every_case
def test_the_value_is_the_formula(case: Case) -> None:
    sides = {
        side: Scored(
            torch.tensor([LOGP[side]], dtype=torch.float64),
            torch.tensor([REFERENCE_LOGP[side]], dtype=torch.float64),
            torch.tensor([10]),
        )
        for side in ("chosen", "rejected")
    }
    value = case.loss(Pairs(**sides, preference=torch.ones(1)))
    assert value.tolist() == pytest.approx([case.formula(0.5, -1.0)], rel=1e-12)


@every_case
@settings(deadline=None, derandomize=True, max_examples=50)
@given(chosen=st.floats(-8, 8), rejected=st.floats(-8, 8))
def test_the_value_is_the_formula_at_any_log_ratios(
    case: Case, chosen: float, rejected: float
) -> None:
    value = case.loss(pairs_of(chosen, rejected)).item()
    assert value == pytest.approx(case.formula(chosen, rejected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (partial(dpo, beta=0.1), 0.620957),
        (partial(dpo, beta=0.1, label_smoothing=0.1), 0.635957),
        (partial(ipo, tau=0.1), 12.25),
        (partial(slic, beta=0.1), 0.85),
        (partial(exo_pref, beta=0.1, label_smoothing=1e-3), 2.505517),
        (partial(f_dpo, beta=0.1, divergence=DIVERGENCES["squared_log"]), 0.553439),
        (partial(f_dpo, beta=0.1, divergence=DIVERGENCES["forward_kl"]), 0.593124),
        (partial(f_dpo, beta=0.1, divergence=DIVERGENCES["jensen_shannon"]), 0.652068),
        (partial(f_dpo, beta=0.1, divergence=divergence({"alpha": 0.5})), 0.609934),
    ],
)
def test_the_value_is_that_of_the_published_vector(
    loss: Callable[[Pairs], Tensor], value: float
) -> None:
    assert loss(pairs_of(0.5, -1.0)).item() == pytest.approx(value, abs=5e-7)


@every_case
def test_the_value_at_the_reference_is_the_declared_one(case: Case) -> None:
    expected = {
        "dpo": math.log(2),
        "f_dpo": math.log(2),
        "ipo": 1 / (4 * 0.1**2),
        "exo_pref": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
        "slic": 1.0,
    }[case.name]
    assert case.at_reference == pytest.approx(expected, rel=1e-12)
    values = case.loss(pairs_of([0.0, 0.0], [0.0, 0.0], reference=-12.5)).tolist()
    assert values == pytest.approx([expected] * 2, rel=1e-12)


@every_case
def test_a_batch_gives_one_loss_a_pair(case: Case) -> None:
    chosen, rejected = [0.5, 0.0, -2.0], [-1.0, 0.3, 1.0]
    together = case.loss(pairs_of(chosen, rejected)).tolist()
    alone = [case.loss(pairs_of(w, r)).item() for w, r in zip(chosen, rejected, strict=True)]
    assert together == pytest.approx(alone, rel=1e-14)


@every_case
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected(case: Case) -> None:
    chosen, rejected = gradients(case.loss, 0.3, -0.5)
    assert chosen < 0 < rejected


@every_case
@pytest.mark.parametrize("chosen", [-300.0, 0.0, 300.0])
@pytest.mark.parametrize("rejected", [-300.0, 0.0, 300.0])
def test_value_and_gradient_are_finite_in_float32_at_log_ratios_of_300(
    case: Case, chosen: float, rejected: float
) -> None:
    u = torch.tensor([chosen, rejected], requires_grad=True)
    loss = case.loss(pairs_of(u[:1], u[1:], dtype=torch.float32))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert u.grad is not None
    assert u.grad.isfinite().all()


@every_case
def test_the_gradient_reaches_only_logp(case: Case) -> None:
    leaves = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for leaf in leaves:
        leaf.requires_grad_()
    tokens = torch.ones(3, dtype=torch.long)
    logps, references = leaves[:2], [leaf.detach() for leaf in leaves[2:]]
    pairs = Pairs(
        Scored(logps[0], references[0], tokens),
        Scored(logps[1], references[1], tokens),
        torch.ones(3),
    )
    case.loss(pairs).sum().backward()
    assert all(logp.grad is not None and logp.grad.abs().sum() > 0 for logp in logps)
    assert all(reference.grad is None for reference in [*references, *leaves[2:]])


@every_case
def test_a_constant_on_policy_and_reference_alike_changes_nothing(case: Case) -> None:
    values = case.loss(pairs_of([0.5, 1.5], [-1.0, 2.0])).tolist()
    # Powers of two, so that adding them to these log-ratios rounds nothing off.
    shifted = case.loss(pairs_of([0.5, 1.5], [-1.0, 2.0], reference=-64.0)).tolist()
    assert shifted == values


@settings(deadline=None, derandomize=True)
@given(beta=st.floats(0.01, 5), chosen=st.floats(-20, 20), rejected=st.floats(-20, 20))
def test_f_dpo_of_the_reverse_kl_is_dpo(beta: float, chosen: float, rejected: float) -> None:
    pairs = pairs_of(chosen, rejected)
    reverse_kl = DIVERGENCES["reverse_kl"]
    assert f_dpo(pairs, beta=beta, divergence=reverse_kl).item() == pytest.approx(
        dpo(pairs, beta=beta).item(), rel=1e-12
    )


def test_dpo_without_smoothing_is_cdpo_at_zero() -> None:
    pairs = pairs_of([0.5, -3.0], [-1.0, 2.0])
    assert torch.equal(dpo(pairs, beta=0.1), dpo(pairs, beta=0.1, label_smoothing=0.0))


@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 0.1])
@pytest.mark.parametrize("loss", [dpo, exo_pref])
def test_cdpo_and_exo_pref_are_stationary_at_the_same_margin(
    loss: Callable[..., Tensor], epsilon: float
) -> None:
    bound = partial(loss, beta=0.1, label_smoothing=epsilon)
    stationary = math.log((1 - epsilon) / epsilon) / 0.1
    assert gradients(bound, stationary, 0.0) == pytest.approx((0.0, 0.0), abs=1e-12)
    below, above = (gradients(bound, stationary + d, 0.0)[0] for d in (-0.5, 0.5))
    assert below < 0 < above


def test_exo_pref_is_zero_where_the_policy_has_the_smoothed_preference() -> None:
    pairs = pairs_of(math.log(0.9 / 0.1) / 0.1, 0.0)
    assert exo_pref(pairs, beta=0.1, label_smoothing=0.1).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("z", [-2.0, 0.0, 1.0, 2.0, 8.0])
def test_the_gradient_of_exo_pref_is_the_papers(z: float) -> None:
    epsilon = 1e-3
    gradient, _ = gradients(partial(exo_pref, beta=1.0, label_smoothing=epsilon), z, 0.0)
    expected = sigmoid(z) * sigmoid(-z) * (z - math.log((1 - epsilon) / epsilon))
    assert gradient == pytest.approx(expected, rel=1e-9)


def test_ipo_is_zero_at_its_own_margin_and_only_there() -> None:
    assert ipo(pairs_of(5.0, 0.0), tau=0.1).item() == 0.0
    assert gradients(partial(ipo, tau=0.1), 5.0, 0.0) == (0.0, 0.0)
    assert gradients(partial(ipo, tau=0.1), 5.5, 0.0)[0] > 0


def test_slic_ends_where_the_hinge_does() -> None:
    assert slic(pairs_of([10.0, 11.0], [0.0, 0.0]), beta=0.1).tolist() == [0.0, 0.0]
    assert gradients(partial(slic, beta=0.1), 11.0, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("reverse_kl", 1.0), ("forward_kl", 1.0), ("squared_log", 1.0), ("jensen_shannon", 0.5)],
)
def test_at_the_reference_f_dpo_has_dpos_gradient_and_jensen_shannon_half_of_it(
    name: str, ratio: float
) -> None:
    ours = gradients(partial(f_dpo, beta=0.1, divergence=DIVERGENCES[name]), 0.0, 0.0)
    dpos = gradients(partial(dpo, beta=0.1), 0.0, 0.0)
    assert ours == pytest.approx([ratio * gradient for gradient in dpos], rel=1e-12)


@pytest.mark.parametrize(
    ("chosen", "rejected"), [(0.0, 0.0), (0.3, -0.5), (-1.0, -3.0), (1.0, -1.0), (2.0, -1.0)]
)
def test_the_gradient_of_squared_log_is_the_papers(chosen: float, rejected: float) -> None:
    beta = 0.1
    margin = beta * (chosen * math.exp(-chosen) - rejected * math.exp(-rejected))
    expected = (
        -beta * sigmoid(-margin) * (1 - chosen) * math.exp(-chosen),
        beta * sigmoid(-margin) * (1 - rejected) * math.exp(-rejected),
    )
    squared = partial(f_dpo, beta=beta, divergence=DIVERGENCES["squared_log"])
    assert gradients(squared, chosen, rejected) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_squared_log_pushes_a_chosen_down_that_exceeds_e_times_its_reference() -> None:
    squared = partial(f_dpo, beta=0.1, divergence=DIVERGENCES["squared_log"])
    assert gradients(squared, 0.9, -1.0)[0] < 0 < gradients(squared, 1.1, -1.0)[0]


REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)


def population_optimum(d: Divergence, beta: float) -> Tensor:
    """The policy on four outcomes that minimises the expected f-DPO loss of Bradley-Terry pairs."""
    logits = REFERENCE.log().clone().requires_grad_()
    first, second = torch.triu_indices(4, 4, 1)
    preference = (REWARDS[first] - REWARDS[second]).sigmoid()
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        u = logits.log_softmax(0) - REFERENCE.log()
        ahead = f_dpo(pairs_of(u[first], u[second]), beta=beta, divergence=d)
        behind = f_dpo(pairs_of(u[second], u[first]), beta=beta, divergence=d)
        loss = (preference * ahead + (1 - preference) * behind).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().softmax(0)


@pytest.mark.parametrize("d", ALL_DIVERGENCES, ids=repr)
def test_the_minimiser_of_f_dpo_solves_the_regularised_bandit(d: Divergence) -> None:
    beta = 0.5
    policy = population_optimum(d, beta)
    t = (policy / REFERENCE).tolist()
    multipliers = [
        reward - beta * DERIVATIVES[d.name](math.log(ratio))
        for reward, ratio in zip(REWARDS.tolist(), t, strict=True)
    ]
    assert multipliers == pytest.approx([multipliers[0]] * 4, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("reverse_kl", (0.049061, 0.100021, 0.181257, 0.669660)),
        ("forward_kl", (0.096619, 0.095542, 0.093459, 0.714380)),
        ("jensen_shannon", (0.006741, 0.014153, 0.027910, 0.951196)),
        ("squared_log", (0.125097, 0.110395, 0.091324, 0.673184)),
    ],
)
def test_the_minimiser_of_f_dpo_is_the_published_one(name: str, policy: tuple[float, ...]) -> None:
    found = population_optimum(DIVERGENCES[name], 0.5).tolist()
    assert found == pytest.approx(policy, abs=2e-6)


def test_the_minimiser_of_dpo_is_the_closed_form() -> None:
    weights = REFERENCE * torch.exp(REWARDS / 0.5)
    found = population_optimum(DIVERGENCES["reverse_kl"], 0.5)
    assert found.tolist() == pytest.approx((weights / weights.sum()).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "chosen_logratio"), [("reverse_kl", -3.364), ("squared_log", -3.595)]
)
def test_displacement_with_tied_features_is_the_published_one(
    name: str, chosen_logratio: float
) -> None:
    assert displaced(DIVERGENCES[name], 1000) == pytest.approx(chosen_logratio, abs=0.01)


def test_displacement_of_squared_log_reaches_a_plateau_where_dpo_runs_away() -> None:
    assert displaced(DIVERGENCES["squared_log"], 3000) > -3.739 - 0.01
    assert displaced(DIVERGENCES["reverse_kl"], 3000) < -8


def displaced(d: Divergence, num_steps: int) -> float:
    """The chosen log-ratio after gradient descent on theta * (0.9, 1, 0), uniform reference."""
    features = torch.tensor([0.9, 1.0, 0.0], dtype=torch.float64)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    u = torch.zeros(3, dtype=torch.float64)
    for _ in range(num_steps):
        u = (theta * features).log_softmax(0) + math.log(3)
        loss = f_dpo(pairs_of(u[:1], u[1:2]), beta=0.1, divergence=d).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - gradient).detach().requires_grad_()
    return u[0].item()
