r"""Exact values of written numbers: rational arithmetic in the notation of `notation.plain`, without floating point.

    value(r"918\frac{1}{2}")  ->  1837/2          value("0.1\overline{6}")  ->  1/6
    value("2^{-99}")          ->  1/2^99          value("\sqrt{2}")         ->  None: not rational arithmetic

Numbers that would have more than `MOST_BITS` bits are not computed: None as well.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

MOST_BITS = 20_000
DEEPEST = 60
LONGEST = 2000
"""Characters."""

_TOKEN = re.compile(
    r"\s*(?:(?P<repeat>\d*\.\d*\\overline\{\d+\}|\d*\.\d*\(\d+\)|\d*\.(?P<dots>\d{1,6})(?P=dots)(?P=dots)\d*\\ldots)"
    r"|(?P<number>\d+(?:\.\d+)?|\.\d+)(?P<sci>[eE][-+]?\d{1,4}(?![\w.]))?"
    r"|(?P<op>\\frac|\\cdot|[-+*/^!%(){}]))"
)
_DECIMAL = re.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d*)\.(\d+)"
    r"(?:[eE]([-+]?\d{1,4})|\s*(?:\\cdot|\*)\s*10\s*\^(?:\{\s*(-?\s*\d{1,4})\}|(-?\d{1,4})))?%?"
)
_ALONE = re.compile(r"[\[({]\s*\d{1,3}(?:,\d{3})+\s*[\])}]")
"""A pair or triple: (2,251) is no number."""
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_SPACED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d,])")
_MIXED = re.compile(r"(?<![\d.,/}])(\d+)\s*(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)\s*/\s*(\d+))(?![\d.])")


class _Unreadable(Exception):
    """This is no rational arithmetic, or its value is too large to be written down."""


def value(text: str) -> Fraction | None:
    """The exact value of `text`, or None where it is not plain arithmetic of rational numbers."""
    if not text or len(text) > LONGEST or not any(character.isdigit() for character in text):
        return None
    if _ALONE.fullmatch(text):
        return None
    text = _THOUSANDS.sub(lambda found: found.group().replace(",", ""), text)
    text = _SPACED.sub(lambda found: found.group().replace(" ", ""), text)
    text = _MIXED.sub(_mixed, text)
    try:
        tokens = _tokens(text)[::-1]
        result = _sum(tokens, 0)
        return None if tokens else result
    except (_Unreadable, ZeroDivisionError):
        return None


def decimals(text: str) -> int | None:
    r"""Digits after the point of a decimal number (`0.120` has 3, `1.5 \cdot 10^{-3}` has 4), or None."""
    found = _DECIMAL.fullmatch(text.strip())
    return None if found is None else max(0, len(found[1]) - int(found[2] or found[3] or found[4] or 0))


def _mixed(found: re.Match[str]) -> str:
    whole, top, bottom, a, b = found.groups()
    return f"({whole}+{top or a}/{bottom or b})"


def _tokens(text: str) -> list[str | Fraction]:
    tokens: list[str | Fraction] = []
    place = 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            if text[place:].strip():
                raise _Unreadable
            break
        if found["repeat"]:
            tokens.append(_repeating(found["repeat"], found["dots"]))
        elif found["number"]:
            if tokens and isinstance(tokens[-1], Fraction):
                raise _Unreadable  # "3 4" is no product
            digits = found["number"]
            tokens.append(Fraction(digits) * _power(Fraction(10), Fraction(found["sci"][1:] if found["sci"] else 0)))
        else:
            tokens.append(found["op"])
        place = found.end()
    return tokens


def _repeating(text: str, dots: str | None) -> Fraction:
    if dots:
        whole, _, rest = text.partition(".")
        head, period = rest.split("\\")[0], dots
        before = head[: head.index(dots * 3)]
        if (period * len(head)).startswith(head[len(before) :]) is False:
            raise _Unreadable
    else:
        found = re.fullmatch(r"(\d*)\.(\d*)(?:\\overline\{(\d+)\}|\((\d+)\))", text)
        assert found is not None, "the token has this form"
        whole, before, period = found[1], found[2], found[3] or found[4]
    repeated = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(before))
    return int(whole or 0) + Fraction(int(before or 0), 10 ** len(before)) + repeated


# Recursive descent over the tokens, the next one last: sum > product > signed > raised > atom.


def _sum(tokens: list[str | Fraction], depth: int) -> Fraction:
    if depth > DEEPEST:
        raise _Unreadable
    total = _product(tokens, depth)
    while tokens and tokens[-1] in ("+", "-"):
        sign = 1 if tokens.pop() == "+" else -1
        total += sign * _product(tokens, depth)
    return _bounded(total)


def _product(tokens: list[str | Fraction], depth: int) -> Fraction:
    result = _signed(tokens, depth)
    while tokens:
        match tokens[-1]:
            case "*" | "\\cdot":
                tokens.pop()
                result *= _signed(tokens, depth)
            case "/":
                tokens.pop()
                result /= _signed(tokens, depth)
            case "(" | "\\frac" | Fraction():
                result *= _raised(tokens, depth)
            case _:
                break
    return _bounded(result)


def _signed(tokens: list[str | Fraction], depth: int) -> Fraction:
    if tokens and tokens[-1] in ("+", "-"):
        sign = 1 if tokens.pop() == "+" else -1
        return sign * _signed(tokens, depth + 1)
    return _raised(tokens, depth)


def _raised(tokens: list[str | Fraction], depth: int) -> Fraction:
    if depth > DEEPEST:
        raise _Unreadable
    base = _atom(tokens, depth)
    if tokens and tokens[-1] == "^":
        tokens.pop()
        base = _power(base, _signed(tokens, depth + 1))
    while tokens and tokens[-1] in ("!", "%"):
        if tokens.pop() == "%":
            base /= 100
        elif base.denominator == 1 and 0 <= base <= 2000:
            base = Fraction(math.factorial(int(base)))
        else:
            raise _Unreadable
    return base


def _atom(tokens: list[str | Fraction], depth: int) -> Fraction:
    token = tokens.pop() if tokens else ""
    if isinstance(token, Fraction):
        return token
    if token == "\\frac":
        top, bottom = (_group(tokens, "{", depth) for _ in range(2))
        return top / bottom
    tokens.append(token)
    return _group(tokens, "(" if token == "(" else "{", depth)


def _group(tokens: list[str | Fraction], opening: str, depth: int) -> Fraction:
    """The value in parentheses or braces."""
    if not tokens or tokens.pop() != opening:
        raise _Unreadable
    result = _sum(tokens, depth + 1)
    if not tokens or tokens.pop() != {"(": ")", "{": "}"}[opening]:
        raise _Unreadable
    return result


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise _Unreadable
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * size > MOST_BITS:
        raise _Unreadable
    if base == 0 and exponent < 0:
        raise ZeroDivisionError
    return base ** int(exponent)


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > MOST_BITS:
        raise _Unreadable
    return number
