"""What follows from an f that a person writes: convexity, DPO, resistance to displacement.

Symbolic where sympy decides, numerical where it does not; every finding says which. All of it is
done in u = log t, in which the score s(u) = f'(e^u) - f'(1) is what f-DPO trains.

Pipano et al. 2026 (arXiv:2602.06788): corollary 1 (DPO-inducing), lemma 2 (displacement).
"""

import functools
import math
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

import sympy
import torch
from sympy.calculus.singularities import singularities
from torch import Tensor

from prefopt.divergences import INFINITY, Divergence
from prefopt.expressions import evaluate, parse

# Where a formula is looked at numerically: t from e^-30 to e^30.
GRID = torch.linspace(-30, 30, 12001, dtype=torch.float64)
STEP = 0.005
ROUNDING = 1e-12

LARGEST_LOGRATIO = 100.0
LARGEST_VALUE = 1e30
PATIENCE = 3  # seconds of computing for one question to sympy
LARGEST_SIMPLIFIED = 60  # operations
LONGEST_SHOWN = 40  # characters of a closed form
LARGEST_SHOWN = 4.0  # log-ratio of what a picture must show

Answer = TypeVar("Answer")
T = sympy.Symbol("t", positive=True)
U = sympy.Symbol("u", real=True)

KINKED = (sympy.sign, sympy.Abs, sympy.Max, sympy.Min, sympy.Heaviside, sympy.DiracDelta)

IN_TORCH: dict[str, Callable[..., Tensor]] = {
    "exp": lambda x: torch.exp(_tensor(x)),
    "log": lambda x: torch.log(_tensor(x)),
    "Abs": lambda x: _tensor(x).abs(),
    "sign": lambda x: _tensor(x).sign(),
    "Max": lambda *xs: functools.reduce(torch.maximum, map(_tensor, xs)),
    "Min": lambda *xs: functools.reduce(torch.minimum, map(_tensor, xs)),
    "Heaviside": lambda x, _=0.5: 0.5 * (_tensor(x).sign() + 1),
    "DiracDelta": lambda x, _=0: torch.zeros_like(_tensor(x)),  # a kink has no width
}

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Finding:
    """One property, and how it is known.

    Args:
        value: the property.
        symbolic: sympy's proof or closed form; empty where the value was only computed.
        reason: in words.
        exact: the value itself, where sympy has it and it is needed further.
    """

    value: float | bool
    symbolic: str
    reason: str
    exact: sympy.Expr | None = None

    @property
    def how(self) -> str:
        return "symbolic" if self.symbolic else "numerical"


@dataclass(frozen=True)
class Classification:
    """All that is known of one f.

    Args:
        divergence: f as losses read it.
        f: of t.
        derivative: f'(t).
        score: f'(e^u) - f'(1), of u.
        convex, slope_at_zero, argmin: the properties on which the two tests rest.
        peak: where the score first turns down, as u; infinite if it never does, -infinite if it
            falls from the start.
        ceiling: the least upper bound of the score, and so of implicit rewards over beta.
        injective: whether no two t have the same score.
        normalised_argmin: that of f(t) - f'(1) (t - 1), the same divergence written otherwise.
    """

    divergence: Divergence
    f: sympy.Expr
    derivative: sympy.Expr
    score: sympy.Expr
    convex: Finding
    slope_at_zero: Finding
    argmin: Finding
    peak: Finding
    ceiling: Finding
    injective: Finding
    normalised_argmin: float


@dataclass(frozen=True)
class Curves:
    """What a picture of f shows, as plain numbers.

    Args:
        ratios: t.
        f: at each t.
        derivative: f' at each t.
        logratios: u.
        score: at each u.
        argmin: of f.
        slope_at_zero: f'(0+).
        peak: u and score where the score first turns down; None if it has no such place.
    """

    ratios: list[float]
    f: list[float]
    derivative: list[float]
    logratios: list[float]
    score: list[float]
    argmin: float
    slope_at_zero: float
    peak: tuple[float, float] | None


def divergence_of(text: str) -> Divergence:
    """The divergence whose generator is the formula `text` in t."""
    return classify(text).divergence


@functools.cache
def classify(text: str) -> Classification:
    """Parse and classify f(t).

    Raises:
        ValueError: if `text` is no formula in t, or not real, finite and differentiable enough to
            be a generator.
    """
    f, derivative, f_of_u, slope = _parsed(text)
    slope_at_one = slope.subs(U, 0)
    if not slope_at_one.is_finite or slope_at_one.has(sympy.Abs):
        slope_at_one = sympy.Integer(0)
    score = _expanded(slope - slope_at_one)
    f_in_torch, score_in_torch = _in_torch(f_of_u), _in_torch(score)
    _check(text, f_of_u, f_in_torch, score_in_torch, float(slope_at_one))
    rise = None if score.has(*KINKED) else _simplified(sympy.diff(score, U))
    slope_at_zero = _slope_at_zero(derivative, slope)
    argmin = _argmin(derivative, slope, f_in_torch)
    peak = _peak(rise, score_in_torch)
    convex = _convexity(rise, peak)
    normalised = _in_torch(f_of_u - slope_at_one * (sympy.exp(U) - 1))
    return Classification(
        divergence=Divergence(
            name=text,
            expression=text,
            f=f_in_torch,
            score=score_in_torch,
            slope_at_one=float(slope_at_one),
            slope_at_zero=float(slope_at_zero.value),
            argmin=float(argmin.value),
            convex=bool(convex.value),
        ),
        f=f,
        derivative=derivative,
        score=score,
        convex=convex,
        slope_at_zero=slope_at_zero,
        argmin=argmin,
        peak=peak,
        ceiling=_ceiling(score, score_in_torch, peak, slope_at_zero.value - float(slope_at_one)),
        injective=_injectivity(rise, score_in_torch, peak),
        normalised_argmin=_grid_argmin(normalised),
    )


def ratio_against_outsider(divergence: Divergence, gap: float) -> float:
    """How far a response falls when one outside the data has a reward higher by `gap` betas.

    The t that maximises -gap t - f(t): the in-sample pi/pi_ref of the degenerate problem of
    lemmas 1 and 2, in which the regulariser sees only what occurs in the data.
    """
    u = torch.linspace(-LARGEST_LOGRATIO, 20, 12001, dtype=torch.float64)
    losses = gap * u.exp() + divergence.f(u)
    where = int(losses.argmin())
    if where == len(u) - 1:
        return INFINITY
    if losses[0] - losses[where] <= 1e-15 * losses[0].abs():
        return 0.0
    # Between its neighbours -gap - f' passes through zero.
    low, high = u[where - 1], u[where + 1]
    for _ in range(60):
        middle = (low + high) / 2
        if gap + divergence.derivative(middle) > 0:
            high = middle
        else:
            low = middle
    return math.exp(low.item())


def curves(divergence: Divergence) -> Curves:
    """f, f' and the score around t = 1, as far out as the argmin and the peak."""
    top = classify(divergence.expression).peak.value
    seen = [x for x in (math.log(max(divergence.argmin, 1e-9)), top) if abs(x) < LARGEST_SHOWN]
    u = torch.linspace(min([-3.0, *seen]) - 0.1, max([2.0, *seen]) + 1, 1001, dtype=torch.float64)
    t = torch.linspace(0, 1.5 * math.exp(max([0.7, *seen])), 1001, dtype=torch.float64)[1:]
    peak = None
    if math.isfinite(top):
        peak = top, divergence.score(torch.tensor(top, dtype=torch.float64)).item()
    return Curves(
        ratios=t.tolist(),
        f=divergence.f(t.log()).tolist(),
        derivative=divergence.derivative(t.log()).tolist(),
        logratios=u.tolist(),
        score=divergence.score(u).tolist(),
        argmin=divergence.argmin,
        slope_at_zero=divergence.slope_at_zero,
        peak=peak,
    )


# Symbols


def _parsed(text: str) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr, sympy.Expr]:
    """f and f' as functions of t, then of u."""
    try:
        with _alarm():
            f = parse(text, {"t": T})
            derivative = sympy.diff(f, T)
            # A sign may stand in an f that does not jump; those that do are found on the grid.
            derivative = derivative.subs(dict.fromkeys(derivative.atoms(sympy.DiracDelta), 0))
            f_of_u = _in_u(f)
    except (OverflowError, RecursionError, TimeoutError):
        raise ValueError(
            f"not differentiated within {PATIENCE} seconds, got '{text}'; write it shorter, and "
            "with smaller numbers"
        ) from None
    if f.has(sympy.zoo, sympy.nan, sympy.oo) or not f.has(T):
        raise ValueError(f"not a generator, got '{text}'; f must be finite and depend on t")
    if not all(map(_is_real, (f, derivative, f_of_u))):
        raise ValueError(f"not a generator, got '{text}'; a number in it is complex or too large")
    derivative = _simplified(derivative)
    for expression, name in ((f, "f"), (derivative, "f'")):
        holes = _holes(expression)
        if holes:
            raise ValueError(
                f"not a generator, got '{text}': {name} is not finite at t = {holes[0]}; it must "
                "be so for every t > 0"
            )
    return f, derivative, f_of_u, _in_u(derivative)


def _is_real(expression: sympy.Expr) -> bool:
    """Whether every number in it is, and can be calculated."""
    numbers = [part for part in sympy.preorder_traversal(expression) if part.is_number]
    return all(math.isfinite(_real(number)) for number in numbers)


def _holes(expression: sympy.Expr) -> list[sympy.Basic]:
    """The t > 0 at which sympy knows a pole."""
    everywhere = sympy.Interval.open(0, sympy.oo)
    found = _asked(lambda: singularities(expression, T, everywhere), sympy.EmptySet)
    return list(found) if isinstance(found, sympy.FiniteSet) else []


def _simplified(expression: sympy.Expr) -> sympy.Expr:
    # That of a long formula can take minutes, and that of a kinked one is a case distinction.
    if expression.has(*KINKED) or expression.count_ops() > LARGEST_SIMPLIFIED:
        return expression
    return _asked(lambda: sympy.simplify(expression), expression)


def _expanded(expression: sympy.Expr) -> sympy.Expr:
    """Multiplied out where that is shorter: constants cancel, high powers stay whole."""
    expanded = _asked(lambda: sympy.expand(expression), expression)
    return min((expanded, expression), key=lambda e: e.count_ops())


def _shown(expression: sympy.Expr) -> str:
    """Its closed form, or its value where that is easier to read."""
    names = {sympy.oo: "inf", -sympy.oo: "-inf", sympy.E: "exp(1)"}
    text = names.get(expression, str(expression))
    return text if len(text) <= LONGEST_SHOWN else f"{float(expression):.6g}"


def _in_u(expression: sympy.Expr) -> sympy.Expr:
    """T replaced by e^u, logarithms of products and powers taken apart so that none is of 0."""
    return sympy.expand_log(sympy.powsimp(expression.subs(T, sympy.exp(U))), force=True)


@contextmanager
def _alarm() -> Generator[None, None, None]:
    """A `TimeoutError` inside, once patience ends."""

    def give_up(_: int, frame: FrameType | None) -> None:
        # Elsewhere, in the callback of a dying object say, nothing could be raised.
        if frame is not None and frame.f_globals.get("__name__", "").startswith(
            ("sympy.", "mpmath.")
        ):
            raise TimeoutError

    # An alarm rings in the main thread alone; elsewhere there is no hurry.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, give_up)
    try:
        # It rings until it is heard: sympy may catch the exception, too.
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE, 0.01)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _asked(question: Callable[[], Answer], otherwise: Answer) -> Answer:
    """Sympy's answer; `otherwise` if it has none, or none in time."""
    try:
        with _alarm():
            return question()
    except (
        ArithmeticError,
        AttributeError,
        NotImplementedError,
        RecursionError,
        TimeoutError,
        TypeError,
        ValueError,
    ):
        return otherwise


def _holds(question: Callable[[], bool | None]) -> bool:
    """Whether sympy is sure of it."""
    return bool(_asked(question, None))


def _real_roots(expression: sympy.Expr, variable: sympy.Symbol) -> list[sympy.Expr]:
    if expression.has(*KINKED):
        return []
    return _asked(
        lambda: [
            root
            for root in sympy.solve(expression, variable)
            if root.is_number and root.is_real and math.isfinite(float(root))
        ],
        [],
    )


# Functions


def _in_torch(expression: sympy.Expr) -> Function:
    """The function of u, beyond `LARGEST_LOGRATIO` continued by its tangent.

    In float64, because squares of exponentials overflow float32; values are cut at 1e30.
    """
    slope = sympy.diff(expression, U)

    def function(u: Tensor) -> Tensor:
        near = u.double().clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO)
        value = evaluate(expression, {"u": near}, IN_TORCH) + torch.zeros_like(near)
        with torch.no_grad():
            tangent = evaluate(slope, {"u": near}, IN_TORCH) + torch.zeros_like(near)
        value = value + tangent * (u.double() - near)
        return value.clamp(-LARGEST_VALUE, LARGEST_VALUE).to(u.dtype)

    return function


def _tensor(x: "Tensor | float") -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


def _check(
    text: str, f_of_u: sympy.Expr, f: Function, score: Function, slope_at_one: float
) -> None:
    """Refuse what is not finite and continuous, or never changes."""
    # At the log-ratios that training may meet, in its dtype, with its gradient; then densely.
    far = torch.tensor([-300.0, -30.0, -1.0, 0.0, 0.5, 1.0, 30.0, 300.0], requires_grad=True)
    for name, function in (("f", f), ("f'", score)):
        value = function(far)
        (slope,) = torch.autograd.grad(value.sum(), far, materialize_grads=True, allow_unused=True)
        for u, finite in (
            (far, value.isfinite() & slope.isfinite()),
            (GRID, function(GRID).isfinite()),
        ):
            if not finite.all():
                at = math.exp(min(u[~finite][0].item(), 700.0))
                raise ValueError(
                    f"not a generator, got '{text}': {name} has no finite real value and slope, as "
                    f"computers calculate, near t = {at:.3g}; it must have them for every t > 0"
                )
    for at, what in (
        (_first_pole(f_of_u), "be infinite"),
        (_first_jump(f(GRID), score(GRID) + slope_at_one), "jump"),
    ):
        if at is not None:
            raise ValueError(
                f"not a generator, got '{text}'; f must not {what}, as near t = {math.exp(at):.3g}"
            )
    if score(GRID).abs().max() < ROUNDING:
        raise ValueError(
            f"not a generator, got '{text}'; f is linear in t, so its divergence never changes"
        )


def _first_pole(f_of_u: sympy.Expr) -> float | None:
    """The first u of the grid at which a denominator passes through zero."""
    for power in f_of_u.atoms(sympy.Pow):
        if power.base.has(U) and power.exp.is_negative:
            signs = _in_torch(power.base)(GRID).sign()
            crossed = signs[1:] * signs[:-1] < 0
            if crossed.any():
                return GRID[crossed.nonzero()[0, 0]].item()
    return None


def _first_jump(values: Tensor, slopes: Tensor) -> float | None:
    """The first u of the grid from which f steps farther than f' allows."""
    cut = slopes.abs() >= LARGEST_VALUE
    reach = (slopes * GRID.exp()).abs().where(~cut, INFINITY)
    allowed = 3 * STEP * torch.maximum(reach[1:], reach[:-1])
    jumps = values.diff().abs() > allowed + 1e-7 * values.abs().clamp(min=1.0)[1:]
    return GRID[jumps.nonzero()[0, 0]].item() if jumps.any() else None


def _first_fall(score: Function) -> float | None:
    """The first u of the grid from which the score falls; -infinite if it never rose before."""
    values = score(GRID)
    # Differences below rounding are neither fall nor rise.
    rounding = ROUNDING * values.abs().clamp(min=1.0)
    falling = values.diff() < -rounding[1:]
    if not falling.any():
        return None
    first = int(falling.nonzero()[0, 0])
    rose = values[first] - values[0] > rounding[first]
    return GRID[first].item() if rose else -INFINITY


def _refined(f: Function, near: float) -> float:
    """The argmin in u, from a finer grid around one of `GRID`."""
    u = torch.linspace(near - STEP, near + STEP, 20001, dtype=torch.float64)
    return u[f(u).argmin()].item()


def _ratio(u: float) -> float:
    """T to six digits."""
    return float(f"{math.exp(u):.6g}")


def _grid_argmin(f: Function) -> float:
    where = int(f(GRID).argmin())
    if where in (0, len(GRID) - 1):
        return 0.0 if where == 0 else INFINITY
    return _ratio(_refined(f, GRID[where].item()))


# Findings


def _limit(
    expression: sympy.Expr, variable: sympy.Symbol, towards: sympy.Expr, in_u: sympy.Expr
) -> tuple[float, str, str]:
    """The limit at the end that t = 0 or t = oo is, its closed form if known, the evidence."""
    limit = sympy.nan
    if not expression.has(*KINKED):
        limit = _asked(lambda: sympy.limit(expression, variable, towards), sympy.nan)
    if limit.is_extended_real and limit.is_number:
        return float(limit), str(limit), f"tends to {_shown(limit)}"
    # Doubling log t: a logarithm doubles too, what converges stands still.
    side = -1 if towards == 0 else 1
    values = [_real(in_u.subs(U, side * 2**k)) for k in range(4, 14)]
    last, step = values[-1], values[-1] - values[-2]
    seen = f"is {values[-2]:.4g} at t = e^{side * 4096} and {last:.4g} at t = e^{side * 8192}"
    if step == 0 or (math.isfinite(step) and abs(step) < 0.9 * abs(values[-2] - values[-3])):
        return last, "", f"settles: it {seen}"
    far = math.copysign(INFINITY, step if math.isfinite(step) else last)
    return far, "", f"{'rises' if far > 0 else 'falls'} on: it {seen}"


def _real(number: sympy.Basic) -> float:
    return _asked(lambda: float(sympy.N(number, 30)), math.nan)


def _slope_at_zero(derivative: sympy.Expr, slope: sympy.Expr) -> Finding:
    value, symbolic, seen = _limit(derivative, T, sympy.Integer(0), slope)
    return Finding(value, symbolic, f"f'(t) {seen} as t tends to 0")


def _argmin(derivative: sympy.Expr, slope: sympy.Expr, f: Function) -> Finding:
    if _holds(lambda: derivative.is_positive):
        return Finding(0.0, str(derivative), "f rises from t = 0 on")
    for_ever = "f falls for ever; that no t is its argmin counts as >= 1"
    if _holds(lambda: derivative.is_negative):
        return Finding(INFINITY, str(derivative), for_ever)
    where = int(f(GRID).argmin())
    if where == len(GRID) - 1:
        return Finding(INFINITY, "", for_ever)
    if where == 0:
        return Finding(0.0, "", "f is smallest as t tends to 0")
    near = GRID[where].item()
    roots = [sympy.exp(root) for root in _real_roots(slope, U)] + _real_roots(derivative, T)
    for root in roots:
        if abs(_real(sympy.log(root)) - near) <= 2 * STEP:
            t = _asked(lambda root=root: sympy.simplify(root), root)
            return Finding(float(t), str(t), f"f' is zero at t = {_shown(t)}, where f is smallest")
    t = _ratio(_refined(f, near))
    return Finding(t, "", f"f is smallest near t = {t:.6g}")


def _peak(rise: sympy.Expr | None, score: Function) -> Finding:
    if rise is not None and _holds(lambda: rise.is_nonnegative):
        return Finding(INFINITY, str(rise), "the score never falls")
    if rise is not None and _holds(lambda: rise.is_nonpositive):
        return Finding(-INFINITY, str(rise), "the score falls everywhere")
    start = _first_fall(score)
    if start is None:
        return Finding(INFINITY, "", "the score never falls")
    if start == -INFINITY:
        return Finding(-INFINITY, "", "the score falls from the start")
    for root in [] if rise is None else _real_roots(rise, U):
        if abs(float(root) - start) <= 2 * STEP:
            reason = f"the score turns down at t = {_shown(sympy.exp(root))}"
            return Finding(float(root), str(root), reason, root)
    near = torch.linspace(start - STEP, start + STEP, 20001, dtype=torch.float64)
    values = score(near)
    u = near[(values == values.max()).nonzero()[-1, 0]].item()
    u = u if abs(u) > ROUNDING else 0.0
    return Finding(u, "", f"the score turns down near t = {_ratio(u):.6g}")


def _convexity(rise: sympy.Expr | None, peak: Finding) -> Finding:
    if peak.value == INFINITY:
        if peak.symbolic:
            proof = f"t f''(t) = {rise} with u = log t, which is never negative"
            return Finding(True, peak.symbolic, proof)
        return Finding(True, "", "f' does not fall anywhere on t from e^-30 to e^30")
    return Finding(False, peak.symbolic, f"f' falls: {peak.reason}")


def _ceiling(score: sympy.Expr, in_torch: Function, peak: Finding, at_zero: float) -> Finding:
    highest = in_torch(GRID).max().item()
    if math.isfinite(peak.value):
        value = in_torch(torch.tensor(peak.value, dtype=torch.float64)).item()
        if highest <= value + ROUNDING * max(1.0, abs(value)):
            exact = None if peak.exact is None else _simplified(score.subs(U, peak.exact))
            return Finding(value, "" if exact is None else str(exact), "reached at the peak")
    value, symbolic, seen = _limit(score, U, sympy.oo, score)
    if peak.value == INFINITY:
        return Finding(value, symbolic, f"the score {seen} as t grows")
    if max(value, at_zero) == INFINITY:
        return Finding(INFINITY, "", "the score has no upper bound")
    return Finding(max(highest, value, at_zero), "", "the largest on t from 0 to e^30")


def _injectivity(rise: sympy.Expr | None, score: Function, peak: Finding) -> Finding:
    if rise is not None and _holds(lambda: rise.is_positive or rise.is_negative):
        return Finding(True, str(rise), "the score is strictly monotone")
    if math.isfinite(peak.value):
        reason = f"{peak.reason}, so that a score may belong to a t before it and to one behind"
        return Finding(False, peak.symbolic, reason)
    # Farther out a score that converges stands still, as computers calculate.
    steps = score(GRID[GRID.abs() <= 10]).diff()
    if (steps > 0).all() or (steps < 0).all():
        return Finding(True, "", "the score is strictly monotone on t from e^-10 to e^10")
    return Finding(False, "", "the score is the same on a stretch of t, or turns")
