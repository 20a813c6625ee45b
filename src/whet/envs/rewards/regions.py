r"""Intervals, inequalities in one name, and sets described by one: unions of pieces.

region("-1 < x \le 2")   region("(-\infty, 3) \cup \{5\}")   region("\{x | x \ne 2\}")   region("x \ge 1, x < 0")
"""

from __future__ import annotations

import re

from whet.envs.rewards import arithmetic
from whet.envs.rewards.notation import closing, plain, split_top, untext
from whet.envs.rewards.values import Piece, Region

_GREEK = (
    "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|phi|omega|tau|eta|zeta|xi|psi|kappa|nu|chi|Delta|Omega"
    "|Phi|Gamma|ell"
)
_INDEX = r"(?:_(?:\{[^{}]*\}|\w))?'*"
ATOM = rf"(?:[A-Za-z]|\\(?:{_GREEK})(?![a-zA-Z])){_INDEX}"
APPLIED = rf"{ATOM}\s*(?:\([^()=<>]*\)|\[[^\[\]=<>]*\])?"
_POINTS = r"(?:\\(?:angle|triangle|overline|vec|widehat|frac|text)(?![a-z])|[A-Z]|[{}:/\s\d_|'])+"
NAME = re.compile(rf"\s*(?:{APPLIED}|\(?{APPLIED}(?:\s*,\s*{APPLIED})+\)?|\|?(?=[^A-Z]*[A-Z]){_POINTS}\|?)\s*")
WORD = re.compile(
    r"(?<![\\a-zA-Z])(?:[a-zA-Z]{3,}|(?:[Ii]s|[Ii]t|of|to|[Ww]e|[Ii]f)(?![a-zA-Z]))|[^\W\d_\x00-\x7f]{2,}"
)
FUNCTIONS = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "log", "lim", "max", "min", "exp", "mod", "gcd", "lcm", "det", "deg",
    "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sqrt", "cis", "sgn", "abs",
))  # fmt: skip
RELATION = re.compile(
    r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|\\approx(?![a-z])|\\equiv(?![a-z])|\\sim(?![a-z])|[<>=]"
)
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_UNION = re.compile(
    r"\s*(?:\\cup(?![a-z])|\\text\{\s*or\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|,(?=[^,]*(?:<|>|\\le|\\ge)))\s*"
)


def region(text: str) -> Region | None:
    """An interval, an inequality in one name, a union of them, or a set described by one."""
    described = text.rstrip().endswith("\\}") and text.count("\\{") == 1
    if described and (
        found := re.match(rf"\\\{{\s*({APPLIED})(?:\s*\\in\s*\\mathbb\{{R\}}|\s*\\in\s*R)?\s*[|:]\s*", text)
    ):
        return region(text.rstrip()[found.end() : -2])
    if not ("<" in text or ">" in text or "\\" in text or text[:1] in "[("):
        return None
    removed: list[str] = []
    if found := re.search(r"\s*(?:\\setminus|\\backslash|(?<=[\])}])\s*-)\s*\\\{([^{}]*)\\\}\s*$", text):
        removed = [part.strip() for part in found[1].split(",")]
        text = text[: found.start()]
    pieces: list[Piece] = []
    parts = split_top(text, _UNION)
    for part in parts:
        found_pieces = _pieces(part, alone=len(parts) == 1 and not removed, joined="\\cup" in text or bool(removed))
        if found_pieces is None:
            return None
        pieces += found_pieces
    return Region(tuple(_without(pieces, removed)))


def _pieces(part: str, *, alone: bool, joined: bool) -> list[Piece] | None:
    part = part.strip()
    if part.startswith("\\{") and part.endswith("\\}"):
        if "|" in part:
            inner = None if alone else region(part)
            return None if inner is None else list(inner.pieces)
        return None if alone else [Piece(p.strip(), p.strip(), True, True) for p in part[2:-2].split(",")]
    if part[:1] in ("[", "(") and part[-1:] in ("]", ")") and closing(part, 0) == len(part) - 1:
        ends = split_top(part[1:-1], re.compile(r"\s*[,;]\s*"))
        if len(ends) != 2:
            return None
        if not joined and "\\infty" not in part and (part[0] == "[") == (part[-1] == "]"):
            return None  # (1, 2) may be a point, [1, 2] a list: `_several` keeps the brackets
        return [Piece(ends[0].strip(), ends[1].strip(), part[0] == "[", part[-1] == "]")]
    return _inequality(part, alone=alone)


def _inequality(part: str, *, alone: bool) -> list[Piece] | None:
    """The pieces of `a < x <= b`, `x > a`, `a >= x`, `-x < a`, `x != a`; beside others, of `x = a`."""
    signs = RELATION.findall(part)
    sides = [side.strip() for side in RELATION.split(part)]
    chain = set(signs) <= {"<", "\\le"} or set(signs) <= {">", "\\ge"}
    if len(signs) == 2 and chain and re.fullmatch(APPLIED, sides[1]):
        if signs[0] in (">", "\\ge"):
            signs, sides = [_FLIPPED[sign] for sign in reversed(signs)], sides[::-1]
        return [Piece(sides[0], sides[2], signs[0] == "\\le", signs[1] == "\\le")]
    if len(signs) != 1:
        return None
    if signs[0] in _FLIPPED and not re.fullmatch(APPLIED, sides[0]) and re.fullmatch(APPLIED, sides[1]):
        signs, sides = [_FLIPPED[signs[0]]], sides[::-1]
    if signs[0] in _FLIPPED and (minus := re.fullmatch(rf"-\s*({ATOM})", sides[0])):
        signs, sides = [_FLIPPED[signs[0]]], [minus[1], f"-({sides[1]})"]
    if not re.fullmatch(APPLIED, sides[0]) or not sides[1] or WORD.search(sides[1]):
        return None
    return _half(signs[0], sides[1], alone=alone)


def _half(sign: str, end: str, *, alone: bool) -> list[Piece] | None:
    match sign:
        case "<" | "\\le":
            return [Piece("-\\infty", end, False, sign == "\\le")]
        case ">" | "\\ge":
            return [Piece(end, "\\infty", sign == "\\ge", False)]
        case "\\ne":
            return [Piece("-\\infty", end, False, False), Piece(end, "\\infty", False, False)]
        case "=" if not alone:
            return [Piece(end, end, True, True)]
    return None


def _without(pieces: list[Piece], removed: list[str]) -> list[Piece]:
    """The pieces, cut at points that are taken out, where all ends are rational or infinite."""
    for point in removed:
        at = arithmetic.value(plain(point))
        out: list[Piece] = []
        for piece in pieces:
            low, high = arithmetic.value(piece.low), arithmetic.value(piece.high)
            below = (low is not None and at is not None and low < at) or piece.low == "-\\infty"
            above = (high is not None and at is not None and at < high) or piece.high == "\\infty"
            if at is not None and below and above:
                out += [
                    Piece(piece.low, point, piece.low_closed, False),
                    Piece(point, piece.high, False, piece.high_closed),
                ]
            else:
                out.append(piece)
        pieces = out
    return pieces


def has_words(text: str) -> bool:
    """Whether there are words among the symbols."""
    return any(word.lower() not in FUNCTIONS for word in WORD.findall(untext(text)))
