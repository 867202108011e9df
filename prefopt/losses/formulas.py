"""The formulas of the table of losses: parsed, differentiated, evaluated on batches."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.batches import Symbols
from prefopt.divergences import Divergence
from prefopt.expressions import FUNCTIONS, evaluate, log_sigmoid, parse, sigmoid
from prefopt.losses import Loss, reference_free
from prefopt.psi import Psi

# What carries the gradient, and what does not.
CARRIERS = [
    "h",
    "h_shared",
    "u",
    "u_w",
    "u_l",
    "u_shared_w",
    "u_shared_l",
    "u_w_given_l",
    "u_l_given_l",
    "u_w_given_w",
    "u_l_given_w",
    "logp",
    "logp_w",
    "logp_l",
    "kl_w",
    "kl_l",
]
CONSTANTS = [
    "u_shared",
    "kl",
    "n",
    "n_w",
    "n_l",
    "p",
    "weight",
    "k",
    "r",
    "desirable",
    "u_mismatched",
    "baseline",
    "logp_p",
    "logp_q",
    "u_q",
]


class sg(sympy.Function):
    """Stop-gradient."""

    is_real = True

    def fdiff(self, argindex: int = 1) -> Any:
        return sympy.Integer(0)


class score(sympy.Function):
    """A divergence's f'(e^u) - f'(1)."""

    is_real = True

    def fdiff(self, argindex: int = 1) -> Any:
        return sympy.Function("score'", real=True)(self.args[0])


class log_odds(sympy.Function):
    """log(P/(1 - P)) of P = exp(z)."""

    is_real = True

    def fdiff(self, argindex: int = 1) -> Any:
        return 1 / (1 - sympy.exp(self.args[0]))


# Over completions or micro-batches: their derivatives are written in the function's docstring.
REDUCTIONS = {
    name: sympy.Function(name, real=True) for name in ("sum", "mean", "softmax", "log_softmax")
}
OF_HYPERPARAMETERS = {name: sympy.Function(name, real=True) for name in ("derivative", "f", "psi")}
IN_FORMULAS = {
    **FUNCTIONS,
    **{function.__name__: function for function in (sigmoid, log_sigmoid, sg, score, log_odds)},
    **REDUCTIONS,
    **OF_HYPERPARAMETERS,
}


def hyperparameters_of(loss: Loss) -> dict[str, inspect.Parameter]:
    """The keyword parameters of the loss's function: its configuration schema."""
    parameters = inspect.signature(loss.function).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


@functools.cache
def parsed(loss: Loss, text: str) -> sympy.Expr:
    """A formula of the loss's row."""
    names = (*CARRIERS, *CONSTANTS, *hyperparameters_of(loss))
    return parse(text, {name: sympy.Symbol(name, real=True) for name in names}, IN_FORMULAS)


def value(
    loss: Loss, text: str | sympy.Expr, symbols: Symbols, hyperparameters: Mapping[str, Any]
) -> Tensor:
    """A formula of the loss's row, on a batch's symbols.

    Args:
        loss: the row.
        text: its `formula`, `reward` or `at_reference`, or what `gradients` made of them.
        symbols: of the batch.
        hyperparameters: all of the loss's, bound.
    """
    numbers = {name: x for name, x in hyperparameters.items() if isinstance(x, int | float)}
    functions = dict(IN_TORCH)
    for x in hyperparameters.values():
        if isinstance(x, Divergence):
            slope = functools.partial(_slope, x.score)
            functions |= {"score": x.score, "score'": slope, "derivative": x.derivative, "f": x.f}
        elif isinstance(x, Psi):
            functions["psi"] = x
    expression = parsed(loss, text) if isinstance(text, str) else text
    dtype = next(iter(symbols.values())).dtype
    return torch.as_tensor(evaluate(expression, {**symbols, **numbers}, functions), dtype=dtype)


def _slope(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    u = u.detach().requires_grad_()
    return torch.autograd.grad(function(u).sum(), u)[0]


def _tensor(x: Tensor | float) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


def implicit_rewards(
    loss: Loss, symbols: Symbols, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """What the objective takes the two sides of each pair to be worth, chosen then rejected.

    For f-DPO this is beta (f'(t) - f'(1)), not beta log t; for SimPO beta times log-probability
    per token.
    """
    chosen, rejected = (
        {
            name.removesuffix(side): x
            for name, x in symbols.items()
            if name.endswith(side) or not name.endswith(("_w", "_l"))
        }
        for side in ("_w", "_l")
    )
    return (
        value(loss, loss.reward, chosen, hyperparameters),
        value(loss, loss.reward, rejected, hyperparameters),
    )


def gradients(loss: Loss) -> dict[str, sympy.Expr]:
    """Symbol -> derivative of the loss by it; empty for sums over completions."""
    formula = parsed(loss, loss.formula)
    h, u_w, u_l = (sympy.Symbol(name, real=True) for name in ("h", "u_w", "u_l"))
    if formula.free_symbols & {u_w, u_l}:
        formula = formula.subs(h, u_w - u_l)
    derivatives = {
        name: sympy.diff(formula, sympy.Symbol(name, real=True))
        for name in CARRIERS
        if sympy.Symbol(name, real=True) in formula.free_symbols
    }
    if any(derivative.has(sympy.Derivative, sympy.Subs) for derivative in derivatives.values()):
        return {}
    return {name: derivative for name, derivative in derivatives.items() if derivative != 0}


IN_TORCH: dict[str, Callable[..., Tensor]] = {
    "exp": lambda x: torch.exp(_tensor(x)),
    "log": lambda x: torch.log(_tensor(x)),
    "Abs": torch.abs,
    "sign": torch.sign,
    "Max": lambda *xs: functools.reduce(torch.maximum, map(_tensor, xs)),
    "Min": lambda *xs: functools.reduce(torch.minimum, map(_tensor, xs)),
    "Heaviside": lambda x, _=0.5: 0.5 * (torch.sign(x) + 1),
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "sg": torch.Tensor.detach,
    "log_odds": reference_free.log_odds,
}
