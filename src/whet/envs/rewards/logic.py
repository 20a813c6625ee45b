"""Answers to puzzles: an assignment, an expression or a grid, checked by the puzzle's own rules and not by one gold.

Each function of `LOGIC` takes the row's columns and the final answer; it raises `ValueError` for a row that is no such
puzzle. An answer that gives a name two values, leaves one out or breaks a rule is wrong.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

Columns = Mapping[str, Any]
Tree = Any
"""A formula: `(operation, *parts)`, with `("name", name)` and `("value", value)` for its leaves."""

LONGEST_ANSWER = 4000
"""Characters; no answer to a puzzle needs more."""
LONGEST_EXPRESSION = 200
ROLES: Mapping[str, Any] = {"knight": True, "truth-teller": True, "knave": False, "liar": False}
TRUTHS: Mapping[str, Any] = {"true": True, "yes": True, "false": False, "no": False}
_BINARY: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "<=>": (1, lambda a, b: bool(a) == bool(b)), "->": (2, lambda a, b: not a or bool(b)),
    "or": (3, lambda a, b: a or b), "xor": (3, lambda a, b: bool(a) != bool(b)), "and": (4, lambda a, b: a and b),
    "==": (6, operator.eq), "!=": (6, operator.ne), "<": (6, operator.lt), "<=": (6, operator.le),
    ">": (6, operator.gt), ">=": (6, operator.ge),
    "+": (7, operator.add), "-": (7, operator.sub), "*": (8, operator.mul), "/": (8, Fraction),
}  # fmt: skip
"""How tightly each binds, and what it does."""
_SPELLINGS = {
    "<->": "<=>", "↔": "<=>", "⇔": "<=>", "=>": "->", "→": "->", "⇒": "->", "∨": "or", "|": "or", "⊕": "xor",
    "^": "xor", "∧": "and", "&": "and", "=": "==", "≠": "!=", "≤": "<=", "≥": ">=", "~": "not", "¬": "not", "!": "not",
    "×": "*", "·": "*", "÷": "/", "−": "-",
}  # fmt: skip
_TOKEN = re.compile(r"\s*(<=>|<->|->|=>|==|!=|<=|>=|\d+|'[^']*'|\"[^\"]*\"|\w+|\S)")


def parse(text: str) -> Tree:
    """A formula over names: `p -> (q | !r)`, `a + b == 2 * c`, `house = 'red'`. Raises `ValueError`."""
    tokens = [_SPELLINGS.get(token, token) for token in _TOKEN.findall(text)][::-1]
    tree = _formula(tokens, 0)
    if tokens:
        raise ValueError(f"{text!r} goes on after a formula, with {tokens[-1]!r}")
    return tree


def _formula(tokens: list[str], tightness: int) -> Tree:
    """The formula that the tokens (the next one last) begin with, up to an operation that binds less tightly."""
    token = tokens.pop() if tokens else "its end"
    if token == "(":
        tree = _formula(tokens, 0)
        if not tokens or tokens.pop() != ")":
            raise ValueError("a formula has a parenthesis that never closes")
    elif token == "not":
        tree = (token, _formula(tokens, 5))
    elif token[0] in "'\"":
        tree = ("value", token[1:-1])
    elif token.isdecimal():
        tree = ("value", int(token))
    elif token.isidentifier():
        tree = ("name", token)
    else:
        raise ValueError(f"a formula has {token} in place of a name, a number or a parenthesis")
    while tokens and tokens[-1] in _BINARY and _BINARY[tokens[-1]][0] > tightness:
        binary = tokens.pop()
        tree = (binary, tree, _formula(tokens, _BINARY[binary][0] - (binary == "->")))
    return tree


def value_of(tree: Tree, given: Mapping[Any, Any]) -> Any:
    """The value of a formula under an assignment. Raises `ValueError` for what is none, and for a name without one."""
    match tree:
        case ["value", value]:
            return value
        case ["name" | "telling-truth", name] if name in given:
            return given[name]
        case ["lying", name] if name in given:
            return not given[name]
        case ["not", part]:
            return not value_of(part, given)
        case ["and" | "or" as junction, *parts] if parts:
            return (all if junction == "and" else any)(value_of(part, given) for part in parts)
        case [str() as name, left, right] if name in _BINARY:
            return _BINARY[name][1](value_of(left, given), value_of(right, given))
    raise ValueError(f"{tree!r} is no formula over {', '.join(map(str, given))}")


def assignment(text: str, names: Sequence[str], words: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a text says of each name: `A is a knight`, `A: knight`, `A and B are knights`, `Knights: A, B`, JSON.

    Names stand before their value, or after it where the text begins with one; `none` stands for no name. None where a
    name has two values or none, or a value is of no name.
    """
    either = ["|".join(re.escape(each) for each in sorted(part, key=len, reverse=True)) for part in (names, words)]
    denied = r"(?:not|\w+n['’]t|no|never|cannot\s+be)\s+"
    token = rf"(?<!\w)(?:({either[0]})|(?i:(none|nobody))|({denied})?(?:an?\s+)?((?i:{either[1]}))s?)(?!\w)"
    given: dict[str, Any] = {}
    waiting: list[str] = []
    value, idle, names_first = None, False, None
    for name, none, no, word in re.findall(token, text):
        names_first = bool(name) if names_first is None else names_first
        if word:
            said = (not words[word.lower()]) if no else words[word.lower()]
            if idle or (names_first and not waiting and said != value):
                return None
            value, idle = said, not names_first
        elif name:
            waiting.append(name)
        idle = idle and not (name or none)
        if bool(word) == names_first:
            if any(given.setdefault(told, value) != value for told in waiting):
                return None
            waiting = []
    return given if not (waiting or idle) and set(given) == set(names) else None


def knights_knaves(columns: Columns, answer: str) -> bool:
    """Every knight's statement is true and every knave's false; without statements, the given solution is met."""
    names, statements = list(columns["names"]), columns.get("statements")
    given = assignment(answer, names, ROLES)
    roles = [given is not None and given[name] for name in names]
    if statements is None:
        return given is not None and roles == list(columns["solution"])
    said = ast.literal_eval(statements) if isinstance(statements, str) else statements
    if len(said) != len(names):
        raise ValueError(f"there are {len(said)} statements by {len(names)} people")
    return [bool(value_of(tree, dict(enumerate(roles)))) for tree in said] == roles and given is not None


def constraints(columns: Columns, answer: str) -> bool:
    """Every constraint holds. `variables`: their names (true or false), or each with the list of its values."""
    variables = columns["variables"]
    if not isinstance(variables, Mapping):
        variables = {name: [True, False] for name in variables}
    words = {str(value).lower(): value for values in variables.values() for value in values}
    given = assignment(answer, list(variables), {**TRUTHS, **words} if True in words.values() else words)
    assigned = given or {name: values[0] for name, values in variables.items()}
    scope = {str(value): value for value in words.values()} | assigned  # a constraint may name values: house = red
    held = [value_of(parse(text), scope) for text in columns["constraints"]]
    return given is not None and all(held) and all(given[name] in values for name, values in variables.items())


def zebra(columns: Columns, answer: str) -> bool:
    """Every house has the values of its row of `solution`, {header, rows}, the first column naming the house.

    An answer has a section for each house: a line, a row of a table, an object of JSON.
    """
    rows = {str(row[0]): sorted(str(cell).casefold() for cell in row[1:]) for row in columns["solution"]["rows"]}
    cells = "|".join(sorted({re.escape(cell) for row in rows.values() for cell in row}, key=len, reverse=True))
    _, *parts = re.split(r"(?im)(?:^\W*(?:house\W*)?|\bhouse\W*)(\d+)\b(?!\s*houses)", answer)
    said: dict[str, list[str]] = {}
    for house, text in zip(parts[::2], parts[1::2], strict=True):
        said.setdefault(house, []).extend(re.findall(rf"(?<!\w)(?:{cells})(?!\w)", text.casefold()))
    return {house: sorted(found) for house, found in said.items()} == rows


def grid(columns: Columns, answer: str) -> bool:
    """The answer's grid of whole numbers is the gold one: JSON, or a line for each row."""
    return _grid(answer) == _grid(json.dumps(columns["answer"]))


def _grid(text: str) -> list[list[int]]:
    rows = re.findall(r"\[([\d\s,-]+)\]", text) or re.findall(r"(?m)^[ \t|]*(-?\d[\d \t,|-]*)$", text)
    return [[int(number) for number in re.findall(r"-?\d+", row)] for row in rows]


def sudoku(columns: Columns, answer: str) -> bool:
    """Every row, column and box has every digit once, and the given cells are kept (0 or . is empty)."""
    puzzle, digits = re.sub(r"[^\d.]", "", str(columns["puzzle"])).replace(".", "0"), re.sub(r"\D", "", answer)
    size = {16: 4, 81: 9}.get(len(puzzle))
    if size is None:
        raise ValueError(f"a puzzle has 16 or 81 cells; this one has {len(puzzle)}")
    if len(digits) != len(puzzle) or any(cell not in ("0", found) for cell, found in zip(puzzle, digits, strict=True)):
        return False
    box = 2 if size == 4 else 3
    parts: dict[tuple[str, int], set[str]] = {}
    for place, digit in enumerate(digits):
        row, column = divmod(place, size)
        for part in (("row", row), ("column", column), ("box", row // box * box + column // box)):
            parts.setdefault(part, set()).add(digit)
    return all(part == set("123456789"[:size]) for part in parts.values())


def countdown(columns: Columns, answer: str) -> bool:
    """An expression of exactly the given numbers under + - * / with the target as its value; `= target` may follow."""
    wanted = sorted(int(number) for number in columns["numbers" if "numbers" in columns else "nums"])
    target = Fraction(columns["target"])
    text = re.sub(r"\\(?:times|cdot|div)\b", lambda found: {"\\div": "/"}.get(found[0], "*"), answer)
    text, _, value = "".join(_SPELLINGS.get(each, each) if each in "×·÷−" else each for each in text).partition("=")
    text = text.strip(" $.`")
    if not 0 < len(text) <= LONGEST_EXPRESSION or not re.fullmatch(r"(?:(?:[1-9]\d*|0)(?!\d)|[+\-*/() ])+", text):
        return False
    try:
        tree = parse(text)
        reached = sorted(_numbers(tree)) == wanted and value_of(tree, {}) == target
        return reached and Fraction(value.strip(" $.`") or target) == target
    except (ValueError, ZeroDivisionError, RecursionError):
        return False


def _numbers(tree: Tree) -> Iterator[int]:
    if tree[0] == "value":
        yield tree[1]
    else:
        yield from _numbers(tree[1])
        yield from _numbers(tree[2])


LOGIC: Mapping[str, Callable[[Columns, str], bool]] = {
    function.__name__: function for function in (knights_knaves, constraints, zebra, grid, sudoku, countdown)
}
