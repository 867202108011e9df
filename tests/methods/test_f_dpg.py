"""The checks of f-DPG: pseudo-rewards, the gradient theorem, convergence."""

import math
from dataclasses import dataclass

import pytest
import torch
from tabular import REFERENCE, REWARDS, double, gradient, kl, normalised, samples
from torch import Tensor

from prefopt.divergences import Divergence, divergence
from prefopt.losses.distributional import f_dpg

PRINTED = 5e-7
TARGET = double([0.5, 0.3, 0.2])
POLICY = double([0.25, 0.25, 0.5])
PROPOSALS = [(0.25, 0.25, 0.5), (1 / 3, 1 / 3, 1 / 3), (0.05, 0.9, 0.05)]


@dataclass(frozen=True)
class Row:
    """A divergence and FG-1's numbers for it.

    Args:
        name: of the divergence.
        value: D_f(pi || p).
        rewards: the pseudo-rewards.
        slope: the gradient by the policy's logits.
    """

    name: str
    value: float
    rewards: tuple[float, ...]
    slope: tuple[float, ...]

    @property
    def divergence(self) -> Divergence:
        return divergence(self.name)


ROWS = [
    Row("forward_kl", 0.218012, (2, 1.2, 0.4), (-0.25, -0.05, 0.3)),
    Row(
        "reverse_kl",
        0.239278,
        (-0.306853, -0.817678, -1.916291),
        (-0.233106, -0.105400, 0.338506),
    ),
    Row("total_variation", 0.3, (0.5, 0.5, -0.5), (-0.125, -0.125, 0.25)),
    Row(
        "jensen_shannon",
        0.111165,
        (0.405465, 0.095310, -0.356675),
        (-0.114652, -0.037113, 0.151766),
    ),
    Row("neyman_chi_squared", 0.44, (3, 0.44, -0.84), (-0.64, 0, 0.64)),
    Row("pearson_chi_squared", 0.583333, (1, 0.333333, -3), (-0.541667, -0.375, 0.916667)),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def enumerated(d: Divergence, policy: Tensor, target: Tensor = TARGET) -> Tensor:
    """D_f(pi || p)."""
    return (target * d.f((policy / target).log())).sum()


def expected_surrogate(
    d: Divergence, logits: Tensor, *, target: Tensor = TARGET, proposal: Tensor, baseline: float = 0
) -> Tensor:
    """The mean of f-DPG's loss over samples of the proposal, by enumeration."""
    logp = logits.log_softmax(0)
    evidence = samples(logp, proposal.log(), target.log(), baseline)
    return (proposal * f_dpg(evidence, divergence=d)).sum()


def surrogates_gradient(d: Divergence, policy: Tensor, **how: object) -> list[float]:
    (found,) = gradient(lambda z: expected_surrogate(d, z, **how), policy.log())
    return found.tolist()


@every_row
def test_fg_1_the_enumerated_divergence_has_its_value(row: Row) -> None:
    assert enumerated(row.divergence, POLICY).item() == pytest.approx(row.value, abs=PRINTED)


def test_fg_1_the_values_are_the_textbooks_formulas() -> None:
    middle = (POLICY + TARGET) / 2
    formulas = {
        "forward_kl": kl(TARGET, POLICY),
        "reverse_kl": kl(POLICY, TARGET),
        "total_variation": (POLICY - TARGET).abs().sum() / 2,
        "jensen_shannon": kl(POLICY, middle) + kl(TARGET, middle),
        "neyman_chi_squared": ((POLICY - TARGET) ** 2 / POLICY).sum(),
        "pearson_chi_squared": ((POLICY - TARGET) ** 2 / TARGET).sum(),
    }
    assert {row.name for row in ROWS} == set(formulas)
    for name, expected in formulas.items():
        found = enumerated(divergence(name), POLICY).item()
        assert found == pytest.approx(expected.item(), rel=1e-12)


@every_row
def test_fg_1_pseudo_rewards_are_minus_f_prime(row: Row) -> None:
    found = -row.divergence.derivative((POLICY / TARGET).log())
    assert found.tolist() == pytest.approx(row.rewards, abs=PRINTED)
    # On the policy's own samples, the loss's slope by a completion's log-probability is -reward.
    (slope,) = gradient(
        lambda logp: f_dpg(samples(logp, POLICY.log(), TARGET.log()), divergence=row.divergence),
        POLICY.log(),
    )
    assert (-slope).tolist() == pytest.approx(found.tolist(), rel=1e-12)


@every_row
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_fg_1_the_surrogates_gradient_is_the_divergences_for_any_proposal(
    row: Row, proposal: tuple[float, ...]
) -> None:
    found = surrogates_gradient(row.divergence, POLICY, proposal=double(proposal))
    assert found == pytest.approx(row.slope, abs=PRINTED)
    # By the theorem, pi_i (f'_i - E f'); and by autograd through the enumerated divergence.
    slopes = row.divergence.derivative((POLICY / TARGET).log())
    theorem = POLICY * (slopes - (POLICY * slopes).sum())
    assert found == pytest.approx(theorem.tolist(), abs=1e-12)
    (direct,) = gradient(lambda z: enumerated(row.divergence, z.softmax(0)), POLICY.log())
    assert found == pytest.approx(direct.tolist(), abs=1e-12)


@every_row
def test_fg_1_the_surrogates_gradient_is_the_divergences_finite_difference(row: Row) -> None:
    found = surrogates_gradient(row.divergence, POLICY, proposal=POLICY)
    step = 1e-6
    for i, slope in enumerate(found):
        up, down = POLICY.log(), POLICY.log()
        up[i], down[i] = up[i] + step, down[i] - step
        rise = enumerated(row.divergence, up.softmax(0)) - enumerated(
            row.divergence, down.softmax(0)
        )
        assert rise.item() / (2 * step) == pytest.approx(slope, abs=1e-8)


def test_fg_1_the_forward_kls_gradient_is_policy_less_target() -> None:
    found = surrogates_gradient(divergence("forward_kl"), POLICY, proposal=POLICY)
    assert found == pytest.approx((POLICY - TARGET).tolist(), abs=1e-14)


@pytest.mark.parametrize("policy", [(0.25, 0.25, 0.5), (0.01, 0.01, 0.98)])
def test_fg_2_the_forward_kls_mean_pseudo_reward_is_one(policy: tuple[float, ...]) -> None:
    rewards = -divergence("forward_kl").derivative((double(policy) / TARGET).log())
    assert (double(policy) * rewards).sum().item() == pytest.approx(1, abs=1e-14)


@every_row
@pytest.mark.parametrize("baseline", [-3.0, 0.7, 40.0])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_fg_2_a_baseline_leaves_the_gradient_unchanged(
    row: Row, baseline: float, proposal: tuple[float, ...]
) -> None:
    found = surrogates_gradient(
        row.divergence, POLICY, proposal=double(proposal), baseline=baseline
    )
    assert found == pytest.approx(row.slope, abs=PRINTED)


@every_row
def test_fg_3_gradient_descent_reaches_the_target_for_every_f(row: Row) -> None:
    d, start = row.divergence, double([0.2, 0.3, 0.5])
    log_target, logits = TARGET.log(), start.log()
    for step in range(20_000):
        logp = logits.log_softmax(0)
        policy = logp.exp()
        # f' less its constant, which cancels here.
        slopes = d.score(logp - log_target)
        descent = policy * (slopes - (policy * slopes).sum())
        if step % 2_000 == 0:
            by_the_loss = surrogates_gradient(d, policy, proposal=policy)
            assert descent.tolist() == pytest.approx(by_the_loss, abs=1e-12)
        # The total variation's slope does not shrink towards the target, so its rate must. A rate
        # of 1/(1 + s/200) would end between 4e-6 and 3e-5 from it, as rounding decides at the
        # start, where the second probability is exactly the target's and the slope jumps.
        decay = (1 + step / 200) ** -1.5 if row.name == "total_variation" else 1.0
        logits = logits - 0.05 * decay * descent
        if step >= 19_990:
            assert logits.softmax(0).tolist() == pytest.approx(TARGET.tolist(), abs=1e-5)


def test_fg_4_matching_the_tilted_target_by_the_reverse_kl_is_kl_regularised_rl() -> None:
    beta = 0.5
    weights = REFERENCE * (REWARDS / beta).exp()
    log_z = weights.sum().log().item()
    target = normalised(weights)

    def objective(logits: Tensor) -> Tensor:
        policy = logits.softmax(0)
        return (policy * REWARDS).sum() - beta * kl(policy, REFERENCE)

    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        logits = torch.randn(4, generator=generator, dtype=torch.float64)
        policy = logits.softmax(0)
        value = beta * log_z - beta * kl(policy, target).item()
        assert objective(logits).item() == pytest.approx(value, abs=1e-14)
        (of_objective,) = gradient(objective, logits)
        of_loss = surrogates_gradient(
            divergence("reverse_kl"), policy, target=target, proposal=policy
        )
        assert of_objective.tolist() == pytest.approx([-beta * g for g in of_loss], abs=1e-15)


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        ("forward_kl", 0.0),
        ("total_variation", -0.5),
        ("jensen_shannon", -math.log(2)),
        ("neyman_chi_squared", -1.0),
        # Minus infinity, but for the floor.
        ("reverse_kl", -50.0),
        ("pearson_chi_squared", -50.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fg_9_a_sample_that_the_target_excludes_has_a_finite_pseudo_reward(
    name: str, reward: float, dtype: torch.dtype
) -> None:
    logp = torch.tensor([-40.0, -0.5, -0.5], dtype=dtype)
    target = torch.tensor([-math.inf, -math.inf, -0.7], dtype=dtype)

    def loss(x: Tensor) -> Tensor:
        evidence = samples(x.to(dtype), logp, target)
        return f_dpg(evidence, divergence=divergence(name))

    assert loss(logp).isfinite().all()
    (slope,) = gradient(loss, logp)
    assert slope.isfinite().all()
    assert (-slope[:2]).tolist() == pytest.approx([reward] * 2, rel=1e-6, abs=1e-12)


def test_fg_9_the_floor_is_a_parameter() -> None:
    (slope,) = gradient(
        lambda logp: f_dpg(
            samples(logp, -1.0, -math.inf), divergence=divergence("reverse_kl"), floor=-7.0
        ),
        [-1.0],
    )
    assert slope.tolist() == [7.0]
