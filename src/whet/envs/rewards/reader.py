r"""The reader of golds and answers: a text becomes a typed value, the first of the forms below that it has."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

from whet.envs.rewards import arithmetic
from whet.envs.rewards.notation import closing, nesting, plain, split_top, untext
from whet.envs.rewards.regions import APPLIED, FUNCTIONS, NAME, RELATION, WORD, has_words, region
from whet.envs.rewards.units import SINGLE, Unit, unit
from whet.envs.rewards.values import (
    LONGEST,
    Choice,
    Date,
    Formula,
    Items,
    Matrix,
    Named,
    Number,
    Region,
    Relation,
    Text,
    Value,
    YesNo,
)

_LABEL = re.compile(r"\s*([A-Za-z][A-Za-z ]{1,30}?)(?:\s+\d+)?\s*:\s+(?=\S)(?!\S*/)")
_AND = (
    r"\\text\{\s*(?:,?\s*(?:and|or|y|et|und))\s*,?\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])"
    r"|(?<=[\d)}])(?:and|or)(?=[A-Z])"
)
_SEMICOLON = re.compile(r"\s*;\s*")
_COMMA = re.compile(rf"\s*(?:,\s*(?:{_AND})?|;|{_AND})\s*")
_SEPARATOR = re.compile(rf"\s*(?:(?:,(?=\s)|,(?!\d\d\d(?!\d))|(?<!\d),)\s*(?:{_AND})?|;|{_AND})\s*")
"""Not the commas of 1,234; `_COMMA` takes those too, as brackets without other spaces do."""
_YES = {"yes": True, "true": True, "no": False, "false": False, "correct": True, "incorrect": False}
_LETTER = re.compile(
    r"(?:(?:option|choice|answer)\s+)?\(?\s*([A-J])\s*(?:[).:]+\s*(.*)|\)?)", re.DOTALL | re.IGNORECASE
)
_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
_ISO = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?:T\S*)?")
_AMERICAN = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")
_ORDINAL = r"(?:st|nd|rd|th)"
_DAY = re.compile(
    rf"(?:([A-Za-z]{{3,9}})\.?\s+(\d{{1,2}}){_ORDINAL}?|(\d{{1,2}}){_ORDINAL}?\s+(?:of\s+)?([A-Za-z]{{3,9}})\.?)(?:,?\s+(\d{{4}}))?"
)
_LEADING = re.compile(
    r"(?:(?:approximately|approx\.?|about|around|roughly|exactly|only|nearly|almost|is|are|a total of|total|therefore"
    r"|so|hence|thus)(?![a-zA-Z])|\\(?:approx|sim|therefore|implies|Rightarrow|rightarrow|to)(?![a-zA-Z])|=|:|≈|~|>\s*)\s*",
    re.IGNORECASE,
)
_CONDITION = re.compile(
    r"(?<=\S)\s*,?\s*(?:\\text\{\s*)?(?:for|where)\s+(?:all|any|every|each|some|\\?\w+\s+(?:is|are|\\in))(?![a-zA-Z])[^,]*"
)
"""Of the names in a formula: "for all x", "where k is an integer"."""
_ASIDE = re.compile(r"(?<=[\w}])\s+\((?=[^()\\]*[a-zA-Z]{3,}|\s*\w+\s*=)[^()\\]*\)\s*$")
_CURRENCY = re.compile(r"\s*(?:US|USD|\\?\$|€|£|¥|₹|EUR|GBP)\s*(?=[\d.\-\\(])")
_TAIL = re.compile(
    r"(?P<head>.*?[\d)}!\]])(?P<gap>\s*-?\s*)(?P<tail>(?=[%^\\A-Za-z€£¥₹¢°/])(?:\\text\{[^{}]*\}|\^\{\\(?:circ|prime)\}|\\(?:mu|Omega|cdot)(?![a-zA-Z])"
    r"|\^\{?-?\d\}?|(?<=[A-Za-z}])\d|[A-Za-z€£¥₹¢'°%/., ()-])+)",
    re.DOTALL,
)
DEEPEST = 40
"""Brackets within brackets of an answer that is read; a deeper one is text."""
MOST_SIGNS = 6
"""Double signs in an answer that is read: each doubles what it stands for."""
LONGEST_MEASURED = 200
"""Characters of a number with its words; a longer one is a sentence."""
_CLOCK = re.compile(r"(\d{1,2}):00\s*(?:[aApP]\.?[mM]\.?|o'clock)?")
_RATIO = re.compile(r"([^:]+)\s*:\s*([^:]+)")
_LITERAL = re.compile(r"-?[\d.,]+%?")
_BASE = re.compile(r"(\d+)_\{?(\d{1,2})\}?")


def read(raw: str) -> Value:
    """The value that `raw` writes. What is no number, formula or other known form is `Text`."""
    if len(raw) > LONGEST or nesting(raw) > DEEPEST or len(re.findall(r"\\[pm]{2}(?![a-z])|[±∓]", raw)) > MOST_SIGNS:
        return Text(raw)
    text = plain(raw)
    try:
        return _known(text) or _read(text, _unit_of(raw))
    except RecursionError:  # parts within parts without brackets, such as names of names
        return Text(text)


def _unit_of(raw: str) -> Unit | None:
    """The currency before a number; dollars that pair are LaTeX's."""
    found = _CURRENCY.match(raw.strip().lstrip("\"'`*({ "))
    if found is None or ("$" in found.group() and "\\$" not in found.group() and raw.count("$") % 2 == 0):
        return None
    return unit(found.group().strip().removeprefix("US").removeprefix("\\") or "USD")


def _known(text: str) -> Value | None:
    """Forms that are recognised as a whole: yes or no, a date, the letter of a choice."""
    bare = untext(text).strip(" .!")
    if bare.casefold() in _YES:
        return YesNo(_YES[bare.casefold()])
    if found := re.fullmatch(r"([B-H])\s+([A-Z][a-z].*)", bare, re.DOTALL):
        return Choice(found[1], found[2])
    return _date(bare) or _choice(bare)


def _choice(text: str) -> Choice | None:
    found = _LETTER.fullmatch(text)
    if found is None or (found[1].islower() and len(text) == 1):
        return None
    rest = (found[2] or "").strip()
    if re.match(r"(?:(?:or|and|/)\s*)?\(?[A-J]\s*(?:[).:,]|$)", rest):  # B) or C)
        return None
    return Choice(found[1].upper(), rest)


def _date(text: str) -> Date | None:
    if found := _ISO.fullmatch(text):
        return _valid(int(found[1]), int(found[2]), int(found[3]))
    if found := _AMERICAN.fullmatch(text):
        return _valid(int(found[3]), int(found[1]), int(found[2]))
    if found := _DAY.fullmatch(text):
        word = (found[1] or found[4]).casefold()
        months = [
            n for n, month in enumerate(_MONTHS, 1) if month == word or (len(word) in (3, 4) and month.startswith(word))
        ]
        return _valid(int(found[5] or 0), months[0], int(found[2] or found[3])) if months else None
    return None


def _valid(year: int, month: int, day: int) -> Date | None:
    return Date(year, month, day) if 1 <= month <= 12 and 1 <= day <= 31 else None


def _read(text: str, money: Unit | None = None) -> Value:
    text = _CONDITION.sub("", text.strip()).rstrip(" ,;") or text
    while (found := _LEADING.match(text)) and found.end() < len(text):
        text = text[found.end() :]
    text = _CURRENCY.sub("", text, count=1) if _CURRENCY.match(text) else text
    text = _ASIDE.sub("", text) if _ASIDE.sub("", text) else text
    for reader in (_number, _matrix, _member, region, _sides, _several):
        if (value := reader(text)) is not None:
            if money is not None and isinstance(value, Number | Formula) and value.unit is None:
                return replace(value, unit=money)
            return value
    return _leaf(text, money)


# ------------------------------------------------------------------------------------------------ numbers


def _number(text: str) -> Value | None:
    exact = arithmetic.value(text)
    if exact is not None:
        percent = text.endswith("%")
        return Number(text, exact, arithmetic.decimals(text), percent)
    if found := _CLOCK.fullmatch(text):
        return Number(text, Fraction(int(found[1])))
    if found := _BASE.fullmatch(text):
        base, digits = int(found[2]), found[1]
        if 2 <= base <= 10 and all(int(digit) < base for digit in digits) and len(digits) < 400:
            return Number(text, Fraction(int(digits, base)))
        return Formula(text)
    if (found := _RATIO.fullmatch(text)) and (top := arithmetic.value(found[1])) is not None:
        bottom = arithmetic.value(found[2])
        return Number(text, top / bottom) if bottom else None
    return _measured(text)


def _measured(text: str) -> Value | None:
    """A number or formula with words behind it: `8 centimeters`, `\\frac{1}{3} \\text{ km}`, `6th place`, `20%`."""
    found = _TAIL.fullmatch(text) if len(text) <= LONGEST_MEASURED else None
    if found is None:
        return None
    head, gap, tail = found["head"], found["gap"], found["tail"]
    if any(relation in text for relation in ("=", "<", ">", "\\le", "\\ge", "\\cup")) or ("," in tail):
        return None
    measure = unit(tail)
    words = untext(tail).strip()
    if measure is None:
        if not _is_noun(words, attached=not gap and "\\text" not in tail):
            return None
    elif words in SINGLE and not gap and "\\text" not in tail:
        return None  # 5m may be a product
    exact = arithmetic.value(head)
    if exact is not None and words in ("percent", "per cent"):
        return Number(f"{head}%", exact / 100, arithmetic.decimals(head), percent=True)
    if exact is not None:
        return Number(head, exact, arithmetic.decimals(head), unit=measure)
    inner = _read(head)
    return Formula(inner.text, measure) if isinstance(inner, Formula) else None


def _is_noun(words: str, *, attached: bool) -> bool:
    """Words behind a number that are no factors of it: `apples`, `th`, `miles per tank`; never `x` or `abc`."""
    if re.fullmatch(rf"\^?\{{?{_ORDINAL}\}}?(\s+[\w\s]+)?", words):
        return True
    if attached and not re.match(r"[a-zA-Z]{3,}", words):
        return False
    found = re.findall(r"[a-zA-Z]+", words)
    return bool(found) and any(len(word) >= 3 for word in found) and not (FUNCTIONS & {w.lower() for w in found})


# ------------------------------------------------------------------------------------- names and relations


def _member(text: str) -> Value | None:
    """`x \\in` a set or an interval."""
    found = re.match(rf"\s*({APPLIED})\s*\\in(?![a-z])\s*", text)
    inner = None if found is None else _read(text[found.end() :])
    return inner if isinstance(inner, Region | Items) else None


def _sides(text: str) -> Value | None:
    """A named value (`x = 3`, `S = a + b = 7`, `Paolo: 18`), or an equation or chain of relations."""
    if len(split_top(text, _SEPARATOR)) > 1:
        head = text.partition("=")[0]
        if not re.fullmatch(rf"\s*\(?{APPLIED}(?:\s*,\s*{APPLIED})+\)?\s*", head) or text.count("=") != 1:
            return None
    elif (found := _LABEL.match(text)) and found.end() < len(text):
        return Named(found[1].strip(), _read(text[found.end() :]))
    cuts = [
        (found.start(), found.end(), found.group())
        for found in RELATION.finditer(text)
        if _depth(text, found.start()) == 0
    ]
    if not cuts:
        return None
    ends = [0, *(end for _, end, _ in cuts)]
    starts = [*(start for start, _, _ in cuts), len(text)]
    sides = [text[a:b].strip() for a, b in zip(ends, starts, strict=True)]
    signs = tuple("=" if sign == "\\approx" else sign for _, _, sign in cuts)
    if not sides[0] and signs[0] == "=":
        return _read(sides[-1])
    if set(signs) == {"="} and sides[-1] and not _contradictory(sides) and (NAME.fullmatch(sides[0]) or _worked(sides)):
        return Named(" ".join(sides[0].split()), _read(sides[-1]))
    if has_words(text) or not all(sides):
        return None
    return Relation(tuple(sides), signs)


def _worked(sides: list[str]) -> bool:
    """Whether the sides are a calculation that ends in its result, as in `20 - 3 = 17`."""
    if len(sides) > 2 and not has_words(sides[0]):
        return True
    return re.fullmatch(r"(?=.*\d)[^a-zA-Z]*[-+*/^]?[^a-zA-Z]+|.*\\(?:frac|cdot|sqrt).*", sides[0]) is not None and (
        arithmetic.value(sides[0]) is not None and not sides[0].strip().isdigit()
    )


def _contradictory(sides: list[str]) -> bool:
    """Whether a chain gives several numbers, as `40 = 41 = 42` does; one may be another one rounded."""
    known = [
        (value, arithmetic.decimals(side) or 0)
        for side in sides
        if _LITERAL.fullmatch(side) and (value := arithmetic.value(side)) is not None
    ]
    return any(abs(one - other) * 2 * 10 ** min(a, b) > 1 for (one, a), (other, b) in pairwise(known))


def _depth(text: str, place: int) -> int:
    return sum((c in "([{") - (c in ")]}") for c in text[:place])


# ---------------------------------------------------------------------------------------------- several values


def _matrix(text: str) -> Value | None:
    text = text.strip("()") if "\\begin" in text else text
    found = re.fullmatch(r"\s*\[?\\begin\{([pbvB]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}\]?\s*", text, re.DOTALL)
    if found is None or "\\begin" in found[2]:
        return None
    rows = [row for row in re.split(r"\\\\|\\cr(?![a-z])", found[2]) if row.strip()]
    return Matrix(tuple(tuple(_read(cell) for cell in row.split("&")) for row in rows))


def _several(text: str) -> Value | None:
    """A set, tuple or list; `\\pm` counts as both signs."""
    for left, right, kind in (("\\{", "\\}", "set"), ("(", ")", "tuple"), ("[", "]", "bracket"), ("{", "}", "set")):
        if text.startswith(left) and text.endswith(right) and closing(text, len(left) - 1) == len(text) - 1:
            inner = text[len(left) : -len(right)]
            if right == "}" and left == "\\{":
                inner = inner.strip()
            parts = split_top(inner, _SEPARATOR if ", " in inner else _COMMA)
            if len(parts) == 1 and kind != "set":
                return _read(inner) if inner.strip() else None
            if len(parts) == 1 and left == "{":
                return _read(inner) if inner.strip() else None
            values = _items(parts)
            if kind == "tuple" and "\\pm" in text:
                return Items(
                    "list", tuple(Items("tuple", choice) for choice in product(*(_both(part) for part in parts)))
                )
            return Items(kind, values)  # type: ignore[arg-type]
    groups = split_top(text, _SEMICOLON)
    if len(groups) > 1 and all("," in group for group in groups):
        return Items("list", tuple(Items("tuple", _items(split_top(group, _SEPARATOR))) for group in groups))
    parts = split_top(text, _SEPARATOR)
    if len(parts) > 1 and all(part.strip() for part in parts) and not _prose_list(parts):
        return _summed(_items(parts))
    if "\\pm" in text or "\\mp" in text:
        both = _both(text)
        return Items("list", both) if len(both) > 1 else None
    return None


def _summed(items: tuple[Value, ...]) -> Value:
    """`3 hours and 20 minutes` as one value; other lists as they are."""
    units = [item.unit for item in items if isinstance(item, Number) and item.unit is not None]
    if (
        len(units) == len(items)
        and len({u.dimension for u in units}) == 1
        and len({u.factor for u in units}) == len(units)
    ):
        total = sum((n.exact * n.unit.factor for n in items if isinstance(n, Number) and n.unit), Fraction(0))
        return Number(str(total / units[0].factor), total / units[0].factor, None, False, units[0])
    return Items("list", items)


def _items(parts: list[str]) -> tuple[Value, ...]:
    return tuple(value for part in parts if part.strip() for value in _both(part))


def _both(part: str) -> tuple[Value, ...]:
    if "\\pm" not in part or "\\mp" in part:
        return (_read(part),)
    name, equals, rest = part.rpartition("=")
    rest = rest if equals and NAME.fullmatch(name) else part
    return tuple(_read(re.sub(r"\\pm(?![a-z])", sign, rest).strip().removeprefix("+")) for sign in ("+", "-"))


def _prose_list(parts: list[str]) -> bool:
    """Whether commas and "and" are those of a sentence: most parts have words and no value."""
    worded = sum(has_words(part) and not isinstance(_read(part), Number | Formula | Named) for part in parts)
    return worded > 0 and any(len(WORD.findall(part)) > 3 for part in parts)


def _leaf(text: str, money: Unit | None) -> Value:
    bare = untext(text)
    if not bare or has_words(text) or (bare.isalpha() and len(bare) > 2):
        return Text(bare)
    return Formula(text, money)
