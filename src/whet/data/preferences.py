"""Rows that say which answer is better: comparisons (DPO, reward models) and single answers called good or bad (KTO).

| format            | columns                                                    | becomes                             |
|-------------------|------------------------------------------------------------|-------------------------------------|
| pair              | chosen, rejected: texts, messages or one message each      | two answers, the chosen one first   |
| openai_preference | input: {messages}, preferred_output, non_preferred_output  | the same                            |
| ranked            | prompt, answers, and ranks (1 is best) or scores           | the answers, the best first         |
| judged            | label: true or false, beside any conversation of `formats` | its last turn, called good or bad   |

Any comparison is also two judged answers: its best is good, its worst is bad.

The prompt of a pair stands in `prompt`, `conversations`, `messages` or `instruction` (`input`, `history`); else it is
what the two have in common: leading messages, turns of an HH-RLHF transcript, or the beginning of the text.
Columns beside them: `system`, `tools`, and for two answers `margin` and `confidence`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from whet.config import DataConfig
from whet.data.base import Comparison, Judged, Row
from whet.data.columns import rename
from whet.data.faults import Dropped, Place, finite, kind_of, nearest
from whet.data.formats import conversation_of
from whet.data.known import ANSWERS
from whet.data.messages import parse_messages, read_tools, refuse_settings
from whet.data.ranked import Turns, answer_of, in_order
from whet.data.sources import read_examples
from whet.data.turns import filled, instruction, is_transcript, transcript, turns, untrained, with_system
from whet.errors import DataError
from whet.records import Message

PreferenceFormat = Literal["pair", "openai_preference", "ranked"]

REQUIRED: Mapping[PreferenceFormat, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"),
    "openai_preference": ("input", "preferred_output", "non_preferred_output"),
    "ranked": ("prompt", "answers"),
}
"""The columns that a format cannot do without, in the order in which formats are tried."""


def load_comparisons(config: DataConfig) -> tuple[list[Comparison], Dropped]:
    """All comparisons of a source, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return read_examples(config, to_comparison, ANSWERS)


def load_judged(config: DataConfig) -> tuple[list[Judged], Dropped]:
    """The judged answers of all rows, up to `limit` rows, and what was left out; raises as `load_comparisons` does."""
    rows, dropped = read_examples(config, to_judged, ANSWERS)
    return [answer for row in rows for answer in row], dropped


def to_comparison(row: Row, config: DataConfig) -> Comparison:
    """A row as answers in order of preference. Raises `BadRow` naming file, line, field, fault and remedy."""
    columns = _long_names(rename(row, config))
    place = Place(row.origin)
    prompt, answers, tied = _READERS[_format_of(columns, config, place)](columns, place)
    if not prompt or prompt[-1].role == "assistant":
        raise place["prompt"].bad("no message to answer", "the prompt must end with a user's (or a tool's) message")
    for answer in answers:
        if answer[0].role != "assistant":
            raise place.bad(f"an answer begins with a {answer[0].role} message", "it must be the assistant's")
    refuse_settings(columns, place)
    margin = _number(columns, "margin", place)
    confidence = _number(columns, "confidence", place)
    if len(answers) > 2 and (margin is not None or confidence is not None):
        raise place.bad("margin and confidence are for two answers", f"this row has {len(answers)}")
    if confidence is not None and not 0 <= confidence <= 1:
        raise place["confidence"].bad("not a probability", f"it is {kind_of(confidence)}; it lies between 0 and 1")
    return Comparison(
        origin=row.origin,
        prompt=untrained(with_system(prompt, columns, config, place)),
        answers=answers,
        tools=read_tools(columns, place),
        margin=margin,
        confidence=1.0 if confidence is None else confidence,
        tied=tied,
    )


def to_judged(row: Row, config: DataConfig) -> tuple[Judged, ...]:
    """A row as an answer that is good or bad; or as two, the best and the worst of a comparison without a `label`.

    Raises `BadRow` naming file, line, field, fault and remedy.
    """
    columns = rename(row, config)
    if columns.get("label") is None and _first_format(_long_names(columns)) is not None:
        return _unpaired(to_comparison(row, config))
    place = Place(row.origin)
    messages = with_system(conversation_of(columns, config, place), columns, config, place)
    if messages[-1].role != "assistant" or len(messages) < 2:
        raise place.bad("no answer to judge", "the last message must be the assistant's, after a prompt")
    refuse_settings(columns, place)
    tools = read_tools(columns, place)
    prompt, good = untrained(messages[:-1]), _label(columns, place)
    return (Judged(origin=row.origin, prompt=prompt, answer=messages[-1:], tools=tools, good=good),)


def _label(columns: Mapping[str, Any], place: Place) -> bool:
    if "label" not in columns:
        raise place["label"].bad("no label", f"there are: {', '.join(columns)}; name yours in data.columns.label")
    label = columns["label"]
    if label is None:
        raise place["label"].bad("is null", "write true for a good answer and false for a bad one")
    if label not in (0, 1) or isinstance(label, float):
        raise place["label"].bad(
            "neither true nor false", f"it is {kind_of(label)}; write true for a good answer and false for a bad one"
        )
    return bool(label)


def _unpaired(comparison: Comparison) -> tuple[Judged, Judged]:
    """The best and the worst answer, as TRL makes two rows of a pair. Margin and confidence mean nothing to them."""
    left_out = len(comparison.answers) - 2 + comparison.tied
    best, worst = (
        Judged(origin=comparison.origin, prompt=comparison.prompt, answer=answer, tools=comparison.tools, good=good)
        for answer, good in ((comparison.answers[0], True), (comparison.answers[-1], False))
    )
    return best, replace(worst, left_out=left_out)


# ------------------------------------------------------------------------------------------- the formats


def _long_names(columns: Mapping[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory's second spelling, `chosen_messages`, as the first."""
    return {
        name.removesuffix("_messages") if name in ("chosen_messages", "rejected_messages") else name: value
        for name, value in columns.items()
    }


def _format_of(columns: Mapping[str, Any], config: DataConfig, place: Place) -> PreferenceFormat:
    if config.format != "auto":
        asked = next((name for name in REQUIRED if name == config.format), None)
        if asked is None:
            raise DataError(f"data.format: {config.format} compares no answers; use one of {', '.join(REQUIRED)}")
        for column in REQUIRED[asked]:
            if column not in columns:
                raise place[column].bad(f"format {asked} needs this column", nearest(column, columns))
        return asked
    found = _first_format(columns)
    if found is not None:
        return found
    half = next((column for column in ("rejected", "chosen") if column not in columns), "rejected")
    raise place[half].bad(
        "no such column",
        f"there are: {', '.join(columns)}. Comparisons need chosen and rejected (or prompt, answers and ranks); "
        "say which column is which in data.columns",
    )


def _first_format(columns: Mapping[str, Any]) -> PreferenceFormat | None:
    return next((name for name, required in REQUIRED.items() if set(required) <= columns.keys()), None)


Compared = tuple[Turns, tuple[Turns, ...], int]
"""The prompt, the answers (the best first), and how many were tied and left out."""


def _pair(columns: Mapping[str, Any], place: Place) -> Compared:
    given, names = _prompt(columns, place), ("chosen", "rejected")
    texts = [columns[name] for name in names]
    if given is None and all(isinstance(text, str) for text in texts):
        chosen, rejected = (filled(text, place[name]) for text, name in zip(texts, names, strict=True))
        if chosen.strip() == rejected.strip():
            raise _same(place["rejected"])
        if not (is_transcript(chosen) and is_transcript(rejected)):
            prompt, *parts = _common_text(chosen, rejected, place)
            return (Message(role="user", content=prompt),), tuple(map(_said, parts)), 0
        pair = [transcript(text, place[name]) for text, name in zip((chosen, rejected), names, strict=True)]
    else:
        pair = [answer_of(columns[name], place[name]) for name in names]
    if pair[0] == pair[1]:
        raise _same(place["rejected"])
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
    if chosen == rejected:
        raise _same(place[names[1]])
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


def _said(text: str) -> Turns:
    return (Message(role="assistant", content=text),)


def _number(columns: Mapping[str, Any], name: str, place: Place) -> float | None:
    return None if columns.get(name) is None else finite(columns[name], place[name])


def _same(place: Place) -> Exception:
    return place.bad("is the same as the chosen answer", "there is nothing to prefer; leave the row out")


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
