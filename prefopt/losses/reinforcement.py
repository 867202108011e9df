"""Policy gradients of a reward with a KL to the reference, on samples of a proposal.

Both maximise E[r] - beta KL(pi || pi_ref) of whole completions, which is f-DPG by the reverse KL on
the target pi_ref exp(r/beta), beta times as large. Their baseline stands in for a value network.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.batches import Rollouts
from prefopt.divergences import LARGEST_EXPONENT
from prefopt.domains import Fraction, Positive

PerSample = Float[Tensor, " batch"]


def rloo(rollouts: Rollouts, *, beta: Positive) -> PerSample:
    """REINFORCE of the KL-regularised reward, against the mean of the prompt's other completions.

    Ahmadian et al. 2024 (arXiv:2402.14740). The reward r - beta u carries no gradient. The value
    is no objective: log rewards and KL instead.

    Args:
        rollouts: evidence; drawn from another proposal they are weighted by pi/q.
        beta: weight of the KL to the reference.

    Gradient:
        in expectation, -grad (E[r] - beta KL(pi || pi_ref))

    Optimum:
        pi_ref exp(r/beta), normalised.

    Elsewhere:
        TRL: RLOOTrainer, whose ratio is clipped as PPO's.
    """
    with torch.no_grad():
        weight = _ratio(rollouts)
        reward = rollouts.rewards - beta * rollouts.completions.logratio
        advantage = reward - rollouts.baseline
    return -weight * advantage * rollouts.completions.logp


def ppo(rollouts: Rollouts, *, beta: Positive, clip: Fraction = 0.2) -> PerSample:
    """PPO's clipped surrogate: no gain from moving pi/q beyond 1 - clip or 1 + clip.

    Schulman et al. 2017 (arXiv:1707.06347), on whole completions: one ratio and one advantage for
    each, where PPO for language models has one a token and a value network. The KL is part of the
    reward, as the proposal saw it.

    Args:
        rollouts: evidence.
        beta: weight of the KL to the reference.
        clip: epsilon.

    Gradient:
        at the proposal, rloo's

    Optimum:
        pi_ref exp(r/beta), normalised.

    Elsewhere:
        TRL: PPOTrainer, by tokens.
    """
    with torch.no_grad():
        reward = rollouts.rewards - beta * rollouts.proposal_logratio
        advantage = reward - rollouts.baseline
    ratio = _ratio(rollouts)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def _ratio(rollouts: Rollouts) -> PerSample:
    """Of policy to proposal."""
    logratio = rollouts.completions.logp - rollouts.proposal_logp.detach()
    return torch.exp(logratio.clamp(max=LARGEST_EXPONENT))
