"""Readers of rows that compare answers: the prompt, and the answers with the best first.

`preferences` makes comparisons of them; SFT learns the best answer, and a task for RL is the prompt alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from whet.config import DataConfig
from whet.data.faults import BadRow, Place, finite, kind_of, nearest
from whet.data.messages import parse_message, parse_messages
from whet.data.turns import filled, instruction, is_transcript, transcript, turns
from whet.errors import DataError
from whet.records import Message

Turns = tuple[Message, ...]


def in_order(columns: Mapping[str, Any], place: Place) -> tuple[tuple[Turns, ...], int]:
    """The answers, the best first and the first of equally good ones, and how many were tied. Raises `BadRow`."""
    listed, at = columns["answers"], place["answers"]
    if not isinstance(listed, list) or not listed:
        raise at.bad("not a list of answers", f"it is {kind_of(listed)}")
    answers = [answer_of(answer, at[index]) for index, answer in enumerate(listed)]
    if len(answers) == 1:
        return tuple(answers), 0
    best: dict[float, Turns] = {}
    for key, answer in sorted(zip(_order(columns, len(answers), place), answers, strict=True), key=lambda it: it[0]):
        if answer in best.values():
            raise at.bad("two answers are the same", "leave one of them out")
        best.setdefault(key, answer)
    return tuple(best.values()), len(answers) - len(best)


def answer_of(value: Any, place: Place) -> Turns:
    """An answer as text, as one message or as a list of them."""
    if value is None:
        raise place.bad("no answer", "a comparison needs both; fill it in or leave the row out")
    if isinstance(value, dict):
        return (parse_message(value, place),)
    if isinstance(value, list):
        return parse_messages(value, place)
    return (Message(role="assistant", content=filled(value, place)),)


def _order(columns: Mapping[str, Any], count: int, place: Place) -> list[float]:
    """A number for each answer, lower for better."""
    found = [name for name in ("ranks", "scores") if columns.get(name) is not None]
    if len(found) != 1:
        which = "both ranks and scores" if found else "neither ranks nor scores"
        raise place.bad(f"{which}", "give ranks (1 is the best) or scores (the highest is the best)")
    (name,) = found
    values = columns[name]
    if not isinstance(values, list) or len(values) != count:
        raise place[name].bad("not one number for each answer", f"it is {kind_of(values)} for {count} answers")
    numbers = [finite(value, place[name][index]) for index, value in enumerate(values)]
    return numbers if name == "ranks" else [-number for number in numbers]


PreferenceFormat = Literal["pair", "openai_preference", "ranked"]

REQUIRED: Mapping[PreferenceFormat, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"),
    "openai_preference": ("input", "preferred_output", "non_preferred_output"),
    "ranked": ("prompt", "answers"),
}
"""The columns that a format cannot do without, in the order in which formats are tried."""

Compared = tuple[Turns, tuple[Turns, ...], int]
"""The prompt, the answers (the best first), and how many were tied and left out."""


def compared(columns: Mapping[str, Any], form: PreferenceFormat, place: Place) -> Compared:
    """What a row of this format compares. Raises `BadRow` naming the field, fault and remedy."""
    prompt, answers, tied = _READERS[form](columns, place)
    if not prompt or prompt[-1].role == "assistant":
        raise place["prompt"].bad("no message to answer", "the prompt must end with a user's (or a tool's) message")
    for answer in answers:
        if answer[0].role != "assistant":
            raise place.bad(f"an answer begins with a {answer[0].role} message", "it must be the assistant's")
    return prompt, answers, tied


def format_of(columns: Mapping[str, Any]) -> PreferenceFormat | None:
    """The first format whose columns are all there; None: the row compares no answers."""
    return next((name for name, required in REQUIRED.items() if set(required) <= columns.keys()), None)


def refuse_lacking(columns: Mapping[str, Any], form: str, required: Sequence[str], place: Place) -> None:
    """Raise `BadRow` where a row lacks a column of the format that the recipe names."""
    for column in required:
        if column not in columns:
            raise place[column].bad(f"format {form} needs this column", nearest(column, columns))


def same(columns: Mapping[str, Any], place: Place) -> BadRow:
    """The complaint about a comparison of equal answers."""
    name = "rejected" if "rejected" in columns else "non_preferred_output"
    return place[name].bad("is the same as the chosen answer", "there is nothing to prefer; leave the row out")


def asked_format(columns: Mapping[str, Any], config: DataConfig, place: Place) -> PreferenceFormat:
    """The recipe's format, or else the row's. Raises `BadRow` where it compares no answers."""
    if config.format != "auto":
        asked = next((name for name in REQUIRED if name == config.format), None)
        if asked is None:
            raise DataError(f"data.format: {config.format} compares no answers; use one of {', '.join(REQUIRED)}")
        refuse_lacking(columns, asked, REQUIRED[asked], place)
        return asked
    found = format_of(columns)
    if found is not None:
        return found
    half = next((column for column in ("rejected", "chosen") if column not in columns), "rejected")
    raise place[half].bad(
        "no such column",
        f"there are: {', '.join(columns)}. Comparisons need chosen and rejected (or prompt, answers and ranks); "
        "say which column is which in data.columns",
    )


# ------------------------------------------------------------------------------------------- the formats


def _pair(columns: Mapping[str, Any], place: Place) -> Compared:
    given, names = _prompt(columns, place), ("chosen", "rejected")
    texts = [columns[name] for name in names]
    if given is None and all(isinstance(text, str) for text in texts):
        chosen, rejected = (filled(text, place[name]) for text, name in zip(texts, names, strict=True))
        if chosen.strip() == rejected.strip():
            raise same(columns, place)
        if not (is_transcript(chosen) and is_transcript(rejected)):
            prompt, *parts = _common_text(chosen, rejected, place)
            return (
                (Message(role="user", content=prompt),),
                tuple((Message(role="assistant", content=part),) for part in parts),
                0,
            )
        pair = [transcript(text, place[name]) for text, name in zip((chosen, rejected), names, strict=True)]
    else:
        pair = [answer_of(columns[name], place[name]) for name in names]
    if given is not None and all(answer[0].role == "assistant" for answer in pair):
        return given, tuple(pair), 0
    prompt_turns, answers = _common_turns(pair[0], pair[1], place)
    if given is not None and prompt_turns[-1].content.strip() != given[-1].content.strip():
        raise place["chosen"].bad("answers another prompt than the row's own", "the two must be the same message")
    return prompt_turns, answers, 0


def _openai(columns: Mapping[str, Any], place: Place) -> Compared:
    asked = columns["input"]
    if not isinstance(asked, dict) or "messages" not in asked:
        raise place["input"].bad("no messages", f"it is {kind_of(asked)}; write {{'messages': [...]}}")
    prompt = parse_messages(asked["messages"], place["input"]["messages"])
    names = ("preferred_output", "non_preferred_output")
    chosen, rejected = (answer_of(columns[name], place[name]) for name in names)
    return prompt, (chosen, rejected), 0


def _ranked(columns: Mapping[str, Any], place: Place) -> Compared:
    answers, tied = in_order(columns, place)
    if len(answers) < 2:
        raise place["answers"].left_out("all answers are tied" if tied else "an answer with nothing to compare it with")
    return turns(columns, "prompt", "user", place), answers, tied


_READERS: dict[PreferenceFormat, Callable[[Mapping[str, Any], Place], Compared]] = {
    "pair": _pair,
    "openai_preference": _openai,
    "ranked": _ranked,
}


# ---------------------------------------------------------------------------------------- their columns


def _prompt(columns: Mapping[str, Any], place: Place) -> Turns | None:
    """The prompt of a pair where it has a column of its own."""
    for name in ("prompt", "conversations", "messages"):
        if columns.get(name) is not None:
            return turns(columns, name, "user", place)
    return instruction(columns, place) if columns.get("instruction") is not None else None


# ------------------------------------------------------------------------------------- implicit prompts


def _common_turns(chosen: Turns, rejected: Turns, place: Place) -> tuple[Turns, tuple[Turns, ...]]:
    """Leading messages that both have are the prompt; what follows in each is its answer."""
    pairs = zip(chosen, rejected, strict=False)  # up to the shorter one's end
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) == common:
            raise place[name].bad("nothing after the common prompt", "one of the two goes on where the other ends")
        if messages[common].role != "assistant":
            where = f"the two part at message {common + 1}, which is not the assistant's"
            raise place[name].bad("another prompt than the other answer's", f"{where}; both must answer the same")
    return chosen[:common], (chosen[common:], rejected[common:])


def _common_text(chosen: str, rejected: str, place: Place) -> tuple[str, str, str]:
    """The beginning that two texts have in common, up to the end of a word, and how each goes on."""
    pairs = enumerate(zip(chosen, rejected, strict=False))  # up to the shorter one's end
    common = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    prompt = chosen[: max((match.end() for match in re.finditer(r"\s", chosen[:common])), default=0)]
    if not prompt.strip():
        raise place["prompt"].bad("no such column, and the texts have no beginning in common", _WHERE)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[len(prompt) :].strip():
            raise place[name].bad("nothing after the common prompt", "one of the two goes on where the other ends")
    return prompt.rstrip(), chosen[len(prompt) :], rejected[len(prompt) :]


_WHERE = "name the prompt's column in data.columns.prompt"
