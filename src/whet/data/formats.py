"""Rows to examples: the formats that people have, recognised by their columns.

| format            | columns                                        | becomes                                       |
|-------------------|------------------------------------------------|-----------------------------------------------|
| messages          | messages (tools, system)                       | the conversation                              |
| sharegpt          | conversations: [{from, value}] (tools, system) | the conversation                              |
| prompt_completion | prompt, completion: texts or messages          | two turns; nothing of the prompt is trained   |
| alpaca            | instruction, input, output (system, history)   | turns; replies of the history are not trained |
| ranked            | prompt, answers, and ranks or scores           | the prompt and its best answer                |
| text              | text                                           | running text                                  |
| prompt            | prompt: text or messages, and any others       | a task for RL; the other columns are kept     |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from whet.config import DataConfig
from whet.data.base import Answered, Conversation, Prompt, Row
from whet.data.columns import rename
from whet.data.faults import Dropped, Place, nearest
from whet.data.known import ANSWERS
from whet.data.messages import parse_messages, read_settings, read_tools, refuse_settings
from whet.data.ranked import in_order
from whet.data.sources import Reading, read_examples, reading
from whet.data.turns import as_context, instruction, text_of, turns, with_system
from whet.errors import DataError
from whet.records import Message

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "ranked", "text", "prompt"]

REQUIRED: Mapping[Format, tuple[str, ...]] = {
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
    return next((name for name, required in REQUIRED.items() if set(required) <= set(columns)), None)


def to_conversation(row: Row, config: DataConfig) -> Conversation:
    """A row as an SFT example. Raises `BadRow` naming file, line, field, fault and remedy."""
    columns = rename(row, config)
    place = Place(row.origin)
    _refuse_judged(columns, config, place)
    if _format_of(columns, config, place) == "text":
        return Conversation(origin=row.origin, text=text_of(columns, "text", place))
    messages = with_system(conversation_of(columns, config, place), columns, config, place)
    return Conversation(
        origin=row.origin,
        messages=messages,
        tools=read_tools(columns, place),
        settings=read_settings(columns, place),
    )


def conversation_of(columns: Mapping[str, Any], config: DataConfig, place: Place) -> tuple[Message, ...]:
    """The messages of a row in any format that has turns. Raises `BadRow`."""
    name = _format_of(columns, config, place)
    if name not in _READERS:
        raise place["completion"].bad("no such column", _hint(columns))
    return _READERS[name](columns, place)


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
    refuse_settings(columns, place)
    name = "messages" if config.format == "messages" or "prompt" not in columns else "prompt"
    if name not in columns:
        raise place["prompt"].bad("no such column", _hint(columns))
    messages = with_system(turns(columns, name, "user", place), columns, config, place)
    if messages[-1].role == "assistant":
        raise place[name].bad("ends with an assistant message", "a task ends with the message to answer")
    return Prompt(
        origin=row.origin,
        messages=messages,
        columns={column: value for column, value in columns.items() if column != name},
        conversational=not isinstance(columns[name], str),
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


def load_conversations(config: DataConfig) -> tuple[list[Conversation], Dropped]:
    """All SFT examples of a source, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return read_examples(config, to_conversation, ANSWERS)


def load_answered(config: DataConfig) -> tuple[list[Answered], Dropped]:
    """All prompts and answers of a source, up to `limit`, and what was left out. Raises `DataError` for none."""
    return read_examples(config, to_answered, ANSWERS)


def read_conversations(config: DataConfig) -> Reading[Conversation]:
    """The same, not read yet."""
    return reading(config, to_conversation, ANSWERS)


def load_prompts(config: DataConfig) -> tuple[list[Prompt], Dropped]:
    """All tasks of a source, up to `limit`, and what was left out. Raises `DataError` where none is left."""
    return read_examples(config, to_prompt, ANSWERS)


# ------------------------------------------------------------------------------------------- the formats


def _format_of(columns: Mapping[str, Any], config: DataConfig, place: Place) -> Format:
    if config.format != "auto":
        asked = next((name for name in REQUIRED if name == config.format), None)
        if asked is None:
            raise DataError(f"data.format: {config.format} compares answers; a stage of kind preference reads it")
        for column in REQUIRED[asked]:
            if column not in columns:
                raise place[column].bad(f"format {asked} needs this column", nearest(column, columns))
        return asked
    # Columns that the user named say more than columns that happen to be there.
    named = detect(config.columns)
    found = named if named not in (None, "prompt") else detect(columns)
    if found is None:
        raise place.bad("columns of no known format", _hint(columns))
    return found


def _refuse_judged(columns: Mapping[str, Any], config: DataConfig, place: Place) -> None:
    if config.format == "auto" and isinstance(columns.get("label"), bool):
        raise place["label"].bad(
            "answers labelled good or bad",
            "SFT would learn the bad, too; keep the good, or set data.format to "
            f"{_format_of(columns, config, place)}; or train on both with kind: preference and loss: kto",
        )


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
    prompt = turns(columns, "prompt", "user", place)
    return as_context(prompt) + turns(columns, "completion", "assistant", place)


def _alpaca(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    answer = Message(role="assistant", content=text_of(columns, "output", place))
    return (*instruction(columns, place), answer)


def _best(columns: Mapping[str, Any], place: Place) -> tuple[Message, ...]:
    answers, _ = in_order(columns, place)
    return as_context(turns(columns, "prompt", "user", place)) + answers[0]


_READERS: dict[Format, Callable[[Mapping[str, Any], Place], tuple[Message, ...]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "ranked": _best,
}
