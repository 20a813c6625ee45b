"""A calculator: exact arithmetic on what is written, parsed and never evaluated as code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

LONGEST, MOST_BITS = 500, 4096
"""Characters of an expression, and bits of a number: what bounds the time that one may take."""
OPERATORS: dict[type[ast.AST], Callable[..., Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as (2 + 3) * 4.

    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters; at most {LONGEST}")
    try:
        value = _value(ast.parse(expression.strip().replace("^", "**"), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression[:80]!r} is no arithmetic expression") from error
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"


def _value(node: ast.AST) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = Fraction(str(number))
        case ast.BinOp(op=ast.Pow()):
            value = _power(_value(node.left), _value(node.right))
        case ast.BinOp() if type(node.op) in OPERATORS:
            value = Fraction(OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
        case ast.UnaryOp() if type(node.op) in OPERATORS:
            value = Fraction(OPERATORS[type(node.op)](_value(node.operand)))
        case _:
            raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")
    return _bounded(value, 1)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return Fraction(str(float(base) ** float(exponent)))
    return Fraction(_bounded(base, abs(exponent)) ** exponent)


def _bounded(value: Fraction, times: Fraction | int) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() * times > MOST_BITS:
        raise ValueError("the result is too large")
    return value
