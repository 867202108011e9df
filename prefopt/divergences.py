"""The table of f-divergences, as functions of the log-ratio u = log t, t = pi/pi_ref.

D_f(pi || pi_ref) = E_{y ~ pi_ref} f(t). Each row gives f(e^u) and its derivative f'(t) at t = e^u,
the latter up to an additive constant where that constant cancels (marked): a constant shift of f'
is a multiple of t - 1 added to f, which changes no divergence and no f-DPO gradient.

exp(-u) is computed with -u clamped to at most `LARGEST_EXPONENT`, because float32 overflows at 88
and an infinite score makes NaN gradients. Beyond the clamp the factor exp(-u) is constant: forward
KL's gradient is zero there, squared_log's is linear in u.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LARGEST_EXPONENT = 50.0

Score = Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]]


@dataclass(frozen=True)
class Divergence:
    """One generator f.

    Args:
        name: as written in params.yaml.
        f: u -> f(e^u).
        derivative: u -> f'(e^u), up to an additive constant.
    """

    name: str
    f: Score
    derivative: Score

    def __repr__(self) -> str:
        return self.name


def divergence(spec: str | dict[str, float]) -> Divergence:
    """The divergence that a person wrote: a name of the table, or `{alpha: a}` with a in (0, 1).

    Raises:
        ValueError: if there is no such divergence, or alpha lies outside (0, 1).
    """
    if isinstance(spec, str) and spec in DIVERGENCES:
        return DIVERGENCES[spec]
    if isinstance(spec, dict) and list(spec) == ["alpha"]:
        alpha = spec["alpha"]
        if not (isinstance(alpha, float) and 0 < alpha < 1):
            raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
        return Divergence(
            f"alpha({alpha})", partial(_alpha, a=alpha), partial(_alpha_derivative, a=alpha)
        )
    known = ", ".join(DIVERGENCES)
    raise ValueError(f"unknown divergence {spec!r}; known: {known}, {{alpha: a}}")


def _exp_minus(u: Tensor, a: float = 1.0) -> Tensor:
    return torch.exp((-a * u).clamp(max=LARGEST_EXPONENT))


def _exp(u: Tensor) -> Tensor:
    return torch.exp(u.clamp(max=LARGEST_EXPONENT))


def _alpha(u: Tensor, a: float) -> Tensor:
    """F = (t^(1-a) - (1-a) t - a) / (a (a-1))."""
    # t^(1-a) is not computed from t, whose gradient there is NaN once t rounds to 0.
    return (_exp((1 - a) * u) - (1 - a) * _exp(u) - a) / (a * (a - 1))


def _alpha_derivative(u: Tensor, a: float) -> Tensor:
    """F' = (1 - t^-a) / a; the constant 1/a is dropped."""
    return -_exp_minus(u, a) / a


# fmt: off
DIVERGENCES: dict[str, Divergence] = {
    row.name: row
    for row in (
        #          name              f(e^u)                         f'(e^u)
        # t log t: KL(pi || pi_ref); f' = log t + 1, the 1 dropped.
        Divergence("reverse_kl",     lambda u: _exp(u) * u,         lambda u: u),
        # -log t: KL(pi_ref || pi); f' = -1/t.
        Divergence("forward_kl",     lambda u: -u,                  lambda u: -_exp_minus(u)),
        # t log(2t/(t+1)) + log(2/(t+1)); f' = log(2t/(t+1)), the log 2 dropped.
        Divergence("jensen_shannon", lambda u: _jensen_shannon(u),  lambda u: -F.softplus(-u)),
        # (log t)^2 / 2, not convex for t > e (SquaredPO); f' = log(t)/t, falling for u > 1.
        Divergence("squared_log",    lambda u: 0.5 * u**2,          lambda u: u * _exp_minus(u)),
    )
}
# fmt: on


def _jensen_shannon(u: Tensor) -> Tensor:
    log_2 = 0.6931471805599453
    return _exp(u) * (log_2 - F.softplus(-u)) + log_2 - F.softplus(u)
