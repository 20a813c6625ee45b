"""Where answers begin in conversations of one kind, learnt by rendering one such conversation of marked words.

A prompt for each answer shows where that answer begins, but to render them all is most of the work on long chats. Two
conversations of the same roles differ by their words alone, unless the template looks at words. So the outline (what it
writes around the words) is learnt once for a kind, and used where it gives the very text that was rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

from whet.errors import DataError
from whet.records import Message
from whet.templates.base import Chat
from whet.templates.probe import PROBE, Render

MOST_KINDS = 4096
"""Kinds that are kept: chats of any length have few, since roles alternate."""
ROLES = frozenset({"system", "developer", "user", "assistant"})

Starts = Mapping[int, int]
"""Where answers begin, in characters of the text, by the place of their message."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What a template writes around the words of each message."""

    around: tuple[str, ...]
    """Before the first one, between two, after the last one."""
    opened: Mapping[int, int]
    """By the place of an assistant message, how much of what is written before its words a prompt for it has."""

    def starts(self, text: str, messages: Sequence[Message]) -> Starts:
        """Where answers begin in this text; empty where it is not this outline, filled in."""
        words = [message.content for message in messages]
        if text != "".join(chain.from_iterable(zip(self.around, [*words, ""], strict=True))):
            return {}
        ends = [0, *accumulate(len(a) + len(b) for a, b in zip(self.around, words, strict=False))]
        return {place: ends[place] + opened for place, opened in self.opened.items()}


class Outlines:
    """The outlines of one template."""

    def __init__(self, render: Render, source: str) -> None:
        """`source`: the template's own text."""
        self._render = render
        self._known: dict[tuple[str, ...], Outline | None] = {}
        quoted = {a or b for a, b in re.findall(r"'([^'\n]*)'|\"([^\"\n]*)\"", source)}
        looked_for = sorted(each for each in quoted if len(each) > 1 and re.search(r"[<>\[\]{}|]", each))
        self._looked_for = re.compile("|".join(map(re.escape, looked_for)) or r"(?!)")

    def starts(self, text: str, chat: Chat) -> Starts:
        """Where a prompt for each answer ends, if that is sure without rendering it; `text` is the conversation's."""
        settings, messages = chat.settings, chat.messages
        if chat.tools or not all(self._is_plain(message) for message in messages):
            return {}
        key = (json.dumps(dict(settings), sort_keys=True, default=str) if settings else "", *(m.role for m in messages))
        if key not in self._known:
            if len(self._known) == MOST_KINDS:
                return {}
            self._known[key] = self._learnt(chat)
        outline = self._known[key]
        return outline.starts(text, messages) if outline else {}

    def _is_plain(self, message: Message) -> bool:
        """Whether the message has words alone, and none of the markup that the template looks for in them."""
        beside = message.thinking is not None or message.tool_calls or message.tool_call_id is not None or message.name
        return message.role in ROLES and not beside and self._looked_for.search(message.content) is None

    def _learnt(self, chat: Chat) -> Outline | None:
        messages = chat.messages
        words = [f"{PROBE}{place}x" for place in range(len(messages))]
        marked = [replace(message, content=word) for message, word in zip(messages, words, strict=True)]
        try:
            text, _ = self._render(replace(chat, messages=marked))
            around = re.split("|".join(words), text)
            if text != "".join(chain.from_iterable(zip(around, [*words, ""], strict=False))):
                return None
            opened: dict[int, int] = {}
            for place in (place for place, message in enumerate(messages) if message.role == "assistant"):
                opening, _ = self._render(replace(chat, messages=marked[:place]), generation_prompt=True)
                before = len("".join(chain.from_iterable(zip(around[:place], words, strict=False))))
                opened[place] = len(opening) - before
                if not text.startswith(opening) or not 0 <= opened[place] <= len(around[place]):
                    return None
        except DataError:
            return None
        return Outline(tuple(around), opened) if len(around) == len(words) + 1 else None
