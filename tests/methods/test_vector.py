"""The unit-test vector: one pair through every loss."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tabular import double, pairs, vector
from torch import Tensor

from prefopt.batches import Labelled, Pairs, Scored, SequentialPairs, WeightedPairs
from prefopt.divergences import divergence
from prefopt.losses.pairwise import (
    apo_down,
    apo_zero,
    bco_pair,
    cal_dpo,
    chi_po,
    dpo,
    dpop,
    exo_pref,
    f_dpo,
    hinge,
    ipo,
    nca_pair,
    rdpo,
    sppo,
    tdpo1,
    tdpo2,
    wpo,
)
from prefopt.losses.reference_free import log_odds, orpo, simpo, slic
from prefopt.losses.unpaired import kto

CHOSEN = Scored(vector(-12.0), vector(-12.5), torch.tensor([10]))
REJECTED = Scored(vector(-15.0), vector(-14.0), torch.tensor([12]))
PAIR = Pairs(CHOSEN, REJECTED, vector(1.0))

# The printed six digits, and no more.
PRINTED = 5e-7


def softplus(z: float) -> float:
    return math.log1p(math.exp(z))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def odds(mean_logp: float) -> float:
    return mean_logp - math.log1p(-math.exp(mean_logp))


def exo_formula(z: float, epsilon: float) -> float:
    q, p = (sigmoid(z), sigmoid(-z)), (1 - epsilon, epsilon)
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def test_vector_2_1_has_log_ratios_of_a_half_and_of_minus_one() -> None:
    assert CHOSEN.logratio.item() == 0.5
    assert REJECTED.logratio.item() == -1.0
    assert PAIR.margin.item() == 1.5


ODDS = odds(-1.2) - odds(-1.25)
LINK = (0.5 + math.exp(0.5)) - (-1.0 + math.exp(-1.0))
SQUARES = (0.5 - 5) ** 2 + (-1 + 5) ** 2


@pytest.mark.parametrize(
    ("loss", "printed", "formula"),
    [
        pytest.param(loss, printed, formula, id=name)
        for name, loss, printed, formula in [
            ("dpo", partial(dpo, beta=0.1), 0.620957, softplus(-0.15)),
            (
                "cdpo",
                partial(dpo, beta=0.1, label_smoothing=0.1),
                0.635957,
                0.9 * softplus(-0.15) + 0.1 * softplus(0.15),
            ),
            (
                "rdpo",
                partial(rdpo, beta=0.1, label_smoothing=0.1),
                0.602207,
                (0.9 * softplus(-0.15) - 0.1 * softplus(0.15)) / 0.8,
            ),
            ("ipo of sums", partial(ipo, tau=0.1), 12.25, (1.5 - 5) ** 2),
            ("hinge", partial(hinge, beta=0.1), 0.85, 1 - 0.15),
            ("slic", partial(slic, delta=1.0, nll_weight=0.1), 1.2, 0.1 * 12),
            (
                "orpo with per-token nll",
                partial(orpo, odds_weight=0.1),
                1.265837,
                1.2 + 0.1 * softplus(-ODDS),
            ),
            (
                "squared_po",
                partial(f_dpo, beta=0.1, divergence=divergence("squared_log")),
                0.553439,
                softplus(-0.1 * (0.5 * math.exp(-0.5) + math.e)),
            ),
            (
                "f_dpo of the jensen_shannon",
                partial(f_dpo, beta=0.1, divergence=divergence("jensen_shannon")),
                0.652068,
                softplus(-0.1 * (softplus(1.0) - softplus(-0.5))),
            ),
            (
                "f_dpo of the forward_kl",
                partial(f_dpo, beta=0.1, divergence=divergence("forward_kl")),
                0.593124,
                softplus(-0.1 * (math.e - math.exp(-0.5))),
            ),
            (
                "f_dpo of alpha",
                partial(f_dpo, beta=0.1, divergence=divergence({"alpha": 0.5})),
                0.609934,
                softplus(-0.1 * 2 * (math.exp(0.5) - math.exp(-0.25))),
            ),
            ("simpo", partial(simpo, beta=2.0, gamma=0.5), 0.913015, softplus(0.5 - 2 * 0.05)),
            (
                "chi_po without a clip",
                partial(chi_po, beta=0.1, max_reward=100.0),
                0.563740,
                softplus(-0.1 * LINK),
            ),
            (
                "f_dpo of chi_po's mixture",
                partial(f_dpo, beta=0.1, divergence=divergence("mixed_chi_squared")),
                0.563740,
                softplus(-0.1 * LINK),
            ),
            (
                "cal_dpo",
                partial(cal_dpo, beta=0.1, calibration=0.5),
                18.326413,
                softplus(-1.5) + SQUARES / 2,
            ),
            (
                "dpop without a fall",
                partial(dpop, beta=0.1, penalty=5.0),
                0.620957,
                softplus(-0.15),
            ),
            (
                "nca_pair",
                partial(nca_pair, beta=0.1),
                1.349888,
                softplus(-0.05) + (softplus(0.05) + softplus(-0.1)) / 2,
            ),
            ("bco_pair", partial(bco_pair, beta=0.1), 1.312856, softplus(-0.05) + softplus(-0.1)),
            ("apo_zero", partial(apo_zero, beta=0.1), 0.962523, 1 - sigmoid(0.05) + sigmoid(-0.1)),
            ("apo_down", partial(apo_down, beta=0.1), 0.975068, sigmoid(0.05) + 1 - sigmoid(0.15)),
            ("sppo, the sum", partial(sppo, beta=0.1), 36.25, SQUARES),
            (
                "exo_pref",
                partial(exo_pref, beta=0.1, label_smoothing=1e-3),
                2.505517,
                exo_formula(0.15, 1e-3),
            ),
        ]
    ],
)
def test_vector_2_1_of_a_loss_on_pairs(
    loss: Callable[[Pairs], Tensor], printed: float, formula: float
) -> None:
    assert loss(PAIR).item() == pytest.approx(formula, rel=1e-12)
    assert loss(PAIR).item() == pytest.approx(printed, abs=PRINTED)


def test_vector_2_1_of_ipo_per_token_is_that_of_log_ratios_divided_by_lengths() -> None:
    # The library has the paper's IPO, of sums; TRL's and HALOs' is the same regression on means.
    per_token = pairs(CHOSEN.mean_logratio, REJECTED.mean_logratio)
    found = ipo(per_token, tau=0.1).item()
    assert found == pytest.approx((0.5 / 10 + 1 / 12 - 5) ** 2, rel=1e-12)
    assert found == pytest.approx(23.684444, abs=PRINTED)


def test_vector_2_1_of_sppos_mean_of_the_two_squares_is_half_its_sum() -> None:
    # SPPO's repository has the mean, the library and TRL the sum.
    assert sppo(PAIR, beta=0.1).item() / 2 == pytest.approx(18.125, abs=PRINTED)


def test_vector_2_1_of_dpop_where_the_chosen_has_fallen() -> None:
    found = dpop(pairs(-0.4, -1.0), beta=0.1, penalty=5.0).item()
    assert found == pytest.approx(softplus(-0.1 * (0.6 - 5 * 0.4)), rel=1e-12)
    assert found == pytest.approx(0.765595, abs=PRINTED)


def test_vector_2_1_of_orpos_odds_term() -> None:
    found = (orpo(PAIR, odds_weight=1.0) + CHOSEN.mean_logp).item()
    assert found == pytest.approx(softplus(-ODDS), rel=1e-12)
    assert found == pytest.approx(0.658372, abs=PRINTED)
    assert log_odds(CHOSEN.mean_logp).item() == pytest.approx(odds(-1.2), rel=1e-12)


@pytest.mark.parametrize(
    ("completion", "desirable", "printed", "formula"),
    [
        pytest.param(CHOSEN, True, 0.492501, 1 - sigmoid(0.1 * (0.5 - 0.2)), id="desirable"),
        pytest.param(REJECTED, False, 0.470036, 1 - sigmoid(0.1 * (0.2 + 1.0)), id="undesirable"),
    ],
)
def test_vector_2_1_of_kto_with_a_reference_point_of_a_fifth(
    completion: Scored, desirable: bool, printed: float, formula: float
) -> None:
    mismatched = Scored(vector(-19.8), vector(-20.0), torch.tensor([10]))
    found = kto(Labelled(completion, torch.tensor([desirable]), mismatched), beta=0.1).item()
    assert found == pytest.approx(formula, rel=1e-12)
    assert found == pytest.approx(printed, abs=PRINTED)


@pytest.mark.parametrize(
    ("loss", "printed", "margin"),
    [
        pytest.param(partial(tdpo1, beta=0.1), 0.598139, 1.5 - (0.3 - 0.8), id="tdpo1"),
        pytest.param(
            partial(tdpo2, beta=0.1, alpha=0.5), 0.609470, 1.5 - 0.5 * (0.3 - 0.8), id="tdpo2"
        ),
    ],
)
def test_vector_2_1_of_token_level_dpo(
    loss: Callable[[SequentialPairs], Tensor], printed: float, margin: float
) -> None:
    found = loss(SequentialPairs(PAIR, vector(0.8), vector(0.3))).item()
    assert found == pytest.approx(softplus(-0.1 * margin), rel=1e-12)
    assert found == pytest.approx(printed, abs=PRINTED)


def test_vector_2_1_of_wpo_with_a_log_weight_of_minus_one() -> None:
    found = wpo(WeightedPairs(PAIR, double([math.exp(-1)])), beta=0.1).item()
    assert found == pytest.approx(softplus(-0.15) / math.e, rel=1e-12)
    assert found == pytest.approx(0.228437, abs=PRINTED)
