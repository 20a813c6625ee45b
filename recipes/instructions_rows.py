"""Rows for instructions_grpo.yaml: one JSON object a line, in the columns of IFEval. Argument: train or test.

A prompt asks for a length, a word and a form. A tenth of all prompts, chosen by a hash, is kept for `test` and comes
once. Of the demonstrations (`completion`, which RL does not look at) seven in ten ignore one of the instructions.
"""

import hashlib
import json
import sys
from random import Random

WORDS = (
    "fox cat dog owl bee sun sea sky tree rain snow wind fire rock moon bird fish leaf road lake hill frog wolf milk"
)
FORMS = {
    "in capitals": "change_case:english_capital",
    "in small letters": "change_case:english_lowercase",
    "without commas": "punctuation:no_comma",
    "in quotes": "startend:quotation",
}


def text(random, relation, number, use, word, form, ignored):
    """A text that breaks the instruction at the place `ignored` (0, 1, 2 or none) and follows the others."""
    long = (relation == "at least") != (ignored == 0)
    length = random.randint(number, number + 2) if long else random.randint(2, number - 1)
    found = random.sample([other for other in WORDS.split() if other != word], length)
    said = {"say": (1, 0), "never say": (0, 1), "twice say": (2, 1)}[use][ignored == 1]
    for place in random.sample(range(length), said):
        found[place] = word
    form = "" if ignored == 2 else form
    # Small letters are broken by a capital, capitals by small letters, "without commas" by a comma.
    joined = (" " if form == "without commas" or (form and random.random() < 0.5) else ", ").join(found)
    joined = {"in small letters": joined, "in capitals": joined.upper()}.get(form, joined.capitalize())
    return f'"{joined}"' if form == "in quotes" else joined


def row(index, sloppy):
    random = Random(f"instructions {index}")
    relation, number = random.choice(("at least", "less than")), random.randint(3, 6)
    use, word, form = (
        random.choice(("say", "never say", "twice say")),
        random.choice(WORDS.split()),
        random.choice([*FORMS]),
    )
    ignored = random.randrange(3) if random.random() < sloppy else None
    uses = {
        "say": ("keywords:existence", {"keywords": [word]}),
        "never say": ("keywords:forbidden_words", {"forbidden_words": [word]}),
        "twice say": ("keywords:frequency", {"keyword": word, "frequency": 2, "relation": "at least"}),
    }
    return {
        "prompt": f"Write {relation} {number} words, {use} {word}, {form}.",
        "completion": text(random, relation, number, use, word, form, ignored),
        "instruction_id_list": ["length_constraints:number_words", uses[use][0], FORMS[form]],
        "kwargs": [{"num_words": number, "relation": relation}, uses[use][1], {}],
    }


if __name__ == "__main__":
    split, shown = sys.argv[1], set()
    for index in range(1_000_000):
        made = row(index, sloppy=0.7)
        held_out = int(hashlib.sha256(made["prompt"].encode()).hexdigest(), 16) % 10 == 0
        if held_out == (split == "test") and (split == "train" or made["prompt"] not in shown):
            shown.add(made["prompt"])
            print(json.dumps(made))
