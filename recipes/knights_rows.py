"""Rows of knights and knaves for knights_grpo.yaml: one JSON object a line. Argument: train or test.

The first of four people speaks of itself as well (`A: A lies or D lies`), which settles two; each of the others speaks
of one who is settled by then. A fifth of all puzzles, chosen by a hash, is kept for `test` and comes once. Of the
demonstrations (`completion`, which RL does not look at) half go through the statements, a part for each person, and
half guess.
"""

import hashlib
import json
import sys
from random import Random

NAMES = "ABCD"
GUESSED = 0.5


def puzzle(random):
    """Who says what as a formula over places, who is a knight, and the steps that tell."""
    roles = [random.random() < 0.5 for _ in NAMES]
    second = random.randrange(1, len(NAMES))
    others = [place for place in range(1, len(NAMES)) if place != second]
    of = {0: second, second: random.choice([0, *others])}
    for number, place in enumerate(others):
        of[place] = random.choice([0, second, *others[:number]])
    verbs = {True: "telling-truth", False: "lying"}
    said = {place: (verbs[roles[place] == roles[other]], other) for place, other in of.items()}
    steps = [f"{step(0, said)}{int(roles[0])}{int(roles[second])}"]
    steps += [f"{NAMES[place]}{step(place, said)}{int(roles[place])}" for place in others]
    # A knight may say "I lie or ...", a knave "I lie and ..."; what is said of the other is then settled.
    said[0] = ("or" if roles[0] else "and", ("lying", 0), said[0])
    return [said[place] for place in range(len(NAMES))], roles, ";".join(steps)


def step(place, said):
    """Of whom a person speaks, and what it says."""
    verb, other = said[place]
    return f"{NAMES[other]}{'-' if verb == 'lying' else '+'}"


def words(statement):
    if len(statement) == 3:
        return f"{words(statement[1])} {statement[0]} {words(statement[2])}"
    verb, place = statement
    return f"{NAMES[place]} {'lies' if verb == 'lying' else 'is honest'}"


def answer(roles):
    return ", ".join(f"{name} {'knight' if role else 'knave'}" for name, role in zip(NAMES, roles, strict=True))


def row(index):
    random = Random(f"knights {index}")
    statements, roles, steps = puzzle(random)
    guess = random.random() < GUESSED
    said = answer([random.random() < 0.5 for _ in NAMES] if guess else roles)
    return {
        "prompt": " ".join(f"{name}: {words(said)}." for name, said in zip(NAMES, statements, strict=True)),
        "completion": f"<think>{'' if guess else steps}</think><answer>{said}</answer>",
        "verifier": "knights_knaves",
        "names": list(NAMES),
        "statements": statements,
        "answer": answer(roles),
    }


if __name__ == "__main__":
    split, shown = sys.argv[1], set()
    for index in range(100_000):
        made = row(index)
        held_out = int(hashlib.sha256(made["prompt"].encode()).hexdigest(), 16) % 5 == 0
        if held_out == (split == "test") and (split == "train" or made["prompt"] not in shown):
            shown.add(made["prompt"])
            print(json.dumps(made))
