"""The checks of targets: fitted moments, normalisers, and estimators of distances to a target."""

import math

import pytest
import torch
from tabular import double, kl, normalised
from torch import Tensor

from prefopt import ebm
from prefopt.estimates import Drawn, of_policy, to_target

PRINTED = 5e-7
BASE = double([0.30, 0.20, 0.15, 0.12, 0.10, 0.07, 0.04, 0.02])
FEATURES = double([[float(i >= 4), float(i % 2)] for i in range(8)])
MOMENTS = double([0.5, 0.6])
# The reference as a table of samples: each point as often as it is likely.
POINTS = torch.arange(8).repeat_interleave((100 * BASE).round().long())
ONE_GROUP = torch.zeros(100, dtype=torch.long)
ALL = torch.ones(100, dtype=torch.bool)


def fitted(moments: Tensor, features: Tensor = FEATURES) -> ebm.Fit:
    names = [f"moments.{i}" for i in range(len(moments))]
    return ebm.fitted(features[POINTS], moments, ONE_GROUP, allowed=ALL, names=names)


def on_points(weights: Tensor) -> Tensor:
    return torch.zeros(8, dtype=torch.float64).index_add(0, POINTS, weights)


def test_fg_5_one_binary_feature_has_its_lambda_in_closed_form() -> None:
    feature = (torch.arange(200) < 20).double()[:, None]
    groups = torch.zeros(200, dtype=torch.long)
    everything = torch.ones(200, dtype=torch.bool)
    fit = ebm.fitted(feature, double([0.5]), groups, allowed=everything, names=["x"])
    assert fit.lambdas.item() == pytest.approx(math.log(9), abs=1e-5)
    assert fit.target.weights[:20].sum().item() == pytest.approx(0.5, abs=1e-6)
    # A factor is the limit of the moment 1.
    factor = ebm.normalised(torch.where(feature[:, 0] == 1, 0.0, -math.inf), groups)
    assert factor.kl == pytest.approx(math.log(10), rel=1e-12)
    assert factor.log_z.item() == pytest.approx(-math.log(10), rel=1e-12)
    assert factor.weights.tolist() == pytest.approx([1 / 20] * 20 + [0.0] * 180, rel=1e-12)
    assert factor.ess == pytest.approx(20)


def test_fg_6_two_features_have_the_lambdas_of_their_moments() -> None:
    fit = fitted(MOMENTS)
    assert fit.lambdas.tolist() == pytest.approx([1.228153, 0.797099], abs=1e-5)
    assert fit.reached.tolist() == pytest.approx(MOMENTS.tolist(), abs=ebm.TOLERANCE)
    assert fit.target.log_z.exp().item() == pytest.approx(2.320221, rel=1e-5)
    expected = [0.129298, 0.191283, 0.064649, 0.114770, 0.147181, 0.228625, 0.058872, 0.065322]
    assert on_points(fit.target.weights).tolist() == pytest.approx(expected, abs=2e-6)
    assert fit.target.kl == pytest.approx(0.250674, abs=2e-6)
    assert fit.num_steps < 10


def test_fg_7_the_fit_is_the_nearest_to_the_reference_by_pythagoras() -> None:
    p = on_points(fitted(MOMENTS).target.weights)
    uniform = ebm.fitted(
        FEATURES,
        MOMENTS,
        torch.zeros(8, dtype=torch.long),
        allowed=torch.ones(8, dtype=torch.bool),
        names=["a", "b"],
    ).target.weights
    assert kl(uniform, BASE).item() == pytest.approx(0.348097, abs=2e-6)
    assert kl(uniform, BASE).item() == pytest.approx(
        kl(uniform, p).item() + kl(p, BASE).item(), abs=1e-5
    )


def test_prompts_have_normalisers_of_their_own_and_moments_are_means_over_prompts() -> None:
    groups = torch.arange(3).repeat(40)
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(120, 2, generator=generator, dtype=torch.float64)
    allowed = torch.ones(120, dtype=torch.bool)
    moments = double([0.6, 0.4])
    fit = ebm.fitted(features, moments, groups, allowed=allowed, names=["a", "b"])
    by_group = []
    for group in range(3):
        mine = features[groups == group]
        scores = mine @ fit.lambdas
        expected = scores.exp().mean().log().item()
        assert fit.target.log_z[group].item() == pytest.approx(expected, abs=1e-12)
        by_group.append(normalised(scores.exp()) @ mine)
    assert torch.stack(by_group).mean(0).tolist() == pytest.approx(moments.tolist(), abs=1e-6)


def test_a_prompt_that_a_factor_excludes_whole_is_left_out() -> None:
    scores = double([0.0, 1.0, -math.inf, -math.inf])
    target = ebm.normalised(scores, torch.tensor([0, 0, 1, 1]))
    assert target.log_z.tolist() == pytest.approx([math.log((1 + math.e) / 2), -math.inf])
    assert target.weights.tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e), 0, 0])
    assert target.weights.isfinite().all()


@pytest.mark.parametrize(
    ("moments", "features", "message"),
    [
        ([0.5], [[0.0]] * 8, r"moments\.0: never occurs in 100 samples.*, got 0 in each"),
        ([0.5], [[3.0]] * 8, r"moments\.0: does not vary in 100 samples.*, got 3 in each"),
        ([7.5], [[float(i)] for i in range(8)], r"a moment of 7\.5 .* more than 0 and less than 7"),
        # The first feature implies the second.
        (
            [0.6, 0.3],
            [[float(i < 3), float(i < 5)] for i in range(8)],
            r"moments\.0, moments\.1: moments that no tilt .*, got \[0\.6, 0\.3\] and came to",
        ),
    ],
)
def test_what_the_reference_cannot_reach_is_refused(
    moments: list[float], features: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(double(moments), double(features))


def test_a_target_on_too_few_effective_samples_is_refused() -> None:
    scores = double([0.0] * 99 + [9.0])
    target = ebm.normalised(scores, torch.zeros(100, dtype=torch.long))
    weights = normalised(scores.exp())
    assert target.ess == pytest.approx(1 / weights.square().sum().item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"x: too far .*, got 1\.02 effective ones of 100"):
        ebm.check_ess(target, "x")
    with pytest.raises(ValueError, match="allows none of 100 samples"):
        ebm.normalised(scores - math.inf, torch.zeros(100, dtype=torch.long))


def test_many_prompts_do_not_make_up_for_few_samples_of_each() -> None:
    # Of 50 prompts' four samples one has all the weight: 50 effective ones, one a prompt.
    groups = torch.arange(50).repeat_interleave(4)
    target = ebm.normalised(double([0.0, 0.0, 0.0, 20.0] * 50), groups)
    assert target.ess == pytest.approx(50, rel=1e-3)
    torch.testing.assert_close(target.group_ess, torch.ones(50).double(), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"x: .* got a median of 1 effective ones of 4, .*log_z"):
        ebm.check_ess(target, "x")
    ebm.check_ess(ebm.normalised(double([0.0] * 200), groups), "x")
    # A prompt that is allowed nothing has no say.
    scores = double([-math.inf] * 4 + [0.0] * 196)
    assert ebm.normalised(scores, groups).typical_group_ess == pytest.approx(4)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("q", [[1 / 8] * 8, [0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
def test_fg_8_estimators_of_an_enumeration_are_exact_for_any_proposal(
    binary: bool, q: list[float]
) -> None:
    scores = torch.where(FEATURES[:, 0] == 1, 0.0, -math.inf) if binary else FEATURES @ MOMENTS
    p = normalised(BASE * scores.exp())
    pi = normalised([8.0, 7, 6, 5, 4, 3, 2, 1])
    proposal = double(q)
    drawn = Drawn(pi.log(), proposal.log(), BASE.log(), p.log(), proposal)
    found = to_target(drawn)
    where = p > 0
    middle = (p + pi) / 2
    assert found["kl_p_pi"] == pytest.approx((p * (p / pi).log())[where].sum().item(), abs=1e-12)
    assert found["tv"] == pytest.approx(0.5 * (p - pi).abs().sum().item(), abs=1e-12)
    js = 0.5 * ((p * (p / middle).log())[where].sum() + kl(pi, middle))
    assert found["js"] == pytest.approx(js.item(), abs=1e-12)
    if binary:
        assert p[4:].tolist() == pytest.approx(
            [0.434783, 0.304348, 0.173913, 0.086957], abs=PRINTED
        )
        assert (p * (p / BASE).log())[where].sum().item() == pytest.approx(1.469676, abs=PRINTED)
        # Infinite, but for the 50 nats of what the target excludes.
        finite = (pi * (pi / p).log())[where].sum().item()
        assert found["kl_pi_p"] == pytest.approx(50 * pi[~where].sum().item() + finite, rel=1e-12)
    else:
        assert found["kl_pi_p"] == pytest.approx(kl(pi, p).item(), abs=1e-12)
    policy = of_policy(drawn)
    assert policy["kl"] == pytest.approx(kl(pi, BASE).item(), abs=1e-12)
    assert policy["entropy"] == pytest.approx(-(pi * pi.log()).sum().item(), abs=1e-12)


def test_a_step_without_a_sample_that_the_target_allows_has_no_distances() -> None:
    logp = double([-1.0, -2.0])
    drawn = Drawn(logp, logp, logp, logp - math.inf, double([0.5, 0.5]))
    assert to_target(drawn) == {}
    assert all(map(math.isfinite, of_policy(drawn).values()))
