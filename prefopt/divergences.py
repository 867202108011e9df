"""The table of f-divergences, as functions of the log-ratio u = log t, t = pi/pi_ref.

D_f(pi || pi_ref) = E_{y ~ pi_ref} f(t). f-DPO reads f as a penalty, f-DPG as a loss whose reference
is a target. Scores are f'(t) - f'(1): zero at the reference. The constant f'(1) cancels in every
difference; it is a multiple of t - 1 added to f, which changes no divergence.

exp(a u) is computed with the exponent clamped to at most `LARGEST_EXPONENT`, because float32
overflows at 88 and an infinite score makes NaN gradients. Beyond the clamp the exponential is
constant: forward KL's gradient is zero there, squared_log's is linear in u.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LARGEST_EXPONENT = 50.0
LOG_2 = math.log(2)
INFINITY = math.inf

Function = Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]]


@dataclass(frozen=True)
class Divergence:
    """One generator f and what follows from it.

    Args:
        name: as written in params.yaml.
        expression: f(t), as written.
        f: u -> f(e^u).
        score: u -> f'(e^u) - f'(1).
        slope_at_one: f'(1).
        slope_at_zero: the limit f'(0+).
        argmin: where f is smallest; infinite if it falls for ever.
        convex: whether f is.
    """

    name: str
    expression: str
    f: Function
    score: Function
    slope_at_one: float
    slope_at_zero: float
    argmin: float
    convex: bool

    def derivative(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """f'(e^u), the constant included."""
        return self.score(u) + self.slope_at_one

    @property
    def dpo_inducing(self) -> bool:
        """Whether no finite reward drives a response's probability to zero, so that f-DPO holds.

        Pipano et al. 2026 (arXiv:2602.06788), corollary 1: f'(0+) = -inf; convexity is not needed.
        """
        return self.slope_at_zero == -INFINITY

    @property
    def displacement_resistant(self) -> bool:
        """Whether argmin f >= 1: a necessary condition, not a sufficient one.

        Pipano et al. 2026 (arXiv:2602.06788), lemma 2. It belongs to the written form of f: adding
        c (t - 1) changes neither divergence nor f-DPO loss, and moves the argmin.
        """
        return self.argmin >= 1

    def __repr__(self) -> str:
        return self.name


def divergence(spec: Any) -> Divergence:
    """The divergence that a person wrote.

    A name of the table; `{alpha: a}` with 0 < a < 1; `{squared_log: c}` with c >= 0; or f itself, a
    formula in t such as `0.5*log(t)**2`.

    Raises:
        ValueError: if there is no such divergence, or the formula is not a generator.
    """
    match spec:
        case str() if spec in DIVERGENCES:
            return DIVERGENCES[spec]
        case str() if spec == "t" or not spec.isidentifier():
            from prefopt.classification import divergence_of

            return divergence_of(spec)
        case {"alpha": int() | float() as a} if len(spec) == 1 and not isinstance(a, bool):
            return alpha(float(a))
        case {"squared_log": int() | float() as c} if len(spec) == 1 and not isinstance(c, bool):
            return shifted_squared_log(float(c))
        case _:
            known = ", ".join(DIVERGENCES)
            raise ValueError(
                f"unknown divergence {spec!r}; known: {known}, {{alpha: a}}, {{squared_log: c}}, "
                "or a formula for f in t such as '0.5*log(t)**2'"
            )


def dpo_inducing_divergence(spec: Any) -> Divergence:
    """As `divergence`, for losses that are wrong where f is not DPO-inducing.

    Raises:
        ValueError: if f'(0+) is finite, with an example of what would go wrong.
    """
    found = divergence(spec)
    if found.slope_at_zero == INFINITY:
        raise ValueError(
            f"'{found}' is not DPO-inducing: f'(0+) = +inf draws probabilities to zero; take an f "
            "with f'(0+) = -inf, such as 't*log(t)'"
        )
    if not found.dpo_inducing:
        raise ValueError(
            f"'{found}' is not DPO-inducing: f'(0+) = {found.slope_at_zero:g} is finite, so some "
            "rewards have their optimum where probabilities are zero, and there reward "
            "differences are no longer beta times differences of f' (Pearson's (t-1)^2 with "
            "reference (.4, .3, .2, .1), rewards (0, .5, 1, 2) and beta = .1 has the optimum "
            "(0, 0, 1/3, 2/3): r_1 - r_2 = -.5, but beta (f'(t_1) - f'(t_2)) = 0); take an f "
            f"with f'(0+) = -inf, such as '{found.expression} + t*log(t)', or the loss f_dpg"
        )
    return found


def alpha(a: float) -> Divergence:
    """Wang et al.'s alpha-divergence (arXiv:2309.16240), f' = (1 - t^-a)/a; TRL's alpha is 1 - a.

    Raises:
        ValueError: if a lies outside (0, 1).
    """
    if not 0 < a < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {a}")
    return Divergence(
        name=f"alpha({a})",
        expression=f"(t**(1-{a}) - (1-{a})*t - {a})/({a}*({a}-1))",
        f=partial(_alpha, a=a),
        score=partial(_alpha_score, a=a),
        slope_at_one=0.0,
        slope_at_zero=-INFINITY,
        argmin=1.0,
        convex=True,
    )


def shifted_squared_log(c: float) -> Divergence:
    """(log t - c)^2 / 2: squared_log with its minimum at e^c, so that winners are drawn upwards.

    Raises:
        ValueError: if c is negative: argmin f < 1 would force probabilities down.
    """
    if not 0 <= c <= LARGEST_EXPONENT:
        raise ValueError(f"squared_log's shift must lie in [0, {LARGEST_EXPONENT:g}], got {c}")
    return Divergence(
        name=f"squared_log({c})",
        expression=f"(log(t) - {c})**2/2",
        f=lambda u: 0.5 * (u - c) ** 2,
        score=lambda u: (u - c) * _exp(-u) + c,
        slope_at_one=-c,
        slope_at_zero=-INFINITY,
        argmin=math.exp(c),
        convex=False,
    )


def _exp(exponent: Tensor) -> Tensor:
    return torch.exp(exponent.clamp(max=LARGEST_EXPONENT))


def _expm1(exponent: Tensor) -> Tensor:
    return torch.expm1(exponent.clamp(max=LARGEST_EXPONENT))


def _alpha(u: Tensor, a: float) -> Tensor:
    # t^(1-a) is not computed from t, whose gradient there is NaN once t rounds to 0.
    return (_exp((1 - a) * u) - (1 - a) * _exp(u) - a) / (a * (a - 1))


def _alpha_score(u: Tensor, a: float) -> Tensor:
    return -_expm1(-a * u) / a


def _jensen_shannon(u: Tensor) -> Tensor:
    return _exp(u) * (LOG_2 - F.softplus(-u)) + LOG_2 - F.softplus(u)


def _expm1_squared(exponent: Tensor) -> Tensor:
    return torch.expm1(exponent.clamp(max=LARGEST_EXPONENT / 2)) ** 2


# fmt: off
DIVERGENCES: dict[str, Divergence] = {
    row.name: row
    for row in (
        #          name                   f(t)                                   f(e^u)                                         f'(e^u) - f'(1)                   f'(1) f'(0+)     argmin             convex
        # KL(pi || pi_ref), DPO's.
        Divergence("reverse_kl",          "t*log(t)",                            lambda u: _exp(u) * u,                         lambda u: u,                      1.0,  -INFINITY, math.exp(-1),      True),
        # KL(pi_ref || pi).
        Divergence("forward_kl",          "-log(t)",                             lambda u: -u,                                  lambda u: -_expm1(-u),            -1.0, -INFINITY, INFINITY,          True),
        # Twice the usual one: at most 2 log 2.
        Divergence("jensen_shannon",      "t*log(2*t/(t + 1)) + log(2/(t + 1))", _jensen_shannon,                               lambda u: LOG_2 - F.softplus(-u), 0.0,  -INFINITY, 1.0,               True),
        Divergence("squared_hellinger",   "(sqrt(t) - 1)**2",                    lambda u: _expm1_squared(u / 2),               lambda u: -_expm1(-u / 2),        0.0,  -INFINITY, 1.0,               True),
        Divergence("jeffreys",            "(t - 1)*log(t)",                      lambda u: _expm1(u) * u,                       lambda u: u - _expm1(-u),         0.0,  -INFINITY, 1.0,               True),
        # chi^2 of the policy from the reference, and of the reference from the policy.
        Divergence("pearson_chi_squared", "(t - 1)**2",                          _expm1_squared,                                lambda u: 2 * _expm1(u),          0.0,  -2.0,      1.0,               True),
        Divergence("neyman_chi_squared",  "(t - 1)**2/t",                        lambda u: _expm1(u) + _expm1(-u),              lambda u: -_expm1(-2 * u),        0.0,  -INFINITY, 1.0,               True),
        Divergence("total_variation",     "abs(t - 1)/2",                        lambda u: _expm1(u).abs() / 2,                 lambda u: u.sign() / 2,           0.0,  -0.5,      1.0,               True),
        # chi-PO's: half of Pearson's plus the KL; argmin W(1).
        Divergence("mixed_chi_squared",   "(t - 1)**2/2 + t*log(t)",             lambda u: _expm1_squared(u) / 2 + _exp(u) * u, lambda u: u + _expm1(u),          1.0,  -INFINITY, 0.567143290409784, True),
        # SquaredPO's; falls again for t > e.
        Divergence("squared_log",         "log(t)**2/2",                         lambda u: 0.5 * u**2,                          lambda u: u * _exp(-u),           0.0,  -INFINITY, 1.0,               False),
    )
}
# fmt: on
