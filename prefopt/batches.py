"""What losses read: small named batches of per-completion log-probabilities.

Log-probabilities are float32 nats, summed over the tokens of a completion given its prompt; the
prompt is excluded and the end-of-sequence token, where the completion has one, is included.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """Completions as policy and reference see them.

    Args:
        logp: log pi_theta(y|x); carries the gradient.
        reference_logp: log pi_ref(y|x).
        tokens: |y|, at least 1.
    """

    logp: Float[Tensor, "*shape"]
    reference_logp: Float[Tensor, "*shape"]
    tokens: Int[Tensor, "*shape"]

    @property
    def logratio(self) -> Float[Tensor, "*shape"]:
        """U = log pi_theta(y|x) - log pi_ref(y|x)."""
        return self.logp - self.reference_logp

    @property
    def mean_logp(self) -> Float[Tensor, "*shape"]:
        """Log-probability per token."""
        return self.logp / self.tokens


@dataclass(frozen=True)
class Pairs:
    """Two completions of each prompt, one preferred.

    Args:
        chosen: y_w.
        rejected: y_l.
        preference: P(chosen > rejected) by who labelled; below 0.5 where a coin fell the other way.
    """

    chosen: Scored
    rejected: Scored
    preference: Float[Tensor, " batch"]

    @property
    def margin(self) -> Float[Tensor, " batch"]:
        """H = logratio of chosen - logratio of rejected."""
        return self.chosen.logratio - self.rejected.logratio
