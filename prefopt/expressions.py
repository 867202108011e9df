"""Formulas that people write, parsed without `eval` and evaluated in torch.

A formula is arithmetic, numbers, the names and the functions that its place allows, and nothing
else: Python's own parser makes the tree, and whatever is not on the list is refused.
"""

import ast
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import sympy
from sympy.core.function import AppliedUndef

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 400
LARGEST_NUMBER = 10**9
LARGEST_POWER = 100

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "log": sympy.log,
    "exp": sympy.exp,
    "sqrt": sympy.sqrt,
    "abs": sympy.Abs,
    "sign": sympy.sign,
    "max": sympy.Max,
    "min": sympy.Min,
}


class sigmoid(sympy.Function):
    """1/(1 + exp(-z)), kept whole so that derivatives stay readable."""

    is_real = True

    def fdiff(self, argindex: int = 1) -> Any:
        z: Any = self.args[0]
        rising: Any = sigmoid(z)
        return rising * sigmoid(-z)


class log_sigmoid(sympy.Function):
    """-log(1 + exp(-z))."""

    is_real = True

    def fdiff(self, argindex: int = 1) -> Any:
        z: Any = self.args[0]
        return sigmoid(-z)


def parse(
    text: str,
    names: Mapping[str, sympy.Expr],
    functions: Mapping[str, Callable[..., Any]] = FUNCTIONS,
) -> sympy.Expr:
    """The expression that `text` writes.

    Args:
        text: Python's arithmetic: `+ - * / **`, parentheses, numbers, calls.
        names: the variables that may stand in it.
        functions: the functions that may be called in it.

    Raises:
        ValueError: if it is not such a formula; the message names the place and what is allowed.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a formula of {len(text)} characters; at most {LONGEST} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(
            f"not a formula, got '{text}' ({reason}); write one like 't*log(t)'"
        ) from None
    try:
        return _Parser(text, names, functions).expression(tree.body)
    except RecursionError:
        raise ValueError(f"a formula nested too deeply, got '{text}'; write it flatter") from None


class _Parser:
    def __init__(
        self,
        text: str,
        names: Mapping[str, sympy.Expr],
        functions: Mapping[str, Callable[..., Any]],
    ) -> None:
        self.text, self.names, self.functions = text, names, functions

    def expression(self, node: ast.expr) -> sympy.Expr:
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return self.number(node, value)
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.expression(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.expression(operand)
            case ast.BinOp(left=left, op=operator, right=right):
                return self.operation(node, self.expression(left), operator, self.expression(right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if (
                name in self.functions
            ):
                return self.call(node, name, [self.expression(argument) for argument in arguments])
            case ast.Call(func=ast.Name(id=name), keywords=[_, *_]) if name in self.functions:
                raise self.refusal(node, f"'{name}' takes no named arguments")
            case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
                raise self.refusal(node, f"'{name}' is not known here")
            case _:
                raise self.refusal(node, "this may not stand in a formula")

    def number(self, node: ast.expr, value: int | float) -> sympy.Expr:
        if not abs(value) <= LARGEST_NUMBER:
            raise self.refusal(node, f"a number beyond {LARGEST_NUMBER}")
        # As written, so that 0.5 is one half and symbolic results stay exact.
        written = ast.get_source_segment(self.text.strip(), node) or repr(value)
        try:
            fraction = Fraction(written.replace("_", ""))
        except ValueError:
            raise self.refusal(node, "a number in another notation than decimal") from None
        return sympy.Rational(fraction.numerator, fraction.denominator)

    def operation(
        self, node: ast.expr, left: sympy.Expr, operator: ast.operator, right: sympy.Expr
    ) -> sympy.Expr:
        match operator:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                if right.is_zero:
                    raise self.refusal(node, "a division by zero")
                return left / right
            case ast.Pow():
                # Powers of powers would fill the memory long before they mean anything.
                if right.is_number and not abs(right) <= LARGEST_POWER:
                    raise self.refusal(node, f"a power beyond {LARGEST_POWER}")
                if left.is_number and left.count_ops() + right.count_ops() > LARGEST_POWER:
                    raise self.refusal(node, "a number too large to write")
                power = left**right
                if power.is_Rational and not abs(power) <= LARGEST_NUMBER**LARGEST_POWER:
                    raise self.refusal(node, "a number too large to write")
                return power
            case _:
                raise self.refusal(node, "an operator other than + - * / **")

    def call(self, node: ast.expr, name: str, arguments: list[sympy.Expr]) -> sympy.Expr:
        if not arguments:
            raise self.refusal(node, f"'{name}' does not take 0 arguments")
        try:
            return self.functions[name](*arguments)
        except TypeError:
            raise self.refusal(node, f"'{name}' does not take {len(arguments)} arguments") from None

    def refusal(self, node: ast.expr, reason: str) -> ValueError:
        segment = ast.get_source_segment(self.text.strip(), node)
        allowed = f"numbers, + - * / **, {', '.join(self.names)}, {', '.join(self.functions)}"
        return ValueError(f"{reason}, got '{segment}' in '{self.text}'; allowed: {allowed}")


def evaluate(
    expression: sympy.Expr,
    values: Mapping[str, "Tensor | float"],
    functions: Mapping[str, Callable[..., "Tensor"]],
) -> "Tensor":
    """The value of a parsed formula, computed term by term in torch; carries gradients.

    Args:
        expression: as `parse` gives it.
        values: one tensor a symbol.
        functions: what the formula's functions are in torch, by their sympy names.
    """

    def walk(node: Any) -> Any:
        if node.is_Symbol:
            return values[node.name]
        if node.is_number and not node.atoms(sigmoid, log_sigmoid, AppliedUndef):
            return float(node)
        arguments = [walk(argument) for argument in node.args]
        if node.is_Add:
            return sum(arguments[1:], arguments[0])
        if node.is_Mul:
            product = arguments[0]
            for factor in arguments[1:]:
                product = product * factor
            return product
        if node.is_Pow:
            base, power = arguments
            return base**power
        return functions[type(node).__name__](*arguments)

    return walk(expression)
