"""What samples of a proposal q say of the policy, the target and the reference.

Estimators of Go et al. 2023 (arXiv:2302.08215) and its code, self-normalised: weights pi/q and p/q
of the samples are divided by their sum. Log-probabilities are nats a completion.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.divergences import LARGEST_EXPONENT, LOG_2

Vector = Float[Tensor, " samples"]


@dataclass(frozen=True)
class Drawn:
    """Samples of a proposal under all who have a say.

    Args:
        logp: log pi(y|x).
        proposal_logp: log q(y|x).
        reference_logp: log a(y|x).
        target_logp: log p(y|x); -inf where the target excludes it.
        frequencies: how often each stands, in sum 1: all alike of samples, q of an enumeration.
    """

    logp: Vector
    proposal_logp: Vector
    reference_logp: Vector
    target_logp: Vector
    frequencies: Vector

    @property
    def policy_weights(self) -> Vector:
        """By which samples of q are means over the policy."""
        return (self.frequencies.log() + self.logp - self.proposal_logp).softmax(0)

    @property
    def target_weights(self) -> Vector | None:
        """By which samples of q are means over the target; None if it allows none of them."""
        scores = self.frequencies.log() + self.target_logp - self.proposal_logp
        return scores.softmax(0) if (scores > -torch.inf).any() else None


def of_policy(drawn: Drawn) -> dict[str, float]:
    """KL(pi || a) and the policy's entropy, nats a completion."""
    weights = drawn.policy_weights
    return {
        "kl": (weights * (drawn.logp - drawn.reference_logp)).sum().item(),
        "entropy": -(weights * drawn.logp).sum().item(),
    }


def to_target(drawn: Drawn) -> dict[str, float]:
    """Distances between policy and target; empty if the target allows none of the samples.

    `kl_p_pi`, `kl_pi_p` and `js` are nats a completion, `tv` and `ess_share` are in [0, 1]. `js` is
    the usual one, at most log 2. Where the target is zero KL(pi || p) is infinite: there log pi/p
    is taken for 50. `ess_share` is Kish's effective share of the samples for means over the target.
    """
    pi, p = drawn.policy_weights, drawn.target_weights
    if p is None:
        return {}
    u = (drawn.logp - drawn.target_logp).clamp(max=LARGEST_EXPONENT)
    middle = torch.logaddexp(drawn.logp, drawn.target_logp) - LOG_2
    from_target = torch.where(p > 0, drawn.target_logp - middle, 0.0)
    return {
        "kl_p_pi": -(p * u).sum().item(),
        "kl_pi_p": (pi * u).sum().item(),
        "tv": 0.5 * (pi - p).abs().sum().item(),
        "js": 0.5 * ((p * from_target).sum() + (pi * (drawn.logp - middle)).sum()).item(),
        "ess_share": 1 / (len(p) * p.square().sum().item()),
    }
