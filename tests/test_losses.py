"""Laws of the losses: the proof suite, properties at random, and what only one loss promises.

The papers' own checks, by their numbers, are in `methods/`.
"""

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefopt import batches, domains
from prefopt.batches import Labelled, Pairs, Samples, Scored
from prefopt.divergences import DIVERGENCES, divergence
from prefopt.losses import LOSSES, Loss, pairwise
from prefopt.losses.distributional import f_dpg
from prefopt.losses.formulas import hyperparameters_of, implicit_rewards, value
from prefopt.losses.likelihood import nll
from prefopt.losses.listwise import exo_rw, f_po
from prefopt.losses.pairwise import chi_po, dpo, exo_pref, f_dpo, hinge, ld_dpo, psi_po, r_dpo
from prefopt.losses.reference_free import orpo, preferred_ft, slic
from prefopt.losses.unpaired import kto
from prefopt.proofs import LAWS, Case, batch_of, cases, proofs
from prefopt.psi import psi

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=lambda loss: loss.name)
PROOFS = [proof for loss in LOSSES.values() for proof in proofs(loss)]


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: f"{proof.case}: {proof.law}")
def test_the_law_holds(proof: Any) -> None:
    assert proof.holds, f"off by {proof.error}, tolerated {proof.tolerance}"


WITHOUT_REFERENCE = {"simpo", "cpo", "orpo", "slic", "preferred_ft"}


def test_every_law_is_proven_of_every_loss_that_it_speaks_of() -> None:
    silent = {
        # No printed derivative of sums over completions, and none of a surrogate's value.
        "printed gradient is autograds": {"dpo_rw", "exo_rw", "infonca", "nca", "f_po"},
        "value at the reference is declared": {*WITHOUT_REFERENCE, "f_dpg", "rloo", "ppo"},
    }
    for law in LAWS:
        name = law.__name__.replace("_", " ")
        proven = {proof.case.split("(")[0] for proof in PROOFS if proof.law == name}
        assert proven == set(LOSSES) - silent.get(name, set()), name


def test_every_divergence_is_proven_where_it_is_admitted() -> None:
    inducing = {d.name for d in DIVERGENCES.values() if d.dpo_inducing}
    variants = {
        name: {case.variant for case in cases(LOSSES[name])} for name in ("f_dpo", "f_po", "f_dpg")
    }
    assert variants["f_dpo"] >= inducing
    assert not variants["f_dpo"] & (set(DIVERGENCES) - inducing)
    assert variants["f_po"] >= set(DIVERGENCES)
    assert variants["f_dpg"] >= set(DIVERGENCES)


DPO = LOSSES["dpo"]


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (replace(DPO, formula="-log_sigmoid(beta*h)"), "value is the formula"),
        (replace(DPO, formula="-log_sigmoid(beta*h)"), "gradient is the formulas"),
        (replace(DPO, at_reference="1"), "value at the reference is declared"),
        (replace(DPO, couples=True), "splitting a micro batch changes nothing"),
        (replace(LOSSES["kto"], couples=False), "splitting a micro batch changes nothing"),
        (replace(DPO, reference=False), "a constant on policy and reference changes nothing"),
        (
            replace(LOSSES["simpo"], reference=True),
            "a constant on policy and reference changes nothing",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_row_that_lies_is_found_out(broken: Loss, law: str) -> None:
    assert law in {proof.law for proof in proofs(broken) if not proof.holds}


def swapped(pairs: Pairs, *, beta: domains.Positive, label_smoothing: domains.Smoothing) -> Tensor:
    return dpo(Pairs(pairs.rejected, pairs.chosen, pairs.preference), beta=beta)


def overflowing(
    pairs: Pairs, *, beta: domains.Positive, label_smoothing: domains.Smoothing
) -> Tensor:
    return -torch.log(torch.sigmoid(10 * beta * pairs.margin))


def detached(pairs: Pairs, *, beta: domains.Positive, label_smoothing: domains.Smoothing) -> Tensor:
    return dpo(pairs, beta=beta, label_smoothing=label_smoothing).detach() + 0 * pairs.margin


def leaking(pairs: Pairs, *, beta: domains.Positive, label_smoothing: domains.Smoothing) -> Tensor:
    return dpo(pairs, beta=beta, label_smoothing=label_smoothing) * pairs.margin.shape[0]


@pytest.mark.parametrize(
    ("function", "law"),
    [
        (swapped, "descent raises what is preferred"),
        (overflowing, "value and gradient are finite"),
        (detached, "gradient reaches the policy alone"),
        (leaking, "splitting a micro batch changes nothing"),
    ],
)
def test_a_function_that_breaks_a_law_is_found_out(
    function: Callable[..., Tensor], law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairwise, "dpo", function)
    assert law in {proof.law for proof in proofs(DPO) if not proof.holds}


@every_loss
def test_a_row_names_its_function_its_evidence_and_its_paper(loss: Loss) -> None:
    first, *_ = inspect.signature(loss.function).parameters.values()
    assert first.annotation is vars(batches)[loss.evidence]
    documentation = inspect.getdoc(loss.function) or ""
    for number in loss.paper.replace(";", " ").split():
        if number[0].isdigit() and "." in number:
            assert f"arXiv:{number}" in documentation
    for section in ("Optimum:", "Elsewhere:"):
        assert section in documentation


@every_loss
def test_hyperparameters_have_domains_and_are_all_read(loss: Loss) -> None:
    for name, parameter in hyperparameters_of(loss).items():
        assert parameter.annotation is not float, name
        assert name in loss.formula or name in ("divergence", "psi"), name


DOMAINS = {
    domains.Positive: st.floats(0.01, 5),
    domains.NonNegative: st.floats(0, 5),
    domains.Negative: st.floats(-60, -1),
    domains.Smoothing: st.floats(0, 0.49),
    domains.OpenSmoothing: st.floats(1e-4, 0.49),
    domains.Fraction: st.floats(0.01, 0.99),
    domains.Share: st.floats(0, 1),
}


@every_loss
@settings(deadline=None, derandomize=True, max_examples=25)
@given(data=st.data())
def test_the_value_is_the_formula_whatever_the_hyperparameters(
    loss: Loss, data: st.DataObject
) -> None:
    case = data.draw(st.sampled_from(cases(loss)))
    drawn = {
        name: data.draw(DOMAINS[parameter.annotation], label=name)
        for name, parameter in hyperparameters_of(loss).items()
        if parameter.annotation in DOMAINS
    }
    case = replace(case, hyperparameters=case.hyperparameters | drawn)
    spread = data.draw(st.floats(0, 8), label="spread")
    seed = data.draw(st.integers(0, 1000), label="seed")

    def logratios(shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        # At most 2, so that no log-probability of the evidence becomes positive.
        return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(max=2)

    batch = batch_of(loss.evidence, logratios=logratios, seed=seed)
    expected = value(loss, loss.formula, batch.symbols(), case.hyperparameters)
    assert case(batch).tolist() == pytest.approx(expected.tolist(), rel=1e-8, abs=1e-10)


def pairs_of(chosen: Any, rejected: Any, *, reference: float = -64.0) -> Pairs:
    """Pairs with the given log-ratios, of ten tokens a side."""

    def scored(logratios: Any) -> Scored:
        u = torch.atleast_1d(torch.as_tensor(logratios, dtype=torch.float64))
        constant = torch.full_like(u, reference)
        return Scored(u + constant, constant, torch.full(u.shape, 10))

    batch = torch.atleast_1d(torch.as_tensor(chosen)).shape
    return Pairs(scored(chosen), scored(rejected), torch.ones(batch, dtype=torch.float64))


def gradients(
    loss: Callable[[Pairs], Tensor], chosen: float, rejected: float
) -> tuple[float, float]:
    """d loss / d u of the chosen and of the rejected completion."""
    u = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    loss(pairs_of(u[:1], u[1:], reference=0.0)).sum().backward()
    assert u.grad is not None
    return u.grad[0].item(), u.grad[1].item()


@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 0.1])
@pytest.mark.parametrize("loss", [dpo, exo_pref])
def test_cdpo_and_exo_pref_turn_at_the_same_margin(
    loss: Callable[..., Tensor], epsilon: float
) -> None:
    bound = partial(loss, beta=0.1, label_smoothing=epsilon)
    stationary = math.log((1 - epsilon) / epsilon) / 0.1
    below, above = (gradients(bound, stationary + d, 0.0)[0] for d in (-0.5, 0.5))
    assert below < 0 < above


def test_hinge_ends_where_its_margin_is_reached() -> None:
    assert hinge(pairs_of([10.0, 11.0], [0.0, 0.0]), beta=0.1).tolist() == [0.0, 0.0]
    assert gradients(partial(hinge, beta=0.1), 11.0, 0.0) == (0.0, 0.0)


def test_squared_log_pushes_a_chosen_down_that_exceeds_e_times_its_reference() -> None:
    squared = partial(f_dpo, beta=0.1, divergence=DIVERGENCES["squared_log"])
    assert gradients(squared, 0.9, -1.0)[0] < 0 < gradients(squared, 1.1, -1.0)[0]


def test_a_formula_of_the_user_is_the_divergence_that_it_writes() -> None:
    pairs = pairs_of([0.5, -3.0, 2.0], [-1.0, 2.0, 0.0])
    written = f_dpo(pairs, beta=0.1, divergence=divergence("0.5*log(t)**2"))
    tabled = f_dpo(pairs, beta=0.1, divergence=DIVERGENCES["squared_log"])
    assert written.tolist() == pytest.approx(tabled.tolist(), rel=1e-12)


def test_chi_po_is_f_dpo_until_its_clip() -> None:
    pairs = pairs_of([0.5, 3.0], [-1.0, -2.0])
    free = f_dpo(pairs, beta=0.1, divergence=DIVERGENCES["mixed_chi_squared"])
    clipped = chi_po(pairs, beta=0.1, max_reward=0.5)
    assert clipped[0].item() == free[0].item()
    assert clipped[1].item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-12)
    assert gradients(partial(chi_po, beta=0.1, max_reward=0.5), 3.0, -2.0) == (0.0, 0.0)


def test_psi_po_of_the_identity_is_ipo_on_certain_preferences() -> None:
    pairs = pairs_of([0.5, -3.0], [-1.0, 2.0])
    found = psi_po(pairs, tau=0.1, psi=psi("identity"))
    assert found.tolist() == pytest.approx(pairwise.ipo(pairs, tau=0.1).tolist(), rel=1e-12)


def test_r_dpo_is_dpo_between_equals_in_length_and_lighter_on_a_longer_chosen() -> None:
    pairs = pairs_of([0.5], [-1.0])
    assert torch.equal(r_dpo(pairs, beta=0.1, alpha=0.05), dpo(pairs, beta=0.1))
    long = Scored(pairs.chosen.logp, pairs.chosen.reference_logp, pairs.chosen.tokens + 4)
    longer = r_dpo(Pairs(long, pairs.rejected, pairs.preference), beta=0.1, alpha=0.05)
    assert longer.item() == pytest.approx(math.log1p(math.exp(-0.15 - 0.05 * 4)), rel=1e-12)


def test_ld_dpo_of_one_is_dpo_and_of_zero_sees_shared_tokens_alone() -> None:
    whole, shared = pairs_of([0.5], [-1.0]), pairs_of([0.25], [-3.0])
    both = batches.SharedPairs(whole, shared)
    assert torch.equal(ld_dpo(both, beta=0.1, alpha=1.0), dpo(whole, beta=0.1))
    assert torch.equal(ld_dpo(both, beta=0.1, alpha=0.0), dpo(shared, beta=0.1))


def test_preferred_ft_is_slics_likelihood_and_sfts_by_the_completion() -> None:
    pairs = batch_of("Pairs")
    slope = slic(pairs, delta=1.0, nll_weight=1.0) - slic(pairs, delta=1.0, nll_weight=0.0)
    assert torch.allclose(preferred_ft(pairs), slope)
    tokens = int(pairs.chosen.tokens.sum())
    total = nll(pairs.chosen, tokens) * tokens
    assert preferred_ft(pairs).sum().item() == pytest.approx(total.item(), rel=1e-12)


def test_orpo_is_finite_where_a_completion_is_certain() -> None:
    logp = torch.tensor([0.0, -20.0], requires_grad=True)
    ten = torch.full((1,), 10)
    pairs = Pairs(
        Scored(logp[:1], torch.zeros(1), ten), Scored(logp[1:], torch.zeros(1), ten), torch.ones(1)
    )
    loss = orpo(pairs, odds_weight=0.1).sum()
    loss.backward()
    assert loss.isfinite()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()


def test_ktos_reference_point_is_never_negative_and_carries_no_gradient() -> None:
    u = torch.tensor([0.5, -1.0], dtype=torch.float64)
    zero, ten = torch.zeros(2, dtype=torch.float64), torch.full((2,), 10)

    def loss(mismatched: Tensor) -> Tensor:
        labels = torch.tensor([True, False])
        return kto(Labelled(Scored(u, zero, ten), labels, Scored(mismatched, zero, ten)), beta=0.1)

    below = loss(torch.tensor([-3.0, -1.0], dtype=torch.float64))
    assert below.tolist() == pytest.approx(loss(zero).tolist(), rel=1e-14)
    assert not loss(torch.ones(2, dtype=torch.float64).requires_grad_()).requires_grad


def test_a_target_that_excludes_a_sample_gives_a_floored_pseudo_reward_and_no_nan() -> None:
    logp = torch.tensor([-3.0], requires_grad=True)
    for row in DIVERGENCES.values():
        samples = Samples(logp, logp.detach(), torch.tensor([-math.inf]), torch.zeros(1))
        loss = f_dpg(samples, divergence=row, floor=-20.0)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        assert loss.isfinite().all()
        # Lowered, or left alone where f'(inf) = 0; never by more than the floor.
        assert 0 <= gradient.item() <= 20, row


def test_f_po_of_the_reverse_kl_is_exo_rw() -> None:
    rankings = batch_of("Rankings")
    found = f_po(rankings, beta=0.5, temperature=0.1, divergence=DIVERGENCES["reverse_kl"])
    expected = exo_rw(rankings, beta=0.5, temperature=0.1)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_shares_of_the_nll_add_up_to_the_mean_over_tokens() -> None:
    scored = batch_of("Pairs").chosen
    total = int(scored.tokens.sum())
    parts = [
        nll(
            Scored(scored.logp[i : i + 1], scored.reference_logp[i : i + 1], scored.tokens[:1]),
            total,
        )
        for i in range(len(scored.logp))
    ]
    assert sum(part.item() for part in parts) == pytest.approx(
        -scored.logp.sum().item() / total, rel=1e-12
    )


def test_implicit_rewards_are_those_of_the_objective() -> None:
    pairs = pairs_of([0.5], [-1.0])
    squared = {"beta": 0.1, "divergence": DIVERGENCES["squared_log"]}
    chosen, rejected = implicit_rewards(LOSSES["f_dpo"], pairs.symbols(), squared)
    assert chosen.item() == pytest.approx(0.1 * 0.5 * math.exp(-0.5), rel=1e-12)
    assert rejected.item() == pytest.approx(-0.1 * math.e, rel=1e-12)
    shared = batches.SharedPairs(pairs, pairs_of([0.25], [-3.0]))
    ld = {"beta": 0.1, "alpha": 0.5}
    chosen, rejected = implicit_rewards(LOSSES["ld_dpo"], shared.symbols(), ld)
    assert (chosen.item(), rejected.item()) == pytest.approx((0.0375, -0.2), rel=1e-12)
    sequential = batches.SequentialPairs(pairs, torch.tensor([0.8]), torch.tensor([0.3]))
    td = {"beta": 0.1, "alpha": 0.5}
    chosen, rejected = implicit_rewards(LOSSES["tdpo2"], sequential.symbols(), td)
    assert (chosen.item(), rejected.item()) == pytest.approx((0.09, -0.085), rel=1e-6)


@every_loss
def test_the_margin_of_implicit_rewards_is_what_a_logistic_loss_reads(loss: Loss) -> None:
    """Where the loss is -log sigmoid of something, that something is the margin of its rewards."""
    if not loss.formula.startswith("-log_sigmoid(") or loss.name in EXCEPTIONS:
        return
    case = cases(loss)[0]
    batch = batch_of(loss.evidence)
    chosen, rejected = implicit_rewards(loss, batch.symbols(), case.hyperparameters)
    logits = -torch.log(torch.expm1(case(batch)))
    shift = case.hyperparameters.get("gamma", 0.0)
    assert logits.tolist() == pytest.approx((chosen - rejected - shift).tolist(), rel=1e-9)


# DPOP's penalty and Cal-DPO's, CPO's and NCA's other terms are no part of a reward.
EXCEPTIONS = {"dpop", "cal_dpo", "cpo", "nca_pair", "bco_pair", "chi_po"}


def test_hyperparameters_bind_to_the_function() -> None:
    case = Case(DPO, {"beta": 0.1, "label_smoothing": 0.2})
    pairs = pairs_of([0.5], [-1.0])
    assert torch.equal(case(pairs), dpo(pairs, beta=0.1, label_smoothing=0.2))


def test_the_library_imports_in_two_seconds_more_than_torch() -> None:
    code = (
        "import time, torch\n"
        "start = time.process_time()\n"
        "import prefopt.proofs, prefopt.classification, prefopt.loop, prefopt.generation\n"
        "print(time.process_time() - start)"
    )
    finished = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert float(finished.stdout) < 2
