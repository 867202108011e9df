"""The identities between methods."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tabular import (
    REFERENCE,
    REWARDS,
    best_policy,
    bradley_terry,
    double,
    gradient,
    kl,
    minimise,
    normalised,
    over_pairs,
    pairs,
    rankings,
    revisions,
    samples,
)
from torch import Tensor

from prefopt import proofs
from prefopt.batches import Pairs, SequentialPairs, SharedPairs, WeightedPairs
from prefopt.divergences import divergence
from prefopt.losses import LOSSES
from prefopt.losses.distributional import f_dpg
from prefopt.losses.listwise import dpo_rw, exo_rw, f_po, infonca
from prefopt.losses.pairwise import cal_dpo, dpo, exo_pref, f_dpo, ipo, psi_po, sppo
from prefopt.losses.self_improvement import srpo
from prefopt.proofs import Case
from prefopt.psi import optimum, psi

BETA = 0.5
TARGET = normalised(REFERENCE * (REWARDS / BETA).exp())
PREFERENCES = bradley_terry(REWARDS)
UNIFORM = double([0.25] * 4)
ALL_PAIRS = UNIFORM[:, None] * UNIFORM

# Each completion as often among ten candidates as the reference writes it. The softmax over these
# is the policy's own distribution, so that lists have the optimum that they have as K grows; with
# each completion once the reference would count as uniform.
ALL_CANDIDATES = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3])

EPSILONS = [1e-3, 0.05, 0.1]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def random_logratios(seed: int = 0, num: int = 200, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(2, num, generator=generator, dtype=torch.float64))


def test_x_1_f_dpo_of_the_reverse_kl_dpo_and_its_lists_of_two_are_one_loss() -> None:
    chosen, rejected = random_logratios(scale=20.0)
    pair = pairs(chosen, rejected)
    lists = rankings(torch.stack([chosen, rejected], 1), [1.0, 0.0])
    expected = [
        math.log1p(math.exp(-abs(z))) + max(-z, 0) for z in (0.1 * (chosen - rejected)).tolist()
    ]
    for found in (
        dpo(pair, beta=0.1),
        f_dpo(pair, beta=0.1, divergence=divergence("reverse_kl")),
        # At this temperature the target is one-hot in float64.
        dpo_rw(lists, beta=0.1, temperature=1e-3),
        infonca(lists, beta=0.1, temperature=1e-3),
    ):
        assert found.tolist() == pytest.approx(expected, rel=1e-12)


def of_candidates(loss: Callable[..., Tensor], u: Tensor, **hyperparameters: float) -> Tensor:
    batch = rankings(u[ALL_CANDIDATES], REWARDS[ALL_CANDIDATES])
    return loss(batch, **hyperparameters).sum()


# Losses of the log-ratios of all four completions, each an expectation.
ROUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "the KL-regularised reward": lambda u: (
        REFERENCE * u.exp() * (BETA * u - REWARDS)
    ).sum(),  # beta KL - E r
    "dpo": lambda u: over_pairs(partial(dpo, beta=BETA), u, PREFERENCES),
    "f_dpo of the reverse_kl": lambda u: over_pairs(
        partial(f_dpo, beta=BETA, divergence=divergence("reverse_kl")), u, PREFERENCES
    ),
    # On soft preferences; the clip is there because 0 and 1 would have infinite logits, and no
    # preference here is so near to either.
    "psi_po of the logit": lambda u: over_pairs(
        partial(psi_po, tau=BETA, psi=psi({"logit": 1e-6})), u, ALL_PAIRS, PREFERENCES
    ),
    **{
        f"{name} at {beta} and {BETA / beta}": partial(
            lambda u, loss, beta: of_candidates(loss, u, beta=beta, temperature=BETA / beta),
            loss=loss,
            beta=beta,
        )
        for name, loss in (("exo_rw", exo_rw), ("dpo_rw", dpo_rw))
        for beta in (0.5, 1.0)
    },
    "f_po of the jensen_shannon": lambda u: of_candidates(
        partial(f_po, divergence=divergence("jensen_shannon")), u, beta=BETA, temperature=1.0
    ),
}


@pytest.mark.parametrize("start", [(0.0, 0.0, 0.0, 0.0), (2.0, -1.0, 0.5, -2.0)])
@pytest.mark.parametrize("route", ROUTES)
def test_x_2_every_route_ends_at_the_reference_tilted_by_rewards(
    route: str, start: tuple[float, ...]
) -> None:
    found = best_policy(ROUTES[route], REFERENCE, start)
    assert found.tolist() == pytest.approx(TARGET.tolist(), abs=1e-6)
    assert found.tolist() == pytest.approx((0.049061, 0.100021, 0.181257, 0.669660), abs=1e-6)


@pytest.mark.parametrize(
    "name", ["reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger"]
)
@pytest.mark.parametrize("on_policy", [True, False])
def test_x_2_f_dpg_to_the_tilted_target_ends_there_for_any_f(name: str, on_policy: bool) -> None:
    logits = REFERENCE.log()
    for _ in range(600):
        proposal = logits.softmax(0) if on_policy else UNIFORM

        def surrogate(x: Tensor, proposal: Tensor = proposal) -> Tensor:
            evidence = samples(x.log_softmax(0), proposal.log(), TARGET.log())
            return (proposal * f_dpg(evidence, divergence=divergence(name))).sum()

        (slope,) = gradient(surrogate, logits)
        logits = logits - 2.0 * slope
    assert logits.softmax(0).tolist() == pytest.approx(TARGET.tolist(), abs=1e-6)


def test_x_2_psis_closed_form_for_the_logit_is_the_same_policy() -> None:
    for behaviour in (UNIFORM, REFERENCE):
        found = optimum(REFERENCE, PREFERENCES, behaviour, psi({"logit": 1e-6}), BETA)
        assert found.tolist() == pytest.approx(TARGET.tolist(), abs=1e-12)


@pytest.mark.parametrize("baseline", [-2.0, 0.0, 0.7])
def test_x_3_f_dpg_of_the_reverse_kl_is_reinforce_on_the_regularised_reward(
    baseline: float,
) -> None:
    log_z = (REFERENCE * (REWARDS / BETA).exp()).sum().log()
    policy = double([0.3, 0.1, 0.2, 0.4])
    # One sample of each completion: not in expectation, but sample by sample.
    (of_f_dpg,) = gradient(
        lambda logp: f_dpg(
            samples(logp, policy.log(), TARGET.log(), baseline),
            divergence=divergence("reverse_kl"),
        ),
        policy.log(),
    )
    regularised = REWARDS - BETA * (policy / REFERENCE).log()
    same_baseline = BETA * (baseline + 1 + log_z)
    expected = -(regularised - same_baseline) / BETA
    assert of_f_dpg.tolist() == pytest.approx(expected.tolist(), abs=1e-13)


@pytest.mark.parametrize(
    ("loss", "name"), [(exo_rw, "reverse_kl"), (dpo_rw, "forward_kl")], ids=["exo_rw", "dpo_rw"]
)
@pytest.mark.parametrize("seed", range(3))
def test_x_4_lists_of_all_candidates_have_f_dpgs_gradient_to_the_tilted_target(
    loss: Callable[..., Tensor], name: str, seed: int
) -> None:
    logits = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    policy = logits.softmax(0)

    def of_lists(x: Tensor) -> Tensor:
        u = x.log_softmax(0) - REFERENCE.log()
        return of_candidates(loss, u, beta=1.0, temperature=BETA)

    def of_samples(x: Tensor) -> Tensor:
        evidence = samples(x.log_softmax(0), policy.log(), TARGET.log())
        return (policy * f_dpg(evidence, divergence=divergence(name))).sum()

    (found,), (expected,) = gradient(of_lists, logits), gradient(of_samples, logits)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-13)


def test_x_5_sppo_fixes_both_log_ratios_and_ipo_their_difference_alone() -> None:
    beta, start = 0.1, (2.0, 3.0)

    def ended(loss: Callable[[Pairs], Tensor]) -> list[float]:
        return minimise(lambda u: loss(pairs(u[:1], u[1:])).sum(), start).tolist()

    assert ended(partial(sppo, beta=beta)) == pytest.approx((5.0, -5.0), abs=1e-9)
    chosen, rejected = ended(partial(ipo, tau=beta / 2))
    assert chosen - rejected == pytest.approx(1 / beta, abs=1e-9)
    assert chosen + rejected == pytest.approx(sum(start), abs=1e-9)
    # What SPPO fixes is one of IPO's minima.
    assert ipo(pairs(5.0, -5.0), tau=beta / 2).item() == pytest.approx(0, abs=1e-24)


@pytest.mark.parametrize("calibration", [0.5, 1e4])
def test_x_5_cal_dpos_calibration_is_sppo_and_its_logarithm_pushes_a_little_beyond(
    calibration: float,
) -> None:
    beta = 0.1
    u = random_logratios(num=20)
    difference = cal_dpo(pairs(*u), beta=beta, calibration=calibration) - dpo(pairs(*u), beta=1.0)
    expected = calibration * sppo(pairs(*u), beta=beta)
    assert difference.tolist() == pytest.approx(expected.tolist(), rel=1e-12)

    def loss(u: Tensor) -> Tensor:
        return cal_dpo(pairs(u[:1], u[1:]), beta=beta, calibration=calibration).sum()

    chosen, rejected = minimise(loss, (2.0, 3.0)).tolist()
    beyond = sigmoid(rejected - chosen) / (2 * calibration)
    assert (chosen, rejected) == pytest.approx((5 + beyond, -5 - beyond), abs=1e-9)
    assert 0 < beyond < 1e-4


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_x_6_srpos_generator_without_an_improver_is_ipo_at_half_its_beta(beta: float) -> None:
    chosen, rejected = random_logratios()
    zero = torch.zeros(200, dtype=torch.float64)
    found = srpo(revisions(chosen, rejected, zero, zero, zero, zero), beta=beta, alpha=0.0)
    expected = beta**2 * ipo(pairs(chosen, rejected), tau=beta / 2)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_x_7_cdpo_and_exo_pref_stop_at_the_same_margin(epsilon: float) -> None:
    stationary = math.log((1 - epsilon) / epsilon) / 0.1
    for loss in (dpo, exo_pref):

        def of_margin(h: Tensor, loss: Callable[..., Tensor] = loss) -> Tensor:
            return loss(pairs(h, 0 * h), beta=0.1, label_smoothing=epsilon).sum()

        assert minimise(of_margin, [15.0]).item() == pytest.approx(stationary, abs=1e-6)
        (slope,) = gradient(of_margin, [stationary])
        assert slope.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_x_7_cdpo_is_the_forward_kl_and_exo_pref_the_reverse(epsilon: float) -> None:
    p = double([1 - epsilon, epsilon])
    entropy = -(p * p.log()).sum().item()
    for h in (-30.0, -1.0, 0.0, 4.0, 50.0):
        q = double([0.1 * h, 0.0]).softmax(0)
        cdpo = dpo(pairs(h, 0.0), beta=0.1, label_smoothing=epsilon).item()
        assert cdpo == pytest.approx(kl(p, q).item() + entropy, rel=1e-12)
        exo = exo_pref(pairs(h, 0.0), beta=0.1, label_smoothing=epsilon).item()
        assert exo == pytest.approx(kl(q, p).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("reverse_kl", 1.0),
        ("squared_log", 1.0),
        ("mixed_chi_squared", 2.0),
        ("pearson_chi_squared", 2.0),
        ("jensen_shannon", 0.5),
    ],
)
def test_x_8_at_the_reference_f_dpo_has_dpos_gradient_times_the_scores_slope(
    name: str, ratio: float
) -> None:
    def slopes(loss: Callable[[Pairs], Tensor]) -> list[float]:
        return [g.item() for g in gradient(lambda w, r: loss(pairs(w, r)), 0.0, 0.0)]

    found = slopes(partial(f_dpo, beta=0.1, divergence=divergence(name)))
    of_dpo = slopes(partial(dpo, beta=0.1))
    assert of_dpo == pytest.approx([-0.05, 0.05], rel=1e-12)
    assert found == pytest.approx([ratio * g for g in of_dpo], rel=1e-12)


OF_PAIRS = [
    case
    for loss in LOSSES.values()
    if loss.family in ("pairwise", "reference_free")
    for case in proofs.cases(loss)
]
# The value of a surrogate of a gradient means nothing: FG-4 and M-2 hold its gradient instead.
SURROGATES = ("f_dpg", "rloo")
OF_REFERENCES = [
    case
    for loss in LOSSES.values()
    if loss.reference and loss.name not in SURROGATES
    for case in proofs.cases(loss)
]


def swapped(batch: Any) -> Any:
    """The sides exchanged, all else kept."""
    match batch:
        case Pairs():
            return Pairs(batch.rejected, batch.chosen, batch.preference)
        case SharedPairs():
            return SharedPairs(swapped(batch.whole), swapped(batch.shared))
        case WeightedPairs():
            return replace(batch, pairs=swapped(batch.pairs))
        case SequentialPairs():
            return SequentialPairs(swapped(batch.pairs), batch.rejected_kl, batch.chosen_kl)
        case _:
            raise ValueError(type(batch))


def levelled(batch: Any) -> Any:
    """The chosen side on both sides."""
    match batch:
        case Pairs():
            return replace(batch, rejected=batch.chosen)
        case SharedPairs():
            return SharedPairs(levelled(batch.whole), levelled(batch.shared))
        case WeightedPairs():
            return replace(batch, pairs=levelled(batch.pairs))
        case SequentialPairs():
            kl_of_both = batch.chosen_kl
            return SequentialPairs(levelled(batch.pairs), kl_of_both, kl_of_both)
        case _:
            raise ValueError(type(batch))


@pytest.mark.parametrize("case", OF_PAIRS, ids=str)
def test_x_9_swapping_chosen_and_rejected_changes_every_loss(case: Case) -> None:
    for seed in range(20):
        batch = proofs.batch_of(case.loss.evidence, seed=seed)
        if isinstance(batch, Pairs):
            assert torch.equal(swapped(batch).margin, -batch.margin)
        assert ((case(swapped(batch)) - case(batch)).abs() > 1e-9).all()
        level = levelled(batch)
        assert torch.equal(case(swapped(level)), case(level))


def test_x_9_where_a_score_is_not_injective_a_swap_can_leave_the_loss() -> None:
    # u e^-u rises to u = 1 and falls again: 0.5 and this one have the same score, and a margin.
    other = minimise(lambda u: (u * (-u).exp() - 0.5 * math.exp(-0.5)).square().sum(), [1.8])
    assert other.item() > 1.7
    squared_po = partial(f_dpo, beta=0.1, divergence=divergence("squared_log"))
    pair = pairs(0.5, other)
    assert squared_po(pair).item() == pytest.approx(math.log(2), abs=1e-9)
    assert squared_po(swapped(pair)).item() == pytest.approx(math.log(2), abs=1e-9)


@pytest.mark.parametrize("case", OF_REFERENCES, ids=str)
def test_x_10_a_constant_on_policy_and_reference_of_a_completion_changes_nothing(
    case: Case,
) -> None:
    batch = proofs.batch_of(case.loss.evidence)
    generator = torch.Generator().manual_seed(1)
    constants: dict[str, Tensor] = {}

    def shift(name: str, tensor: Tensor) -> Tensor:
        completion, _, field = name.rpartition(".")
        if field not in ("logp", "reference_logp", "proposal_logp"):
            return tensor
        # Samples were drawn by an earlier policy, which has the constant too.
        completion = ".completions" if field == "proposal_logp" else completion
        if completion not in constants:
            drawn = torch.randint(-4, 5, tensor.shape, generator=generator)
            constants[completion] = 16.0 * drawn.double()
        return tensor + constants[completion]

    found = case(proofs.mapped(batch, shift))
    assert any(constant.abs().max() > 0 for constant in constants.values())
    assert found.tolist() == pytest.approx(case(batch).tolist(), rel=1e-9, abs=1e-12)
