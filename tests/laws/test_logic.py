"""Laws of puzzles: every right answer is right however it is phrased, every wrong one wrong. All are drawn here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from whet.envs.rewards.logic import LOGIC, parse, value_of

COUNT = 2000
NAMES = ["Ann", "Bo", "Cy", "Di", "Ed", "Flo"]
DENIED = ["is not a", "isn't a", "isn’t a", "is no", "is never a", "cannot be a"]
Drawn = tuple[str, dict[str, Any], str, str]
"""The kind of puzzle, its row, a right answer, a wrong one."""


def roles_said(draw: random.Random, roles: dict[str, bool]) -> str:
    """Who is what, in one of the ways in which people say it."""
    word = {True: "knight", False: "knave"}
    knights, knaves = ([name for name, role in roles.items() if role is kind] for kind in (True, False))
    lists = [(", ".join(some), word[kind]) for some, kind in ((knights, True), (knaves, False)) if some]
    shuffled = draw.sample(list(roles.items()), len(roles))
    return draw.choice(
        [
            "\n".join(f"({n}) {name} is a {word[role]}" for n, (name, role) in enumerate(roles.items(), 1)),
            ", ".join(f"{name} is a {word[role]}" for name, role in shuffled) + ".",
            json.dumps({name: word[role].title() for name, role in shuffled}),
            "; ".join(f"**{name}**: {word[role].upper()}" for name, role in shuffled),
            " and ".join(
                f"{name} {draw.choice(DENIED)} {word[not role]}" if draw.random() < 0.5 else f"{name} is a {word[role]}"
                for name, role in shuffled
            ),
            ". ".join(f"{kind.title()}s: {some}" for some, kind in lists),
            "; ".join(f"{some.replace(', ', ' and ')} are {kind}s" for some, kind in lists),
        ]
    )  # fmt: skip


def knights(draw: random.Random) -> Drawn:
    """Statements with a single solution, which is not looked at by the checker."""
    names = NAMES[: draw.randint(2, 5)]
    while True:
        said = [statement(draw, len(names)) for _ in names]
        fits = [
            roles
            for roles in product((True, False), repeat=len(names))
            if all(bool(value_of(tree, dict(enumerate(roles)))) == role for tree, role in zip(said, roles, strict=True))
        ]
        if len(fits) == 1:
            break
    right = dict(zip(names, fits[0], strict=True))
    slips = draw.sample(names, draw.randint(1, len(names)))
    wrong = {name: role != (name in slips) for name, role in right.items()}
    columns = {"names": names, "statements": draw.choice([str(tuple(said)), said])}
    return "knights_knaves", columns, roles_said(draw, right), roles_said(draw, wrong)


def statement(draw: random.Random, people: int) -> Any:
    atom = (draw.choice(("lying", "telling-truth")), draw.randrange(people))
    other = (draw.choice(("lying", "telling-truth")), draw.randrange(people))
    return draw.choice([atom, ("not", atom), *((joint, atom, other) for joint in ("and", "or", "->", "<=>"))])


def coloured(draw: random.Random) -> Drawn:
    """Countries on a ring: neighbours differ, and one colour is given."""
    names, colours = NAMES[: draw.randint(3, 6)], ["red", "green", "blue"]
    while True:
        right = {name: draw.choice(colours) for name in names}
        if all(right[a] != right[b] for a, b in zip(names, [*names[1:], names[0]], strict=True)):
            break
    spelled = draw.choice(["!=", "≠"])
    rules = [f"{a} {spelled} {b}" for a, b in zip(names, [*names[1:], names[0]], strict=True)]
    rules.append(f"{names[0]} = {right[names[0]]}")
    wrong = {**right, names[1]: right[names[2]]}
    columns = {"variables": dict.fromkeys(names, colours), "constraints": rules}
    say = draw.choice(
        [
            lambda given: "; ".join(f"{name} = {colour}" for name, colour in given.items()),
            lambda given: "\n".join(f"- {name} is {colour}" for name, colour in given.items()),
            json.dumps,
        ]
    )
    return "constraints", columns, say(right), say(wrong)


def expression(draw: random.Random) -> Drawn:
    numbers = [draw.randint(1, 99) for _ in range(draw.randint(2, 6))]
    parts = [str(number) for number in numbers]
    while len(parts) > 1:
        draw.shuffle(parts)
        parts.append(f"({parts.pop()} {draw.choice('+-*')} {parts.pop()})")
    target = eval(parts[0])  # drawn above: numbers and three operations
    columns: dict[str, Any] = {draw.choice(["numbers", "nums"]): numbers, "target": target}
    text = draw.choice(
        [parts[0], parts[0].replace("*", "×"), parts[0].replace("*", "\\times"), f"{parts[0]} = {target}"]
    )
    wrong = draw.choice([f"{parts[0]} + 1", f"{target}", parts[0].replace(str(numbers[0]), str(numbers[0] + 1), 1),
                         f"{parts[0]} = {target + 1}", f"{parts[0]} * 1", f"0 + {parts[0]}"])  # fmt: skip
    return "countdown", columns, text, wrong


def sudoku(draw: random.Random) -> Drawn:
    box = draw.choice([2, 3])
    size = box * box
    digits = draw.sample("123456789"[:size], size)
    lines = ["".join(digits[(box * (row % box) + row // box + column) % size] for column in range(size))
             for row in range(size)]  # fmt: skip
    whole = "".join(lines)
    puzzle = "".join(digit if draw.random() < 0.4 else draw.choice("0.") for digit in whole)
    place = draw.randrange(len(whole))
    wrong = whole[:place] + draw.choice(digits).replace(whole[place], "0") + whole[place + 1 :]
    broken = draw.choice([wrong, whole[:-1], "".join([*lines[1:], lines[0]]) if puzzle[0] == whole[0] else wrong])
    spaced = "\n".join(" ".join(line) for line in lines)
    return (
        "sudoku",
        {"puzzle": puzzle},
        draw.choice([whole, spaced, json.dumps([list(map(int, line)) for line in lines])]),
        broken,
    )


def zebra(draw: random.Random) -> Drawn:
    values = [draw.sample(some, 3) for some in (NAMES, ["red", "light green", "blue"], ["tea", "milk", "cocoa"])]
    rows = [[str(house + 1), *(column[house] for column in values)] for house in range(3)]
    one, other, column = *draw.sample(range(3), 2), draw.randint(1, 3)
    swapped = [list(row) for row in rows]
    swapped[one][column], swapped[other][column] = rows[other][column], rows[one][column]
    columns = {"solution": {"header": ["House", "Name", "Color", "Drink"], "rows": rows}}
    say = draw.choice(
        [
            lambda table: json.dumps({f"House {row[0]}": dict(zip("ncd", row[1:], strict=True)) for row in table}),
            lambda table: "\n".join(f"House {row[0]}: {', '.join(row[1:])}" for row in table),
            lambda table: "| House | Name |\n|---|---|\n" + "\n".join(f"| {' | '.join(row)} |" for row in table),
        ]
    )
    return "zebra", columns, say(rows), say(swapped)


PUZZLES: list[Callable[[random.Random], Drawn]] = [knights, coloured, expression, sudoku, zebra]


@pytest.mark.parametrize("puzzle", PUZZLES, ids=lambda puzzle: puzzle.__name__)
def test_right_answers_are_right_and_wrong_ones_wrong(puzzle: Callable[[random.Random], Drawn]) -> None:
    draw = random.Random(puzzle.__name__)
    for _ in range(COUNT // len(PUZZLES)):
        kind, columns, right, wrong = puzzle(draw)
        assert LOGIC[kind](columns, right), (columns, right)
        assert not LOGIC[kind](columns, wrong), (columns, wrong)
        for other in (
            "",
            "I do not know.",
            right[: len(right) // 2],
            f"{right}\n{wrong}" if kind != "countdown" else "=",
        ):
            assert not LOGIC[kind](columns, other), (columns, other)


def test_formulas_mean_what_python_means() -> None:
    """Drawn formulas against Python's own reading, where both have the operations."""
    draw = random.Random(4)

    def formula(depth: int) -> str:
        if not depth:
            return draw.choice("pqr")
        kind = draw.choice(["not", "and", "or", "=="])
        left, right = formula(depth - 1), formula(depth - 1)
        return f"(not {left})" if kind == "not" else f"({left} {kind} {right})"

    for _ in range(300):
        text = formula(3)
        for values in product((True, False), repeat=3):
            given = dict(zip("pqr", values, strict=True))
            assert bool(value_of(parse(text), given)) == bool(eval(text, {}, given)), text
    for text in ("p -> q", "¬p ∨ q", "~(p & !q)", "p => q"):
        assert [bool(value_of(parse(text), {"p": p, "q": q})) for p, q in product((True, False), repeat=2)] == [
            True, False, True, True,
        ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "p ->", "(p", "p q", "p )", "import os", "p $ q"])
def test_what_is_no_formula_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="formula"):
        value_of(parse(text), {"p": True, "q": True})
