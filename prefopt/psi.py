"""Utilities Psi of preference probabilities, for PsiPO.

Azar et al. 2023 (arXiv:2310.12036), eq. 6: maximise E[Psi(P(y > y'))] - tau KL(pi || pi_ref). Only
a Psi with Psi(q) + Psi(1 - q) constant can be trained on pairs: the least squares over pairs has
its minimum at g(y) - E Psi(P(y' > y)), g the utility that is wanted, and the second term drops out
only then. A label that is one coin's fall stands for its probability only if Psi is affine.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.expressions import evaluate, parse

Q = sympy.Symbol("q", positive=True)
IN_TORCH: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "Abs": torch.abs,
    "sign": torch.sign,
    "Max": lambda *xs: functools.reduce(torch.maximum, map(torch.as_tensor, xs)),
    "Min": lambda *xs: functools.reduce(torch.minimum, map(torch.as_tensor, xs)),
}
NAMED = {"identity": "q", "logit": "log(q/(1 - q))"}
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Psi:
    """A non-decreasing function of q, odd about q = 1/2 up to a constant.

    Args:
        name: as written in params.yaml.
        expression: Psi(q).
        clip: q is taken to [clip, 1 - clip] first.
    """

    name: str
    expression: sympy.Expr
    clip: float

    def __call__(self, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        q = q.clamp(self.clip, 1 - self.clip)
        return evaluate(self.expression, {"q": q}, IN_TORCH) + torch.zeros_like(q)

    @property
    def affine(self) -> bool:
        """Whether a coin's fall stands for its probability: E Psi(label) = Psi(p) up to scale."""
        return sympy.diff(self.expression, Q, 2) == 0

    def __repr__(self) -> str:
        return self.name


def psi(spec: Any) -> Psi:
    """The Psi that a person wrote: `identity`, `logit`, a formula in q, or `{either: clip}`.

    Raises:
        ValueError: if it is no such thing, decreases, is not finite on [clip, 1 - clip], or is not
            odd about 1/2, with the reason.
    """
    clip = 0.0
    name = spec
    match spec:
        case dict() if len(spec) == 1:
            ((name, clip),) = spec.items()
        case _:
            pass
    if not isinstance(name, str) or (name.isidentifier() and name not in {*NAMED, "q"}):
        raise ValueError(
            f"unknown psi {spec!r}; known: {', '.join(NAMED)}, a formula in q such as "
            "'3*q**2 - 2*q**3', or {either: clip}"
        )
    if not (isinstance(clip, int | float) and 0 <= clip < 0.5):
        raise ValueError(f"psi's clip must lie in [0, 0.5), got {clip!r}")
    expression = parse(NAMED.get(name, name), {"q": Q})
    found = Psi(f"{name}, clipped at {clip}" if clip else name, expression, float(clip))
    q = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    values = found(q)
    if not values.isfinite().all():
        raise ValueError(
            f"psi '{name}' is not finite on [{clip}, {1 - clip:g}]: a preference of 0 or 1 would "
            f"ask for an infinite margin; clip preferences, as {{{name}: 0.01}} does"
        )
    if values.max() - values.min() <= TOLERANCE:
        raise ValueError(f"psi '{name}' is constant; every probability would be worth the same")
    if (values.diff() < -TOLERANCE).any():
        raise ValueError(f"psi '{name}' decreases; a greater probability must not be worth less")
    sums = values + values.flip(0)
    if (sums - sums[5000]).abs().max() > TOLERANCE * max(1.0, values.abs().max().item()):
        odd = _odd_part(expression)
        raise ValueError(
            f"psi '{name}' is not odd about 1/2: psi(q) + psi(1 - q) is not constant "
            f"({sums[0]:.4g} at q = 0, {sums[5000]:.4g} at q = 1/2), so the regression on pairs "
            "would not reach the optimum of eq. 7, for which three completions a prompt are "
            f"needed; take an odd one: identity, logit, or this one's odd part '{odd}'"
        )
    return found


def _odd_part(expression: sympy.Expr) -> sympy.Expr:
    """Psi(q)/2 - Psi(1 - q)/2."""
    return sympy.simplify((expression - expression.subs(Q, 1 - Q)) / 2)


def optimum(
    reference: Float[Tensor, " actions"],
    preferences: Float[Tensor, "actions actions"],
    behaviour: Float[Tensor, " actions"],
    utility: Psi,
    tau: float,
) -> Float[Tensor, " actions"]:
    """The policy that maximises eq. 6 on an enumerable set of completions (eq. 7).

    Args:
        reference: pi_ref.
        preferences: P(row > column).
        behaviour: mu, from which y' is drawn.
        utility: Psi.
        tau: weight of the KL.
    """
    worth = utility(preferences) @ behaviour
    return torch.softmax(reference.log() + worth / tau, 0)
