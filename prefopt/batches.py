"""What losses read: small named batches of per-completion log-probabilities.

Log-probabilities are float32 nats, summed over the tokens of a completion given its prompt; the
prompt is excluded and the end-of-sequence token, where the completion has one, is included.
`symbols` gives a batch's quantities under the names that formulas use.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Symbols = dict[str, Tensor]


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

    @property
    def mean_logratio(self) -> Float[Tensor, "*shape"]:
        """Log-ratio per token."""
        return self.logratio / self.tokens

    def symbols(self) -> Symbols:
        return {"u": self.logratio, "logp": self.logp, "n": self.tokens.to(self.logp.dtype)}


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

    def symbols(self) -> Symbols:
        return _sides(w=self.chosen.symbols(), l=self.rejected.symbols()) | {
            "h": self.margin,
            "p": self.preference,
        }


@dataclass(frozen=True)
class SharedPairs:
    """Pairs, and the same pairs with both sides cut to the length of the shorter one.

    Args:
        whole: as they are.
        shared: log-probabilities of the first min(|y_w|, |y_l|) tokens.
    """

    whole: Pairs
    shared: Pairs

    def symbols(self) -> Symbols:
        shared = {"u_w": self.shared.chosen.logratio, "u_l": self.shared.rejected.logratio}
        return self.whole.symbols() | {
            "h_shared": self.shared.margin,
            "u_shared_w": shared["u_w"],
            "u_shared_l": shared["u_l"],
        }


@dataclass(frozen=True)
class WeightedPairs:
    """Pairs with an importance weight each.

    Args:
        pairs: evidence.
        weight: how likely the policy is to write both sides, in (0, 1]; carries no gradient.
    """

    pairs: Pairs
    weight: Float[Tensor, " batch"]

    def symbols(self) -> Symbols:
        return self.pairs.symbols() | {"weight": self.weight}


@dataclass(frozen=True)
class SequentialPairs:
    """Pairs with the sequential KL of each side.

    Args:
        pairs: evidence.
        chosen_kl: K(y_w), the sum over y_w's positions of KL(pi_ref || pi_theta) of the next
            token, in nats; carries the gradient.
        rejected_kl: K(y_l).
    """

    pairs: Pairs
    chosen_kl: Float[Tensor, " batch"]
    rejected_kl: Float[Tensor, " batch"]

    def symbols(self) -> Symbols:
        return self.pairs.symbols() | {"kl_w": self.chosen_kl, "kl_l": self.rejected_kl}


@dataclass(frozen=True)
class Rankings:
    """K completions of each prompt, with rewards.

    Args:
        completions: K >= 2 a prompt.
        rewards: one a completion, in the reward's own units.
    """

    completions: Scored
    rewards: Float[Tensor, "batch k"]

    def symbols(self) -> Symbols:
        k = torch.tensor(self.rewards.shape[-1], dtype=self.rewards.dtype)
        return self.completions.symbols() | {"r": self.rewards, "k": k}


@dataclass(frozen=True)
class Labelled:
    """Single completions, each called desirable or not.

    Args:
        completions: one a prompt.
        desirable: the label.
        mismatched: a completion of another prompt under each prompt; carries no gradient.
    """

    completions: Scored
    desirable: Bool[Tensor, " batch"]
    mismatched: Scored

    def symbols(self) -> Symbols:
        return self.completions.symbols() | {
            "desirable": self.desirable.to(self.completions.logp.dtype),
            "u_mismatched": self.mismatched.logratio,
        }


@dataclass(frozen=True)
class Revisions:
    """A pair under the plain prompt, and each side under the prompt that shows a completion.

    Args:
        chosen: y_w given x.
        rejected: y_l given x.
        chosen_given_rejected: y_w given x and y_l, by the revision prompt.
        rejected_given_rejected: y_l given x and y_l.
        chosen_given_chosen: y_w given x and y_w.
        rejected_given_chosen: y_l given x and y_w.
    """

    chosen: Scored
    rejected: Scored
    chosen_given_rejected: Scored
    rejected_given_rejected: Scored
    chosen_given_chosen: Scored
    rejected_given_chosen: Scored

    def symbols(self) -> Symbols:
        return _sides(w=self.chosen.symbols(), l=self.rejected.symbols()) | {
            "u_w_given_l": self.chosen_given_rejected.logratio,
            "u_l_given_l": self.rejected_given_rejected.logratio,
            "u_w_given_w": self.chosen_given_chosen.logratio,
            "u_l_given_w": self.rejected_given_chosen.logratio,
        }


@dataclass(frozen=True)
class Samples:
    """Completions drawn from a proposal q, for matching the policy to a target p.

    Args:
        logp: log pi_theta(y|x); carries the gradient.
        proposal_logp: log q(y|x) at the time of sampling.
        target_logp: log p(y|x), normalised; -inf where the target excludes a completion.
        baseline: what is subtracted from pseudo-rewards; zero, or a mean of others.
    """

    logp: Float[Tensor, " batch"]
    proposal_logp: Float[Tensor, " batch"]
    target_logp: Float[Tensor, " batch"]
    baseline: Float[Tensor, " batch"]

    def symbols(self) -> Symbols:
        return {
            "logp": self.logp,
            "logp_q": self.proposal_logp,
            "logp_p": self.target_logp,
            "baseline": self.baseline,
        }


@dataclass(frozen=True)
class Rollouts:
    """Completions drawn from a proposal q, with rewards.

    Args:
        completions: as policy and reference see them.
        proposal_logp: log q(y|x) at the time of sampling.
        rewards: one a completion, in the reward's own units.
        baseline: what is subtracted from rewards: the mean of r - beta log q/pi_ref over the other
            completions of the prompt.
    """

    completions: Scored
    proposal_logp: Float[Tensor, " batch"]
    rewards: Float[Tensor, " batch"]
    baseline: Float[Tensor, " batch"]

    @property
    def proposal_logratio(self) -> Float[Tensor, " batch"]:
        """Log q(y|x) - log pi_ref(y|x)."""
        return self.proposal_logp - self.completions.reference_logp

    def symbols(self) -> Symbols:
        return self.completions.symbols() | {
            "logp_q": self.proposal_logp,
            "u_q": self.proposal_logratio,
            "r": self.rewards,
            "baseline": self.baseline,
        }


def _sides(**sides: Symbols) -> Symbols:
    return {f"{name}_{side}": x for side, symbols in sides.items() for name, x in symbols.items()}
