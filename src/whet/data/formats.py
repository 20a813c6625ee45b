"""Rows to examples: the formats that people have, recognised by their columns.

| format            | columns                                        | becomes                                       |
|-------------------|------------------------------------------------|-----------------------------------------------|
| pair              | chosen, rejected (`preferences`)               | the prompt and the chosen answer              |
| openai_preference | input, preferred_output, non_preferred_output  | the same                                      |
| messages          | messages (tools, system)                       | the conversation                              |
| sharegpt          | conversations: [{from, value}] (tools, system) | the conversation                              |
| prompt_completion | prompt, completion: texts or messages          | two turns; nothing of the prompt is trained   |
| alpaca            | instruction, input, output (system, history)   | turns; replies of the history are not trained |
| ranked            | prompt, answers, and ranks or scores           | the prompt and its best answer                |
| text              | text                                           | running text, or a transcript's turns         |
| prompt            | prompt: text or messages, and any others       | a task for RL; the other columns are kept     |

A task for RL is also made of the prompt of `messages`, `alpaca` and comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Literal

from whet.config import DataConfig
from whet.data.base import Answered, Conversation, Row, Task
from whet.data.columns import rename
from whet.data.faults import BadRow, Dropped, Place
from whet.data.known import TASKS, TURNS
from whet.data.messages import parse_messages, read_settings, read_tools
from whet.data.pairs import REQUIRED as COMPARISONS
from whet.data.pairs import compared, in_order, refuse_lacking
from whet.data.sources import Reading, read_examples, reading
from whet.data.turns import as_context, instruction, is_transcript, text_of, transcript, turns, with_system
from whet.errors import DataError
from whet.records import Message

Format = Literal[
    "pair", "openai_preference", "messages", "sharegpt", "prompt_completion", "alpaca", "ranked", "text", "prompt"
]

REQUIRED: Mapping[Format, tuple[str, ...]] = {
    "pair": COMPARISONS["pair"],
    "openai_preference": COMPARISONS["openai_preference"],
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "ranked": ("prompt", "answers"),
    "text": ("text",),
    "prompt": ("prompt",),
}
"""The columns that a format cannot do without, in the order in which formats are tried."""


TAKEN = {column for columns in REQUIRED.values() for column in columns} | {"input", "system", "history", "label"}
"""Columns that say what a row is: a row that is written anew keeps none of them besides its own."""


def detect(columns: Collection[str]) -> Format | None:
    """The first format whose required columns are all there; None: no format that we know."""
    return _detected(frozenset(columns))


@lru_cache  # asked for every row
def _detected(columns: frozenset[str]) -> Format | None:
    return next((name for name, required in REQUIRED.items() if columns.issuperset(required)), None)


def to_conversation(row: Row, config: DataConfig) -> Conversation:
    """A row as an SFT example. Raises `BadRow` naming file, line, field, fault and remedy."""
    columns = rename(row, config)
    place = Place(row.origin)
    _refuse_judged(columns, config, place)
    if _format_of(columns, config, place) == "text":
        text = text_of(columns, "text", place)
        if config.format == "text" or "text" in config.columns or not _has_turns(columns, text, place):
            return Conversation(origin=row.origin, text=text)
    messages = with_system(conversation_of(columns, config, place), columns, config, place)
    return Conversation(
        origin=row.origin, messages=messages, tools=read_tools(columns, place), settings=read_settings(columns, place)
    )


def conversation_of(columns: Mapping[str, Any], config: DataConfig, place: Place) -> tuple[Message, ...]:
    """The messages of a row in any format that has turns. Raises `BadRow`."""
    name = _format_of(columns, config, place)
    if name not in _READERS:
        raise place["completion"].bad("no such column", _hint(columns, place, answered=True))
    return _READERS[name](columns, place)


def to_task(row: Row, config: DataConfig) -> Task:
    """A row as a task: the messages to answer, and all other columns.

    Columns keep their own names and have ours beside them where `data.columns` renames. Raises `BadRow`.
    """
    columns = rename(row, config)
    place = Place(row.origin)
    name, asked = _asked(columns, config, place)
    return Task(
        id=str(row.origin),
        messages=with_system(asked, columns, config, place),
        columns={column: value for column, value in columns.items() if column != name},
        conversational=not isinstance(columns[name], str),
        settings=read_settings(columns, place),
    )


def to_answered(row: Row, config: DataConfig) -> Answered:
    """A row as a prompt and its answer (the last assistant message), or as a prompt alone. Raises `BadRow`."""
    columns = rename(row, config)
    place = Place(row.origin)
    alone = config.format in ("auto", "prompt") and detect(columns) == "prompt" and detect(config.columns) != "alpaca"
    messages = turns(columns, "prompt", "user", place) if alone else conversation_of(columns, config, place)
    messages = with_system(messages, columns, config, place)
    answered = messages[-1].role == "assistant"
    prompt = messages[:-1] if answered else messages
    return Answered(origin=row.origin, prompt=prompt, answer=messages[-1] if answered else None, columns=columns)


_TASKS: tuple[Format, ...] = ("prompt", "messages", "pair", "openai_preference", "alpaca")
"""Formats that have a message to answer, in the order in which they are tried."""


def _asked(columns: Mapping[str, Any], config: DataConfig, place: Place) -> tuple[str, tuple[Message, ...]]:
    """The message to answer, and those before it, with the column that they stand in."""
    form: str = "prompt" if config.format == "prompt_completion" else config.format
    if form == "auto":
        there = {column for column, value in columns.items() if value is not None}
        form = next((name for name in _TASKS if set(REQUIRED[name]) <= there), "prompt")
    elif form not in _TASKS:
        raise DataError(
            f"data.format: {config.format} has no prompts to answer; leave it out and map data.columns.prompt"
        )
    elif form not in ("prompt", "messages"):
        _format_of(columns, config, place)
    match form:
        case "pair" | "openai_preference":
            return REQUIRED[form][0], compared(columns, form, place)[0]
        case "alpaca":
            return "instruction", instruction(columns, place)
    if form not in columns:
        raise place["prompt"].bad("no such column", _hint(columns, place, answered=False))
    messages = turns(columns, form, "user", place)
    if messages[-1].role == "assistant":
        raise place[form].bad("ends with an assistant message", "a task ends with the message to answer")
    return form, messages


def load_conversations(config: DataConfig) -> tuple[list[Conversation], Dropped]:
    """All SFT examples of a source, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return read_examples(config, to_conversation, TURNS)


def load_answered(config: DataConfig) -> tuple[list[Answered], Dropped]:
    """All prompts and answers of a source, up to `limit`, and what was left out. Raises `DataError` for none."""
    return read_examples(config, to_answered, TURNS)


def read_conversations(config: DataConfig) -> Reading[Conversation]:
    """The same, not read yet."""
    return reading(config, to_conversation, TURNS)


def load_tasks(config: DataConfig) -> tuple[list[Task], Dropped]:
    """All tasks of a source, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return read_examples(config, to_task, {**TURNS, **TASKS}, keeps_columns=True)


# ------------------------------------------------------------------------------------------- the formats


def _format_of(columns: Mapping[str, Any], config: DataConfig, place: Place) -> Format:
    if config.format != "auto":
        asked = next((name for name in REQUIRED if name == config.format), None)
        assert asked is not None, "every format of a recipe is in the table"
        refuse_lacking(columns, asked, REQUIRED[asked], place)
        return asked
    # Columns that the user named say more than columns that happen to be there.
    named = detect(config.columns)
    found = named if named not in (None, "prompt") else detect(columns)
    if found is None:
        raise place.bad("columns of no known format", _hint(columns, place, answered=True))
    return found


def _refuse_judged(columns: Mapping[str, Any], config: DataConfig, place: Place) -> None:
    if config.format == "auto" and isinstance(columns.get("label"), bool):
        raise place["label"].bad(
            "answers labelled good or bad",
            "SFT would learn the bad, too; keep the good, or set data.format to "
            f"{_format_of(columns, config, place)}; or train on both with kind: preference and loss: kto",
        )


def _has_turns(columns: Mapping[str, Any], text: str, place: Place) -> bool:
    """Whether the text is a transcript. Raises `BadRow` where it may be a question, whose answer would be lost."""
    if answer := next((name for name in columns if name in ANSWER_COLUMNS and columns[name]), None):
        remedy = f"{_hint(columns, place, answered=True)}, or set data.format: text to train on the text alone"
        raise place["text"].bad(f"running text, beside {answer!r}, which may be its answer", remedy)
    return is_transcript(text)


def _hint(columns: Mapping[str, Any], place: Place, *, answered: bool) -> str:
    """The remedy for unknown columns: which is which, where a guess at that was tried on the row and can be read."""
    named = _guess(columns, answered=answered)
    tried = DataConfig(path="", columns=named)
    with suppress(BadRow):
        if named:
            read = conversation_of if answered else _asked
            read(rename(Row(origin=place.origin, values=columns), tried), tried, place)
            return f"there are: {', '.join(columns)}. Say which is which, for example {_written(named)}"
    return f"there are: {', '.join(columns)}. Say in data.columns which is which"


def _listed(columns: Mapping[str, Any], place: Place, *, name: str) -> tuple[Message, ...]:
    return parse_messages(columns[name], place[name])


def _prompt_completion(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    prompt = turns(columns, "prompt", "user", place)
    return as_context(prompt) + turns(columns, "completion", "assistant", place)


def _alpaca(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    answer = Message(role="assistant", content=text_of(columns, "output", place))
    return (*instruction(columns, place), answer)


def _best(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    answers, _ = in_order(columns, place)
    return as_context(turns(columns, "prompt", "user", place)) + answers[0]


def _transcript(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    text = text_of(columns, "text", place)
    if not is_transcript(text):
        raise place["completion"].bad("no such column", _hint(columns, place, answered=True))
    return transcript(text, place["text"])


def _chosen(
    columns: Mapping[str, Any], place: Place, *, form: Literal["pair", "openai_preference"]
) -> tuple[Message, ...]:
    prompt, answers, _ = compared(columns, form, place)
    return as_context(prompt) + answers[0]


_READERS: dict[Format, Callable[[Mapping[str, Any], Place], tuple[Message, ...]]] = {
    "pair": partial(_chosen, form="pair"),
    "openai_preference": partial(_chosen, form="openai_preference"),
    "text": _transcript,
    "messages": partial(_listed, name="messages"),
    "sharegpt": partial(_listed, name="conversations"),
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "ranked": _best,
}


# ------------------------------------------------------------------------------- guesses, for an error's remedy


PROMPT_COLUMNS = ("prompt", "question", "problem", "query", "instruction", "quiz", "problem_text", "text", "input")
"""Names of what is asked, the surest first."""
ANSWER_COLUMNS = (
    "completion", "solution", "canonical_solution", "target", "answer", "gold", "ground_truth", "gt", "output",
    "response", "reference_answer", "rationale", "long_answer", "code",
)  # fmt: skip
"""Names of an answer, that of the data set before one that a model may have given."""
BESIDE_COLUMNS = (
    "body",
    "context",
    "contexts",
    "passage",
    "premises",
    "story",
    "choices",
    "options",
    "instances",
    "code",
)
"""Names of what a question cannot do without."""


def _guess(columns: Mapping[str, Any], *, answered: bool) -> dict[str, str]:
    """`data.columns` for a row: its messages, or its prompt and, if `answered`, its completion. Empty: no guess."""
    if talks := next((name for name, value in columns.items() if _is_chat(value)), None):
        return {"messages": talks}
    by_name = {name.lower(): name for name, value in columns.items() if value not in (None, "", [])}
    prompt = next(
        (by_name[name] for name in PROMPT_COLUMNS if name in by_name and _is_prose(columns[by_name[name]])), None
    )
    answer = next((by_name[name] for name in ANSWER_COLUMNS if name in by_name and by_name[name] != prompt), None)
    beside = [by_name[name] for name in BESIDE_COLUMNS if name in by_name and by_name[name] not in (prompt, answer)]
    alone = answered or prompt in ("text", "input")  # which may be anything, unless an answer stands beside it
    if prompt is None or (alone and answer is None) or not all(isinstance(columns[name], str) for name in beside):
        return {}
    whole = "\n".join(f"{{{name}}}" for name in (*beside, prompt)) if beside else prompt
    named = {"prompt": whole, "completion": answer if answered else None}
    return {ours: theirs for ours, theirs in named.items() if theirs is not None and theirs != ours}


def _written(named: Mapping[str, str]) -> str:
    """`data.columns: {prompt: question, completion: answer}`, as it is written in a recipe."""
    entries = (f"{ours}: {theirs if theirs.isidentifier() else json.dumps(theirs)}" for ours, theirs in named.items())
    return f"data.columns: {{{', '.join(entries)}}}"


def _is_chat(value: Any) -> bool:
    keys = value[0].keys() if isinstance(value, list) and value and isinstance(value[0], dict) else ()
    return {"role", "content"} <= set(keys) or {"from", "value"} <= set(keys)


def _is_prose(value: Any) -> bool:
    """Whether it reads like something said: several words, or letters of a script without spaces."""
    if not isinstance(value, str):
        return False
    text = value.strip()
    return sum(map(str.isalpha, text)) >= 8 and (" " in text or not text.isascii())
