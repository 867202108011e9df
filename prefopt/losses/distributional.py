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
        u = (samples.logp - samples.target_logp).clamp(max=EXCLUDED)
        pseudo_reward = -divergence.derivative(u)
        advantage = pseudo_reward.clamp(min=floor) - samples.baseline
    return -weight * advantage * samples.logp
