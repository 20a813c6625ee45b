"""Rows of knights and knaves for knights_grpo.yaml: one JSON object a line. Argument: train or test.

One of four people speaks of itself as well (`A: A lies or B lies`), which settles two; each of the others is settled by
a statement of one that is known, or about one. A tenth of all puzzles, chosen by a hash, is kept for `test` and comes
once. Of the demonstrations (`completion`, which RL does not look at) four in ten show the steps, the others only the
roles.
"""

import hashlib
import json
import sys
from random import Random

NAMES = "ABCD"


def puzzle(random):
    """Who says what as a formula over places, who is a knight, and the steps that tell."""
    roles = [random.random() < 0.5 for _ in NAMES]
    order = random.sample(range(len(NAMES)), len(NAMES))
    first, second = order[:2]
    # A knight may say "I lie or ...", a knave "I lie and ..."; what is said of the other is then settled.
    same = roles[first] == roles[second]
    said = {first: ("or" if roles[first] else "and", ("lying", first), about(second, same))}
    steps = [bit(first, roles) + bit(second, roles)]
    for place, new in enumerate(order[2:], start=2):
        known = random.choice(order[:place])
        speaker, other = (known, new) if known not in said and random.random() < 0.5 else (new, known)
        same = roles[speaker] == roles[other]
        said[speaker] = about(other, same)
        steps.append(f"{NAMES[speaker]}{'+' if same else '-'}{NAMES[other]}:{bit(known, roles)}{bit(new, roles)}")
    for speaker in range(len(NAMES)):  # who has said nothing yet says something that fits
        other = random.choice([place for place in range(len(NAMES)) if place != speaker])
        said.setdefault(speaker, about(other, roles[speaker] == roles[other]))
    return [said[place] for place in range(len(NAMES))], roles, ";".join(steps)


def about(place, honest):
    return ("telling-truth" if honest else "lying", place)


def bit(place, roles):
    return f"{NAMES[place]}{int(roles[place])}"


def words(statement):
    if len(statement) == 3:
        return f"{words(statement[1])} {statement[0]} {words(statement[2])}"
    verb, place = statement
    return f"{NAMES[place]} {'lies' if verb == 'lying' else 'is honest'}"


def row(index, bare):
    random = Random(f"knights {index}")
    statements, roles, steps = puzzle(random)
    answer = ", ".join(f"{name} {'knight' if role else 'knave'}" for name, role in zip(NAMES, roles, strict=True))
    shown = "" if random.random() < bare else steps
    return {
        "prompt": " ".join(f"{name}: {words(said)}." for name, said in zip(NAMES, statements, strict=True)),
        "completion": f"<think>{shown}</think><answer>{answer}</answer>",
        "verifier": "knights_knaves",
        "names": list(NAMES),
        "statements": statements,
        "answer": answer,
    }


if __name__ == "__main__":
    split, shown = sys.argv[1], set()
    for index in range(1_000_000):
        made = row(index, bare=0.6)
        held_out = int(hashlib.sha256(made["prompt"].encode()).hexdigest(), 16) % 10 == 0
        if held_out == (split == "test") and (split == "train" or made["prompt"] not in shown):
            shown.add(made["prompt"])
            print(json.dumps(made))
