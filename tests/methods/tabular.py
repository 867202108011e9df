"""Evidence written as log-ratios, and policies whose parameters are their logits; all in float64.

The reference's log-probabilities are zero where only log-ratios matter. A loss over pairs of an
enumerable set of completions is its expectation, never a sample.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefopt.batches import Pairs, Rankings, Revisions, Samples, Scored

# The bandit of SQ-5 and X-2.
REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)

# The three actions of SR-1: preferences P(row > column) that no reward explains, and a reference.
INTRANSITIVE = torch.tensor(
    [[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]], dtype=torch.float64
)
REFERENCE_OF_THREE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
BEHAVIOURS = [(1 / 3, 1 / 3, 1 / 3), (0.8, 0.1, 0.1), (0.1, 0.2, 0.7)]


def double(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def vector(values: Any) -> Tensor:
    return torch.atleast_1d(double(values))


def scored(logratio: Any, *, reference: Any = 0.0, tokens: Any = 1) -> Scored:
    u = vector(logratio)
    references = double(reference).expand(u.shape)
    return Scored(u + references, references, torch.as_tensor(tokens).expand(u.shape))


def pairs(chosen: Any, rejected: Any, preference: Any = 1.0) -> Pairs:
    """Pairs with these log-ratios."""
    chosen, rejected = vector(chosen), vector(rejected)
    return Pairs(scored(chosen), scored(rejected), double(preference).expand(chosen.shape))


def rankings(logratios: Any, rewards: Any) -> Rankings:
    """One prompt from vectors, or a batch from matrices; rewards are shared by the batch."""
    u = torch.atleast_2d(double(logratios))
    return Rankings(scored(u), double(rewards).expand(u.shape))


def revisions(*logratios: Any) -> Revisions:
    """In the order of the fields: w, l, w|l, l|l, w|w, l|w."""
    return Revisions(*map(scored, logratios))


def samples(logp: Tensor, proposal_logp: Any, target_logp: Any, baseline: Any = 0.0) -> Samples:
    others = (proposal_logp, target_logp, baseline)
    return Samples(logp, *(double(x).to(logp.dtype).expand(logp.shape) for x in others))


def bradley_terry(rewards: Tensor) -> Tensor:
    """P(row > column)."""
    return (rewards[:, None] - rewards[None, :]).sigmoid()


def normalised(weights: Any) -> Tensor:
    weights = double(weights)
    return weights / weights.sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def over_pairs(
    loss: Callable[[Pairs], Tensor], u: Tensor, weights: Tensor, preferences: Any = 1.0
) -> Tensor:
    """The weighted sum over ordered pairs (chosen, rejected) of an enumerable set.

    Args:
        loss: one number a pair.
        u: log-ratios of the completions.
        weights: of (chosen, rejected); the diagonal is the pairs of a completion with itself.
        preferences: P(chosen > rejected), for losses that read it.
    """
    n = len(u)
    chosen, rejected = (i.flatten() for i in torch.meshgrid([torch.arange(n)] * 2, indexing="ij"))
    soft = double(preferences).expand(n, n).flatten()
    return (weights.flatten() * loss(pairs(u[chosen], u[rejected], soft))).sum()


def gradient(function: Callable[..., Tensor], *at: Any) -> list[Tensor]:
    """The gradient of the function's sum at these points, one tensor an argument."""
    leaves = [double(x).detach().clone().requires_grad_() for x in at]
    found = torch.autograd.grad(
        function(*leaves).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    return list(found)


def minimise(loss: Callable[[Tensor], Tensor], start: Any, *, rounds: int = 3) -> Tensor:
    """A stationary point, downhill of `start`: full-batch L-BFGS, restarted to shed its history."""
    x = double(start).clone().requires_grad_()
    for _ in range(rounds):
        optimiser = torch.optim.LBFGS(
            [x],
            max_iter=500,
            tolerance_grad=1e-13,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure(optimiser: torch.optim.LBFGS = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = loss(x)
            value.backward()
            return value

        optimiser.step(closure)
    return x.detach()


def best_policy(loss: Callable[[Tensor], Tensor], reference: Tensor, start: Any = None) -> Tensor:
    """The probabilities that minimise a loss of log-ratios.

    Args:
        loss: of the log-ratios.
        reference: probabilities.
        start: logits to start from; the reference's if none.
    """
    logits = reference.log() if start is None else double(start)
    found = minimise(lambda x: loss(x.log_softmax(0) - reference.log()), logits)
    return found.softmax(0)


def lambert_w(z: float) -> float:
    """The principal W: w with w e^w = z >= 0."""
    w = double(z).log1p()
    for _ in range(50):
        w = w - (w * w.exp() - z) / (w.exp() * (w + 1))
    return w.item()
