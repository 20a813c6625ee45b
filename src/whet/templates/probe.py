"""What a chat template does, seen by rendering conversations whose answer is a word that is found again."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Protocol

from whet.errors import DataError, ModelError
from whet.records import Message, ToolCall
from whet.templates.base import Chat
from whet.templates.dialects import DIALECTS, Dialect, Schemas, schemas_of
from whet.templates.messages import OWN_TEMPLATE, Calls, refuse_lost

PROBE = "Probe7261"
"""An answer that no template treats specially and that is found again in what it writes."""
QUESTION, ANSWER = Message(role="user", content="Hello"), Message(role="assistant", content=PROBE)

Span = tuple[int, int]
"""Characters of a text: from the first up to, not including, the second."""


class Render(Protocol):
    """Writes a conversation; returned are the text and its generation blocks."""

    def __call__(self, chat: Chat, *, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Raises `DataError`."""


@cache
def has_blocks(chat_template: str) -> bool:
    """Whether it marks answers with `{% generation %}`."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None


def find_turn_end(
    render: Render, special: re.Pattern[str], specials: Mapping[str, int], eos: Collection[int]
) -> tuple[str, bool]:
    """The special token after an assistant's answer, and whether it is the header of the turn that follows.

    A header ends an answer only where the model's generation config has it among the ends of text (GLM).
    """
    try:
        text, blocks = render(Chat([QUESTION, ANSWER]))
        opening, _ = render(Chat([QUESTION]), generation_prompt=True)
    except DataError as error:
        raise ModelError(f"{error}; {OWN_TEMPLATE}") from error
    if blocks and blocks[0][0] < len(opening):
        raise ModelError(
            "the chat template's generation block starts before its generation prompt ends, so headers would be "
            f"trained on; {OWN_TEMPLATE} with the block after the header"
        )
    _, found, tail = text.rpartition(PROBE)
    end = special.search(tail)
    if found and end is None:
        _, _, tail = render(Chat([QUESTION, ANSWER, QUESTION]))[0].rpartition(PROBE)
        end = special.match(tail.lstrip())
        if end is not None and specials[end[0]] in eos:
            return end[0], True
        end = None
    if not found or end is None:
        missing = "an assistant's answer" if not found else "a special token after an assistant's answer"
        raise ModelError(f"the chat template does not write {missing}, so no sampler could stop; {OWN_TEMPLATE}")
    return end[0], False


def find_uneven(render: Render) -> str:
    """What stands before an answer where it is the last one and not where it is an earlier one (Qwen3), or ""."""
    opening, _ = render(Chat([QUESTION]), generation_prompt=True)
    try:
        texts = [render(Chat(messages))[0] for messages in ([QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION])]
    except DataError:  # a template for one turn
        return ""
    last, earlier = (text.partition(PROBE)[0].removeprefix(opening) for text in texts)
    return "" if last == earlier else last


def find_forgotten(render: Render) -> tuple[str, ...]:
    """After whose turn the thinking of earlier answers is left out: "user", "tool", both or neither."""
    thought = Message(role="assistant", content=f"<think>\n{PROBE}\n</think>\n\nYes.")
    call = ToolCall(name="look", arguments={}, id="call12345")
    found = []
    result = Message(role="tool", content="Go on.", name="look", tool_call_id=call.id)
    for later, calls in ((QUESTION, ()), (result, (call,))):
        try:
            text, _ = render(Chat([QUESTION, replace(thought, tool_calls=calls), later]), generation_prompt=True)
        except DataError:  # a template without such turns
            continue
        found += [] if PROBE in text else [later.role]
    return tuple(found)


def find_dialect(
    render: Render,
    stop: re.Pattern[str] | None,
    read: Callable[[Dialect, str, Schemas], tuple[str, tuple[ToolCall, ...]]],
) -> Dialect | None:
    """The first dialect that reads back a call of the template's. Raises `DataError` where it writes no tools.

    `stop` ends turns (None: the next header does); where it does not end the one that calls, inline ones come first.
    """
    properties = {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {"type": "array"}}
    tool = {"name": PROBE, "description": PROBE, "parameters": {"type": "object", "properties": properties}}
    tools = [{"type": "function", "function": tool}]
    call = ToolCall(name=PROBE, arguments={"a": 'x "y"', "b": 2, "c": [True, {"d": None}]}, id="call12345")
    opening, _ = render(Chat([QUESTION], tools), generation_prompt=True)
    refuse_lost(opening, [QUESTION], tools)
    text, _ = render(Chat([QUESTION, replace(ANSWER, content="", tool_calls=(call,))], tools))
    written = text.removeprefix(opening)
    open_ended = stop is not None and stop.search(written) is None
    listed = sorted(DIALECTS.values(), key=lambda dialect: dialect.inline is not open_ended)
    found = (d for d in listed if read(d, written, schemas_of(tools))[1] == (replace(call, id=""),))
    return next(found, None)


def find_calls(write: Callable[[Calls, Sequence[Message]], str]) -> Calls:
    """The way of writing calls that comes out whole and as JSON; the usual one where none does."""
    call = ToolCall(name=PROBE, arguments={PROBE: True}, id="call12345")
    messages = (QUESTION, Message(role="assistant", content="", tool_calls=(call,)))
    for way in (Calls(), Calls(as_text=True), Calls(bare=True), Calls(as_text=True, bare=True)):
        try:
            text = write(way, messages)
        except DataError:  # joins text to an object, or to nothing
            continue
        if text.count(PROBE) == 2 and str(call.arguments) not in text:
            return way
    return Calls()
