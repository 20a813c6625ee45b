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
        tokens = _tokens(text)
        parser = _Parser(tokens)
        result = parser.sum(0)
        return result if parser.place == len(tokens) else None
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


class _Parser:
    """Recursive descent: sum > product > sign > power > atom."""

    def __init__(self, tokens: list[str | Fraction]) -> None:
        self.tokens, self.place = tokens, 0

    def _peek(self) -> str | Fraction | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def _take(self, wanted: str) -> bool:
        if self._peek() == wanted:
            self.place += 1
            return True
        return False

    def sum(self, depth: int) -> Fraction:
        if depth > DEEPEST:
            raise _Unreadable
        total = self._product(depth)
        while True:
            if self._take("+"):
                total += self._product(depth)
            elif self._take("-"):
                total -= self._product(depth)
            else:
                return _bounded(total)

    def _product(self, depth: int) -> Fraction:
        result = self._sign(depth)
        while True:
            if self._take("*") or self._take("\\cdot"):
                result *= self._sign(depth)
            elif self._take("/"):
                result /= self._sign(depth)
            elif self._peek() in ("(", "\\frac") or isinstance(self._peek(), Fraction):
                result *= self._power(depth)
            else:
                return _bounded(result)

    def _sign(self, depth: int) -> Fraction:
        if self._take("-"):
            return -self._sign(depth + 1)
        return self._sign(depth + 1) if self._take("+") else self._power(depth)

    def _power(self, depth: int) -> Fraction:
        if depth > DEEPEST:
            raise _Unreadable
        base = self._atom(depth)
        if self._take("^"):
            base = _power(base, self._sign(depth + 1))
        while True:
            if self._take("!"):
                if base.denominator != 1 or not 0 <= base <= 2000:
                    raise _Unreadable
                base = Fraction(math.factorial(int(base)))
            elif self._take("%"):
                base /= 100
            else:
                return base

    def _atom(self, depth: int) -> Fraction:
        token = self._peek()
        if isinstance(token, Fraction):
            self.place += 1
            return token
        if self._take("\\frac"):
            top = self._group("{", "}", depth)
            return top / self._group("{", "}", depth)
        for left, right in (("(", ")"), ("{", "}")):
            if token == left:
                return self._group(left, right, depth)
        raise _Unreadable

    def _group(self, left: str, right: str, depth: int) -> Fraction:
        if not self._take(left):
            raise _Unreadable
        result = self.sum(depth + 1)
        if not self._take(right):
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
