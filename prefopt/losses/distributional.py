"""Losses on samples of a proposal, for matching the policy to a target distribution."""

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.batches import Samples
from prefopt.divergences import LARGEST_EXPONENT, Divergence
from prefopt.domains import Negative

# What log pi/p is taken for where the target is zero: beyond it f' has its limit in float32.
EXCLUDED = 1e4

PerSample = Float[Tensor, " batch"]


def f_dpg(samples: Samples, *, divergence: Divergence, floor: Negative = -50.0) -> PerSample:
    """A surrogate whose gradient is that of D_f(pi || p), p any target.

    Go et al. 2023 (arXiv:2302.08215). The pseudo-reward -f'(pi/p) carries no gradient; any
    baseline leaves the expected gradient unchanged. The value is no divergence: log an estimate of
    that instead.

    Args:
        samples: evidence; drawn from another proposal they are weighted by pi/q.
        divergence: any, DPO-inducing or not.
        floor: pseudo-rewards below it are raised to it. Where the target is zero the reverse KL's
            would be -inf.

    Gradient:
        in expectation, grad D_f(pi || p)

    Optimum:
        p, for every f.

    Elsewhere:
        disco: FDPGTuner and its losses; its TV was twice this one before 1.1.1.
    """
    with torch.no_grad():
        weight = torch.exp((samples.logp - samples.proposal_logp).clamp(max=LARGEST_EXPONENT))
        rewards = pseudo_rewards(samples.logp - samples.target_logp, divergence, floor)
        advantage = rewards - samples.baseline
    return -weight * advantage * samples.logp


def pseudo_rewards(
    u: Float[Tensor, "*shape"], divergence: Divergence, floor: float
) -> Float[Tensor, "*shape"]:
    """-f'(pi/p), raised to the floor.

    Args:
        u: log pi/p; infinite where the target is zero.
        divergence: any.
        floor: below zero.
    """
    return (-divergence.derivative(u.clamp(max=EXCLUDED))).clamp(min=floor)


def leave_one_out(rewards: Float[Tensor, "prompts k"]) -> Float[Tensor, "prompts k"]:
    """For each of K >= 2 rewards the mean of the K - 1 others.

    As a baseline it leaves the expected gradient unchanged, because a sample has no say in its own.
    Kool, van Hoof and Welling 2019.
    """
    return (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
