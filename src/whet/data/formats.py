"""Rows to examples: the formats that people have, recognised by their columns.

| format            | columns                                        | becomes                                       |
|-------------------|------------------------------------------------|-----------------------------------------------|
| messages          | messages (tools, system)                       | the conversation                              |
| sharegpt          | conversations: [{from, value}] (tools, system) | the conversation                              |
| prompt_completion | prompt, completion: texts or messages          | two turns; nothing of the prompt is trained   |
| alpaca            | instruction, input, output (system, history)   | turns; replies of the history are not trained |
| text              | text                                           | running text                                  |
| prompt            | prompt: text or messages, and any others       | a task for RL; the other columns are kept     |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

from whet.config import DataConfig
from whet.data.base import Conversation, Prompt, Row
from whet.data.columns import rename
from whet.data.faults import BadRow, Dropped, Place, Rejects, kind_of, nearest
from whet.data.messages import parse_messages, parse_tools
from whet.data.sources import read_rows
from whet.errors import DataError
from whet.records import Message

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "text", "prompt"]

Example = TypeVar("Example", Conversation, Prompt)

REQUIRED: Mapping[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "prompt": ("prompt",),
}
"""The columns that a format cannot do without, in the order in which formats are tried."""


def detect(columns: Collection[str]) -> Format | None:
    """The first format whose required columns are all there; None: no format that we know."""
    return next((name for name, required in REQUIRED.items() if set(required) <= set(columns)), None)


def to_conversation(row: Row, config: DataConfig) -> Conversation:
    """A row as an SFT example. Raises `BadRow` naming file, line, field, fault and remedy."""
    columns = rename(row, config)
    place = Place(row.origin)
    name = _format_of(columns, config, place)
    if name == "text":
        return Conversation(origin=row.origin, text=_text(columns, "text", place))
    if name == "prompt":
        raise place["completion"].bad("no such column", _hint(columns))
    messages = _with_system(_READERS[name](columns, place), columns, config, place)
    tools = parse_tools(columns.get("tools"), place["tools"])
    return Conversation(origin=row.origin, messages=messages, tools=tools)


def to_prompt(row: Row, config: DataConfig) -> Prompt:
    """A row as a task: the messages to answer, from `prompt` or else `messages`, and all other columns.

    Columns keep their own names and have ours beside them where `data.columns` renames. Raises `BadRow`.
    """
    columns = rename(row, config)
    place = Place(row.origin)
    if config.format not in ("auto", "prompt", "prompt_completion", "messages"):
        raise DataError(
            f"data.format: {config.format} has no prompts to answer; leave it out and map data.columns.prompt"
        )
    name = "messages" if config.format == "messages" or "prompt" not in columns else "prompt"
    if name not in columns:
        raise place["prompt"].bad("no such column", _hint(columns))
    messages = _with_system(_turns(columns, name, "user", place), columns, config, place)
    if messages[-1].role == "assistant":
        raise place[name].bad("ends with an assistant message", "a task ends with the message to answer")
    return Prompt(
        origin=row.origin,
        messages=messages,
        columns={column: value for column, value in columns.items() if column != name},
        conversational=not isinstance(columns[name], str),
    )


def load_conversations(config: DataConfig) -> tuple[list[Conversation], Dropped]:
    """All SFT examples of a source, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return _load(config, to_conversation)


def load_prompts(config: DataConfig) -> tuple[list[Prompt], Dropped]:
    """All tasks of a source, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return _load(config, to_prompt)


def _load(config: DataConfig, convert: Callable[[Row, DataConfig], Example]) -> tuple[list[Example], Dropped]:
    rejects = Rejects(config.on_bad_row)
    examples: list[Example] = []
    for row in read_rows(config, rejects.add):
        try:
            examples.append(convert(row, config))
        except BadRow as bad:
            rejects.add(bad)
        if len(examples) == config.limit:
            break
    if not examples:
        dropped = rejects.dropped
        why = f"not one row is usable; {dropped.describe()}" if dropped.total else "it has no rows"
        raise DataError(f"{config.path}: {why}")
    return examples, rejects.dropped


# ------------------------------------------------------------------------------------------- the formats


def _format_of(columns: Mapping[str, Any], config: DataConfig, place: Place) -> Format:
    if config.format != "auto":
        for column in REQUIRED[config.format]:
            if column not in columns:
                raise place[column].bad(f"format {config.format} needs this column", nearest(column, columns))
        return config.format
    # Columns that the user named say more than columns that happen to be there.
    named = detect(config.columns)
    found = named if named not in (None, "prompt") else detect(columns)
    if found is None:
        raise place.bad("columns of no known format", _hint(columns))
    if isinstance(columns.get("label"), bool):
        raise place["label"].bad(
            "answers labelled good or bad",
            f"SFT would learn the bad, too; keep the good, or set data.format: {found}",
        )
    return found


def _hint(columns: Mapping[str, Any]) -> str:
    """The remedy for unknown columns, spelled with the user's own."""
    names = list(columns)
    texts = [name for name in names if isinstance(columns[name], str) and name != "prompt"]
    example = f"prompt: {texts[0]}" if texts else "prompt: YOUR_COLUMN"
    if len(texts) > 1:
        example += f", completion: {texts[1]}"
    return f"there are: {', '.join(names)}. Say which is which, for example data.columns: {{{example}}}"


def _messages(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    return parse_messages(columns["messages"], place["messages"])


def _sharegpt(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    return parse_messages(columns["conversations"], place["conversations"])


def _prompt_completion(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    prompt = _turns(columns, "prompt", "user", place)
    return _as_context(prompt) + _turns(columns, "completion", "assistant", place)


def _alpaca(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    messages: list[Message] = []
    history = columns.get("history") or []
    for index, pair in enumerate(history):
        at = place["history"][index]
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise at.bad("not a pair", f"it is {kind_of(pair)}; the history is a list of [instruction, answer]")
        messages.append(Message(role="user", content=_filled(pair[0], at[0])))
        messages.append(Message(role="assistant", content=_filled(pair[1], at[1])))
    instruction = _text(columns, "instruction", place)
    addition = columns.get("input")
    if addition:
        instruction += "\n" + _filled(addition, place["input"])
    answer = Message(role="assistant", content=_text(columns, "output", place))
    return (*_as_context(messages), Message(role="user", content=instruction), answer)


_READERS: dict[Format, Callable[[Mapping[str, Any], Place], tuple[Message, ...]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
}


def _turns(
    columns: Mapping[str, Any], name: str, role: Literal["user", "assistant"], place: Place
) -> tuple[Message, ...]:
    """A column that holds messages, or one message's text."""
    if isinstance(columns[name], list):
        return parse_messages(columns[name], place[name])
    return (Message(role=role, content=_text(columns, name, place)),)


def _as_context(messages: Collection[Message]) -> tuple[Message, ...]:
    """The same messages, none of them trained unless it says so itself."""
    return tuple(
        replace(message, trained=False) if message.role == "assistant" and message.trained is None else message
        for message in messages
    )


def _with_system(
    messages: tuple[Message, ...], columns: Mapping[str, Any], config: DataConfig, place: Place
) -> tuple[Message, ...]:
    """A system message in front, where there is none: the row's own `system` column, or else `data.system`."""
    if messages[0].role in ("system", "developer"):
        return messages
    text = _filled(columns["system"], place["system"]) if columns.get("system") else config.system
    return (Message(role="system", content=text), *messages) if text else messages


def _text(columns: Mapping[str, Any], name: str, place: Place) -> str:
    return _filled(columns[name], place[name])


def _filled(value: Any, place: Place) -> str:
    if not isinstance(value, str):
        raise place.bad("not text", f"it is {kind_of(value)}")
    if not value.strip():
        raise place.bad("empty text", "fill it in or leave the row out")
    return value
