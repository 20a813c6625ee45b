r"""Whether an answer agrees with a gold one: rules for each type of value, exact before anything else.

The rules need no algebra where golds are numbers, texts, dates or choices. Where expressions must be compared, they use
an `Algebra` (`algebra.py`, sympy, in a worker process); the trainer passes `NO_ALGEBRA`, which raises `Undecided`, and
the question goes to a worker. So the rules stand here once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from whet.envs.rewards.notation import digits, predicate, same_words, squeeze, untext, words
from whet.envs.rewards.reader import read
from whet.envs.rewards.values import (
    Choice,
    Date,
    Formula,
    Items,
    Matrix,
    Named,
    Number,
    Piece,
    Region,
    Relation,
    Text,
    Value,
    YesNo,
)

if TYPE_CHECKING:  # it imports sympy, which the trainer's process does without
    from whet.envs.rewards.algebra import Algebra

FEWEST_DIGITS = 3
"""Significant digits that a decimal number must have to stand for an exact value that it rounds."""


DEGREES, RADIANS = (("deg", 1),), (("rad", 1),)
ORDERED = {"tuple", "bracket"}
CUT_DIGITS = 5
"""Significant digits from which a decimal number may also be cut off instead of rounded."""


class Undecided(Exception):
    """The rules need algebra."""


class _NoAlgebra:
    def __getattr__(self, name: str) -> object:
        raise Undecided


NO_ALGEBRA: Algebra = _NoAlgebra()  # type: ignore[assignment]


def agree(gold: Value, answer: Value, algebra: Algebra, tolerance: float = 0.0) -> bool:
    """Whether the answer is the gold value. `tolerance` is relative, of numbers. Raises `Undecided` with NO_ALGEBRA."""
    return _Rules(algebra, tolerance).agree(gold, answer)


class _Rules:
    def __init__(self, algebra: Algebra, tolerance: float) -> None:
        self.algebra, self.tolerance = algebra, Fraction(tolerance)

    def agree(self, gold: Value, answer: Value) -> bool:
        """By the types of both: names first, then what is one value, then what has parts."""
        if isinstance(gold, Named):
            return self._named(gold, answer)
        if isinstance(answer, Named):
            if isinstance(gold, Relation):
                return self._equation(gold, answer)
            return not isinstance(gold, Choice) and self.agree(gold, answer.value)
        if isinstance(gold, Choice) or isinstance(answer, Choice):
            return self._choices(gold, answer)
        if isinstance(gold, Text) or isinstance(answer, Text):
            return self._texts(gold, answer)
        match gold, answer:
            case (YesNo(), YesNo()) | (Date(), Date()):
                return gold == answer
            case Number(), Number():
                return self._numbers(gold, answer)
            case Number() | Formula(), Number() | Formula():
                return _compatible(gold, answer) and self._expressions(gold, answer)
            case Number(), Items():
                return "," in gold.text and self._items(_listed(gold), answer)
            case Items(), Number():
                return "," in answer.text and self._items(gold, _listed(answer))
            case _:
                return self._structures(gold, answer)

    def _structures(self, gold: Value, answer: Value) -> bool:
        match gold, answer:
            case Items(), Items():
                return self._items(gold, answer)
            case (Region(), Region() | Items()) | (Items(), Region()):
                ours, theirs = _as_region(gold), _as_region(answer)
                return ours is not None and theirs is not None and self._regions(ours.pieces, theirs.pieces)
            case Relation(), Relation():
                return _squeezed(gold) == _squeezed(answer) or self.algebra.same_relation(gold, answer)
            case Relation(), Items():  # `a < b < c` asks for an order
                ordered = set(gold.signs) == {"<"} and 2 < len(gold.sides) == len(answer.items)
                return ordered and self._in_order(tuple(map(read, gold.sides)), answer.items)
            case Relation(), Formula():
                return gold.signs == ("=",) and self.algebra.solves(gold, answer.text)
            case Matrix(), Matrix() | Items():
                rows = answer.rows if isinstance(answer, Matrix) else tuple((item,) for item in answer.items)
                same = [len(row) for row in gold.rows] == [len(row) for row in rows]
                return same and all(map(self._in_order, gold.rows, rows))
            case _:
                return False

    # ------------------------------------------------------------------------------------------- leaves

    def _named(self, gold: Named, answer: Value) -> bool:
        """Names are how a question is asked, not its answer; but functions may name their argument otherwise."""
        if not isinstance(answer, Named):
            return self.agree(gold.value, answer)
        ours, theirs = _argument(gold.name), _argument(answer.name)
        if ours and theirs and ours != theirs and isinstance(gold.value, Formula) and isinstance(answer.value, Formula):
            return self.algebra.same_function(gold.value.text, ours, answer.value.text, theirs)
        return self.agree(gold.value, answer.value)

    def _equation(self, gold: Relation, answer: Named) -> bool:
        """`y = 2x` may be one of the forms that the gold equation has."""
        one = isinstance(answer.value, Number | Formula) and gold.signs == ("=",)
        return one and self.agree(gold, Relation((answer.name, _text_of(answer.value) or ""), ("=",)))

    def _choices(self, gold: Value, answer: Value) -> bool:
        """Letters decide; an option's letter with its words answers a gold that is its words."""
        match gold, answer:
            case Choice(), Choice():
                return gold.letter == answer.letter
            case Choice(), Text() | Formula(unit=None):  # (B)/(A) is no B per ampere
                bare = re.sub(r"\W", "", untext(answer.text)).upper()
                return bare == gold.letter or (bool(gold.text) and same_words(gold.text, answer.text))
            case Text() | Formula(), Choice() if not answer.text:
                return same_words(untext(gold.text), answer.letter)
            case _, Choice():
                inner = read(answer.text)
                return not isinstance(inner, Choice) and self.agree(gold, inner)
            case Choice(text=text), _ if text:  # the option's value without its letter
                inner = read(text)
                return not isinstance(inner, Choice) and self.agree(inner, answer)
            case _:
                return False

    def _texts(self, gold: Value, answer: Value) -> bool:
        match gold, answer:
            case (Text(said), Formula(text)) | (Formula(text), Text(said)) if text.strip() == "\\infty":
                return words(said)[0] in ("infinite", "infinitely", "infinity")
            case Text() | Formula(), Text() | Formula():
                ours, theirs = untext(gold.text), untext(answer.text)
                return same_words(ours, theirs) or same_words(predicate(ours), predicate(theirs))
            case _:
                return False

    def _numbers(self, gold: Number, answer: Number) -> bool:
        if not _compatible(gold, answer):
            return False
        given = [answer.exact]
        if gold.unit is not None and answer.unit is not None and gold.unit != answer.unit:
            given = [answer.exact * answer.unit.factor / gold.unit.factor]
        if answer.percent and not gold.percent:
            given.append(answer.exact * 100)
        if gold.percent and not answer.percent:
            given.append(answer.exact / 100)
        if "_" in gold.text and "_" not in answer.text:  # the question asks for digits in a base
            return same_words(gold.text.partition("_")[0], answer.text)
        return any(self._close(gold, answer, value) for value in given)

    def _close(self, gold: Number, answer: Number, value: Fraction) -> bool:
        if value == gold.exact:
            return True
        if self.tolerance:
            return abs(value - gold.exact) <= self.tolerance * abs(gold.exact)
        if (gold.places is None) == (answer.places is None):
            return False
        decimal, exact = (gold, value) if gold.places is not None else (answer, gold.exact)
        longer = (exact * _scale(decimal)).denominator != 1  # else it has these places itself, and is simply different
        return longer and any(abs(exact - centre) <= within for centre, within in _windows(decimal))

    def _expressions(self, gold: Number | Formula, answer: Number | Formula) -> bool:
        if squeeze(gold.text) == squeeze(answer.text):
            return True
        for decimal, other in ((gold, answer), (answer, gold)):
            if isinstance(decimal, Number) and decimal.places is not None and (windows := _windows(decimal)):
                windows += [(decimal.exact, abs(decimal.exact) * self.tolerance)] if self.tolerance else []
                return any(self.algebra.near(other.text, centre, within) for centre, within in windows)
        if self.tolerance and isinstance(gold, Number):
            return self.algebra.near(answer.text, gold.exact, abs(gold.exact) * self.tolerance)
        return self.algebra.equal(_with_degrees(gold, answer), _with_degrees(answer, gold))

    # ------------------------------------------------------------------------------------- several values

    def _items(self, gold: Items, answer: Items) -> bool:
        kinds = {gold.kind, answer.kind}
        if "set" in kinds and kinds & ORDERED:
            return False
        ours, theirs = _by_name(gold), _by_name(answer)
        if ours.keys() == theirs.keys() and len(ours) == len(gold.items) == len(answer.items):
            return all(self.agree(value, theirs[name]) for name, value in ours.items())
        if kinds == ORDERED and len(gold.items) == 2:
            return False  # as intervals they have other ends
        if kinds & ORDERED:
            same_length = len(gold.items) == len(answer.items)
            if same_length and (
                self._in_order(gold.items, answer.items) or self._same_family(gold.items, answer.items)
            ):
                return True
        elif self._in_any_order(_distinct(gold), _distinct(answer)):
            return True
        flat, given = _flat(gold), _flat(answer)
        nested = len(flat) != len(gold.items) or len(given) != len(answer.items)
        return nested and len(flat) == len(given) and _shape(gold) != _shape(answer) and self._in_order(flat, given)

    def _same_family(self, gold: Sequence[Value], answer: Sequence[Value]) -> bool:
        """Whether tuples differ in the name of the one parameter that runs through them: (3x, 1 - x), (3t, 1 - t)."""
        ours, theirs = _names(gold), _names(answer)
        if len(ours) != 1 or len(theirs) != 1 or ours == theirs:
            return False
        return all(
            self.algebra.same_function(one.text, min(ours), other.text, min(theirs))
            for one, other in zip(gold, answer, strict=True)
            if isinstance(one, Formula | Number) and isinstance(other, Formula | Number)
        )

    def _in_order(self, gold: Sequence[Value], answer: Sequence[Value]) -> bool:
        return all(self.agree(one, other) for one, other in zip(gold, answer, strict=True))

    def _in_any_order(self, gold: Sequence[Value], answer: Sequence[Value]) -> bool:
        """Each gold item has an answer of its own. Rules first: a question for algebra only where none decides."""
        if len(gold) != len(answer):
            return False
        left = list(answer)
        undecided = False
        for item in gold:
            found = None
            for place, other in enumerate(left):
                try:
                    if self.agree(item, other):
                        found = place
                        break
                except Undecided:
                    undecided = True
            if found is None:
                if undecided:
                    raise Undecided
                return False
            del left[found]
        return True

    def _regions(self, gold: Sequence[Piece], answer: Sequence[Piece]) -> bool:
        ours, theirs = ([_piece_items(piece) for piece in dict.fromkeys(pieces)] for pieces in (gold, answer))
        return len(ours) == len(theirs) and self._in_any_order(ours, theirs)


# ------------------------------------------------------------------------------------------------------ helpers


def _windows(decimal: Number) -> list[tuple[Fraction, Fraction]]:
    """Where an exact value may lie for which a decimal stands, as (centre, half width): what rounds to it, and from
    `CUT_DIGITS` on also what it is the beginning of. None where it has too few digits to stand for anything.
    """
    if decimal.places is None or digits(decimal.text) < FEWEST_DIGITS:
        return []
    half = Fraction(1, 2 * _scale(decimal))
    cut = (decimal.exact + (half if decimal.exact > 0 else -half), half)
    return [(decimal.exact, half), *([cut] if digits(decimal.text) >= CUT_DIGITS else [])]


def _scale(decimal: Number) -> int:
    assert decimal.places is not None, "only decimals have places"
    return int(10**decimal.places) * (100 if decimal.percent else 1)


def _compatible(gold: Number | Formula, answer: Number | Formula) -> bool:
    """Whether the units do not exclude each other: two known ones must have one dimension, of formulas be equal."""
    if gold.unit is None or answer.unit is None or gold.unit == answer.unit:
        return True
    if isinstance(gold, Number) and isinstance(answer, Number):
        return gold.unit.dimension == answer.unit.dimension
    return {gold.unit.dimension, answer.unit.dimension} <= {DEGREES, RADIANS}


def _with_degrees(one: Number | Formula, other: Number | Formula) -> str:
    """The expression, in radians where it is in degrees and the other one speaks of pi."""
    if one.unit is not None and one.unit.dimension == DEGREES and "\\pi" in other.text:
        return f"\\frac{{({one.text})\\pi}}{{180}}"
    return one.text


def _argument(name: str) -> str:
    found = re.fullmatch(r"[A-Za-z]\w*\s*\(\s*([a-zA-Z])\s*\)", name.strip())
    return found[1] if found else ""


def _names(items: Sequence[Value]) -> set[str]:
    """The letters in a tuple of expressions; several where it is none of those."""
    if not all(isinstance(item, Formula | Number) for item in items):
        return {"", " "}
    texts = [re.sub(r"\\[a-zA-Z]+", " ", item.text) for item in items if isinstance(item, Formula)]
    return {letter for text in texts for letter in re.findall("[a-zA-Z]", text)} - {"e", "i"}


def _squeezed(relation: Relation) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(map(squeeze, relation.sides)), relation.signs


def _by_name(items: Items) -> dict[str, Value]:
    return {item.name: item.value for item in items.items if isinstance(item, Named)}


def _distinct(items: Items) -> list[Value]:
    """The items; of a set, equal ones once."""
    once = items.kind == "set" or all(isinstance(item, Items) for item in items.items)
    return list(dict.fromkeys(items.items)) if once else list(items.items)


def _flat(value: Value) -> list[Value]:
    if isinstance(value, Named):
        return _flat(value.value)
    return [leaf for item in value.items for leaf in _flat(item)] if isinstance(value, Items) else [value]


def _shape(value: Value) -> object:
    if isinstance(value, Named):
        return _shape(value.value)
    return tuple(_shape(item) for item in value.items) if isinstance(value, Items) else None


def _as_region(value: Value) -> Region | None:
    """`(1, 2)` and `[1, 2]` as intervals, `{1, 2}` as points."""
    if not isinstance(value, Items):
        return value if isinstance(value, Region) else None
    ends = [text for item in value.items if (text := _text_of(item)) is not None]
    if len(ends) != len(value.items):
        return None
    if value.kind in ("tuple", "bracket"):
        closed = value.kind == "bracket"
        return Region((Piece(ends[0], ends[1], closed, closed),)) if len(ends) == 2 else None
    return Region(tuple(Piece(end, end, True, True) for end in ends))


def _listed(number: Number) -> Items:
    """`1,200` as the two numbers that its comma may separate."""
    return Items("list", tuple(map(read, number.text.split(","))))


def _text_of(value: Value) -> str | None:
    if isinstance(value, Named):
        return _text_of(value.value)
    return value.text if isinstance(value, Number | Formula) else None


def _piece_items(piece: Piece) -> Items:
    low, high = read(piece.low), read(piece.high)
    marks = (Text(f"low {piece.low_closed}"), Text(f"high {piece.high_closed}"))
    return Items("tuple", (*marks, low, high))
