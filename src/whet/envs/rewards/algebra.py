r"""The math reward in a worker process: the rules of `reading`, with sympy as the algebra that they call.

latex2sympy parses expressions, and values compare them.

Two numbers are equal where 40 digits are, relative to their size (so 2^{-99} is not 2^{-98}); two expressions in the
same variables where they are at points drawn once, over reals at which both are defined. Identities of school algebra
that hold at eight random points to 30 digits hold.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import LatexExtractionConfig, verify
from math_verify import parse as math_verify_parse

from whet.envs.rewards.reader import read
from whet.envs.rewards.reading import answers
from whet.envs.rewards.values import Relation, Value

DIGITS = 50
CLOSE = sympy.Float(10, DIGITS) ** -40
CLOSE_AT_POINTS = sympy.Float(10, DIGITS) ** -30
ZERO = sympy.Float(10, DIGITS) ** -45
"""What cancels to less than this at numbers of ordinary size is zero."""
POINTS = (
    "1.3721856109", "0.4382716155", "2.7153406278", "-0.7321564987", "0.1192837465", "3.6190273344", "0.6283946177",
    "-2.1837465523", "5.1728394411", "0.2846173925",
)  # fmt: skip
INTEGERS = (7, 5, 3, 2, 11, 4, 6, 9, 8, 13)
FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
PARAMETERS = frozenset("kntm")
"""Names that stand for any integer in families of solutions."""
_KEEP_CASE = ConversionConfig(lowercase_symbols=False)
_NORMAL = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
WARM = (
    r"\frac{\sqrt{2}}{2}+x^{2}-3(x+1)", r"\sin(2x)\cos x-\tan^2(x)", r"\ln 2+\log_{10}3", r"e^{x}\cdot 2^{n+1}",
    r"5!+\binom{n}{k}", r"\sqrt[3]{4x}-|x-1|", r"a_{n}+b_1", r"\frac{a+b}{c-d}(x-y)", r"2\pi r^2+\frac{\pi}{6}",
    r"-x y z+0.25x", r"f(x)+1",
)  # fmt: skip
"""Expressions after which the parser has met most of its grammar."""
_ALONE = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc|ln|log)(?:\^(?:\d|\{\d+\}))?)\s*(?:\s|(?=\\))(\\?[a-zA-Z]+)\s*\\cdot(?![a-zA-Z])"
)
r"""`\cot t \cdot x`: the argument ends before the dot."""


class Unreadable(Exception):
    """The text is no expression that the parser reads."""


def load() -> Callable[[Mapping[str, Any]], int]:
    """The function that answers payloads (1 or 0: whether `answer` gives `gold`), with a warm parser.

    The parser learns its grammar as it reads, here outside any deadline.
    """
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its timeouts are off; ours are on
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    algebra = Algebra()
    for text in WARM:
        algebra.equal(text, f"{text}+1")
    algebra.otherwise("1 < x", "x > 1")

    def answer(payload: Mapping[str, Any]) -> int:
        asked = {name: payload[name] for name in ("question", "marked", "tolerance")}
        return int(answers(_gold(payload["gold"]), payload["gold"], payload["answer"], algebra, **asked))

    return answer


@lru_cache(maxsize=4096)
def _gold(text: str) -> Value:
    return read(text)


class Algebra:
    """What the rules of `agree` need of expressions in the notation of `plain`: compared by their values at points."""

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two expressions have the same value at every point.

        They may differ in the name of an integer parameter, or in capitals.
        """
        try:
            left, right = parse(gold), parse(answer)
        except Unreadable:
            return False
        if same(left, right) or _renamed(left, right):
            return True
        lower = {symbol: sympy.Symbol(str(symbol).lower()) for symbol in left.free_symbols | right.free_symbols}
        return left.free_symbols != right.free_symbols and same(left.xreplace(lower), right.xreplace(lower))

    def same_relation(self, gold: Relation, answer: Relation) -> bool:
        """Whether two relations have the same sides, perhaps from the other end, or differences in a constant ratio."""
        if len(gold.sides) != len(answer.sides):
            return False
        try:
            ours = [parse(side) for side in gold.sides]
            theirs = [parse(side) for side in answer.sides]
        except Unreadable:
            return False
        for signs, sides in (
            (answer.signs, theirs),
            (tuple(FLIPPED.get(sign, sign) for sign in reversed(answer.signs)), theirs[::-1]),
        ):
            if signs == gold.signs and all(map(same, ours, sides)):
                return True
        if len(ours) != 2:
            return False
        ratio = _ratio(ours[0] - ours[1], theirs[0] - theirs[1])
        if ratio is None:
            return False
        sign = gold.signs[0] if ratio > 0 else FLIPPED.get(gold.signs[0], gold.signs[0])
        return bool(sign == answer.signs[0])

    def solves(self, gold: Relation, answer: str) -> bool:
        """Whether the answer, put in for a name that it does not contain, makes the equation an identity."""
        try:
            left, right, given = parse(gold.sides[0]), parse(gold.sides[1]), parse(answer)
        except Unreadable:
            return False
        for name in sorted((left - right).free_symbols - given.free_symbols, key=str):
            if given.free_symbols and same(left.subs(name, given), right.subs(name, given)):
                return True
        return False

    def near(self, expression: str, decimal: Fraction, within: Fraction) -> bool:
        """Whether a real number lies within `within` of a decimal one."""
        try:
            number = _number(parse(expression))
        except Unreadable:
            return False
        if number is None or not number.is_real:
            return False
        return bool(abs(number - sympy.Rational(decimal)) <= sympy.Rational(within))

    def otherwise(self, gold: str, answer: str) -> bool:
        """Whether Math-Verify holds two texts for equal (not symmetric), for kinds of values that no rule covers."""
        wanted, given = ([part for part in _math_verify(text) if not isinstance(part, str)] for text in (gold, answer))
        return bool(wanted and given) and bool(verify(wanted, given, timeout_seconds=None))

    def same_function(self, gold: str, name: str, answer: str, other: str) -> bool:
        """Whether two functions of one named argument each are equal once both have one name."""
        try:
            return same(parse(gold), parse(answer).subs(sympy.Symbol(other), sympy.Symbol(name)))
        except Unreadable:
            return False


def _math_verify(text: str) -> list[Any]:
    wrapped = text if any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed")) else f"${text}$"
    found: list[Any] = math_verify_parse(wrapped, [LatexExtractionConfig()], parsing_timeout=None)
    return found


@lru_cache(maxsize=4096)
def parse(text: str) -> Any:
    """The expression that `text` writes, decimals exact, i and e as numbers. Raises `Unreadable`."""
    prepared = re.sub(r"(?<![a-zA-Z\\])(pi|theta|alpha|beta|sin|cos|tan|ln|log|exp)(?![a-zA-Z])", r"\\\1 ", text)
    prepared = _ALONE.sub(r"\1(\2)\\cdot ", prepared)
    prepared = (
        prepared.replace("^{\\circ}", "\\cdot \\pi/180")
        if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text)
        else prepared
    )
    prepared = re.sub(r"\\log(?![a-zA-Z_])\s*(?!_)", r"\\ln ", prepared)
    try:
        found = latex2sympy(prepared, is_real=None, normalization_config=_NORMAL, conversion_config=_KEEP_CASE)
    except Exception as error:
        raise Unreadable(text) from error
    if isinstance(found, list):
        found = found[0]
    if not isinstance(found, sympy.Basic) or isinstance(found, sympy.core.relational.Relational | sympy.Set):
        raise Unreadable(text)
    exact = {number: sympy.Rational(str(number)) for number in found.atoms(sympy.Float)}
    named = {sympy.Symbol("i"): sympy.I, sympy.Symbol("e"): sympy.E}
    return found.xreplace({**exact, **named})


def same(left: Any, right: Any) -> bool:
    """Whether two expressions have the same value wherever both have one."""
    if left == right:
        return True
    if left.is_Matrix or right.is_Matrix:
        return False
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if not symbols:
        return _equal_numbers(_number(left), _number(right), CLOSE)
    if len(symbols) > 12:
        return False
    whole = any(_needs_integers(side) for side in (left, right))
    agreed = 0
    for turn in range(10):
        values = {
            symbol: sympy.Integer(INTEGERS[(turn + 3 * place) % len(INTEGERS)])
            if whole
            else sympy.Float(POINTS[(turn + 3 * place) % len(POINTS)], DIGITS) + sympy.Float(place, DIGITS) / 7
            for place, symbol in enumerate(symbols)
        }
        ours, theirs = _number(left.xreplace(values)), _number(right.xreplace(values))
        if ours is None or theirs is None:
            continue
        if not (_real(ours) and _real(theirs)) and not (left.has(sympy.I) or right.has(sympy.I)):
            continue
        if not _equal_numbers(ours, theirs, CLOSE_AT_POINTS):
            return False
        agreed += 1
        if agreed == 5:
            return True
    return agreed >= 2


def _needs_integers(expression: Any) -> bool:
    if expression.has(sympy.factorial, sympy.binomial, sympy.floor, sympy.ceiling):
        return True
    return any(power.base.is_negative and power.exp.free_symbols for power in expression.atoms(sympy.Pow))


def _number(expression: Any) -> Any:
    """The value to `DIGITS` digits; None where it has none."""
    try:
        value = expression.doit().evalf(DIGITS, maxn=400)
    except Exception:  # noqa: BLE001 - sympy raises anything where an expression has no value
        return None
    finite = value.is_number and not value.has(sympy.zoo, sympy.nan, sympy.oo, -sympy.oo)
    return (
        value
        if finite and value.is_comparable | value.is_complex
        else (value if value in (sympy.oo, -sympy.oo) else None)
    )


def _real(value: Any) -> bool:
    return bool(abs(sympy.im(value)) <= CLOSE * (1 + abs(sympy.re(value))))


def _equal_numbers(left: Any, right: Any, close: Any) -> bool:
    if left is None or right is None:
        return False
    if left in (sympy.oo, -sympy.oo) or right in (sympy.oo, -sympy.oo):
        return bool(left == right)
    size = max(abs(left), abs(right))
    if left == 0 or right == 0:  # of numbers, what cancels has no digits that count, and e^{-200} has them
        return bool(size <= ZERO) and (close is not CLOSE or getattr(size, "_prec", 1) <= 1)
    return bool(abs(left - right) <= close * size)


def _ratio(left: Any, right: Any) -> Any:
    """The constant that left / right is, or None."""
    symbols = sorted(left.free_symbols, key=str)
    if not symbols or left.free_symbols != right.free_symbols:
        return None
    values = {symbol: sympy.Float(POINTS[3 * place % len(POINTS)], DIGITS) for place, symbol in enumerate(symbols)}
    ours, theirs = _number(left.xreplace(values)), _number(right.xreplace(values))
    if ours is None or theirs is None or theirs == 0 or not (_real(ours) and _real(theirs)):
        return None
    ratio = ours / theirs
    simple = sympy.nsimplify(ratio, rational=True, tolerance=1e-20)
    return simple if same(left, simple * right) else None


def _renamed(left: Any, right: Any) -> bool:
    """Whether the expressions differ in the name of one integer parameter (k pi, n pi)."""
    ours, theirs = left.free_symbols - right.free_symbols, right.free_symbols - left.free_symbols
    if len(ours) != 1 or len(theirs) != 1 or not left.has(sympy.pi):
        return False
    (mine,), (other,) = ours, theirs
    if not {str(mine), str(other)} <= PARAMETERS:
        return False
    return same(left, right.xreplace({other: mine}))
