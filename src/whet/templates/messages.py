"""Around a chat template: messages as it takes them, what must be in its text, and that text as tokens."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from whet.errors import DataError, ModelError
from whet.records import Message
from whet.templates.base import Encoded, LossOn, Script, TooLong, Tools
from whet.templates.words import Words, words_of

OWN_TEMPLATE = "give model.chat_template a Jinja file"

WITH_TOOLS = (
    "give model.chat_template (whet chat: --chat-template) a Jinja file that writes tools and calls, or one of ours: "
    "whet:hermes, whet:tags, whet:inline"
)

OURS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")
"""Variables of a template that settings may not have."""


def marked_messages(messages: Sequence[Message], loss_on: LossOn) -> dict[int, bool]:
    """The messages that are trained where their surroundings are not, or the other way round."""
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    by_rule = {"assistant": turns, "completion": turns[-1:], "all": range(len(messages))}[loss_on]
    marked: dict[int, bool] = {}
    for index, message in enumerate(messages):
        trained = index in by_rule if message.trained is None else message.trained
        if trained == (loss_on == "all"):
            continue
        if message.role != "assistant":
            raise DataError(
                f"messages[{index}]: a {message.role} message is marked as {'' if trained else 'not '}trained, but "
                f"under loss_on: {loss_on} only assistant messages can be told apart; remove the mark"
            )
        marked[index] = trained
    return marked


def refuse_lost(text: str, messages: Sequence[Message], tools: Tools) -> None:
    """What a template silently leaves out, the model would be trained to guess."""
    for index, message in enumerate(messages):
        if message.role in ("system", "developer", "user") and message.content.strip() not in text:
            raise DataError(f"messages[{index}]: the chat template leaves out {message.role} messages; {OWN_TEMPLATE}")
    if any(tool["function"]["name"] not in text for tool in tools):
        raise DataError(f"tools: the chat template leaves them out; {WITH_TOOLS}")


def no_span(index: int, why: str) -> DataError:
    """That the answer of a message cannot be found in what the template writes."""
    return DataError(
        f"messages[{index}]: the chat template {why}, so training would not see what a sampler writes; "
        f"{OWN_TEMPLATE} that keeps answers as they are, or train on the last turn only (loss_on: completion)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """How a template expects tool calls."""

    as_text: bool = False
    """Arguments as JSON text, which it prints; else as an object."""
    bare: bool = False
    """No content beside them (null); else an empty text."""


def as_dict(message: Message, calls: Calls) -> dict[str, Any]:
    """The message as chat templates expect it; absent things have no key."""
    bare = calls.bare and message.tool_calls and not message.content
    fields: dict[str, Any] = {"role": message.role, "content": None if bare else message.content}
    if message.thinking is not None:
        fields["reasoning_content"] = message.thinking
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)
                    if calls.as_text
                    else dict(call.arguments),
                },
            }
            for call in message.tool_calls
        ]
    beside = {"tool_call_id": message.tool_call_id, "name": message.name}
    return fields | {key: value for key, value in beside.items() if value is not None}


def missing(message: Message, span: str) -> str:
    """What a span that would be trained lacks of the message; empty: nothing."""
    parts = {"content": message.content, "thinking": message.thinking or ""}
    parts["tool calls"] = next((call.name for call in message.tool_calls if call.name not in span), "")
    for what, part in parts.items():
        if part.strip() not in span:
            return f"leaves out (some of) its {what}"
    for call in message.tool_calls:
        if call.arguments and str(dict(call.arguments)) in span:
            return f"writes the arguments of {call.name} as Python"
        lost = next((leaf for leaf in leaves(call.arguments) if not any(form in span for form in leaf)), None)
        if lost:
            return f"leaves out {lost[0]!r} of the arguments of {call.name}"
    return ""


def refuse_specials(messages: Sequence[Message], special: re.Pattern[str]) -> None:
    """Text that spells a special token would become that token: a forged turn, or an end where none is."""
    for index, message in enumerate(messages):
        called = "".join(str(dict(call.arguments)) for call in message.tool_calls)
        found = special.search(message.content + "\n" + (message.thinking or "") + "\n" + called)
        if found:
            raise DataError(
                f"messages[{index}]: the text contains the special token {found[0]!r}; remove it, "
                "or the model would read it as a command"
            )


CUT = "\U0010fffd"
"""Where a text is cut before it is tokenized; a private character, which no text needs."""


def with_cuts(messages: Sequence[Message], markup: re.Pattern[str]) -> list[Message]:
    """The messages with a cut in whatever spells a token of the markup: tokenized in pieces, it cannot become one."""
    return [replace(message, content=_with_cuts(message.content.replace(CUT, ""), markup)) for message in messages]


def _with_cuts(text: str, markup: re.Pattern[str]) -> str:
    parts, at, start = [], 0, 0
    while (found := markup.search(text, start)) is not None:
        start = found.start() + 1  # what is left of it may begin another
        parts.append(text[at:start])
        at = start
    return CUT.join([*parts, text[at:]])


def leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """Every key and every value without parts, each in the forms in which templates write it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(str(key))
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str):
        yield (value.strip(), json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1])
    else:
        yield (json.dumps(value), str(value))


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of these texts, the longest that fits."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


# --------------------------------------------------------------------------------------- tokens


SLICE = 2**16
"""Characters that are tokenized at once of a text that may be far too long."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer and the tokens at which texts end. `all` runs on all cores, without the interpreter's lock."""

    tokenizer: Any
    stop_ids: frozenset[int]
    turn_end: int
    """Ends running text where the tokenizer has no end of text."""
    words: Words | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", words_of(self.tokenizer))

    def one(self, text: str) -> list[int]:
        """A text by itself, with nothing put around it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        return ids

    def in_pieces(self, text: str) -> list[int]:
        """A text that is tokenized piece by piece where it is cut."""
        return [token for piece in text.split(CUT) for token in self.one(piece)]

    def shorten(self, text: str, most: int) -> str:
        """The text, its middle left out where it has more tokens than that."""
        tokens = self.one(text)
        if len(tokens) <= most:
            return text
        head, tail = (self.decode(part).strip("\ufffd") for part in (tokens[: most // 2], tokens[-(most // 2) :]))
        return f"{head}\n[... {len(tokens) - 2 * (most // 2):,} tokens left out]\n{tail}"

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special tokens included."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def refuse_changed_pieces(self, *pieces: str) -> None:
        """Raise `ModelError` where pieces tokenized by themselves join to another text."""
        if self.decode([token for piece in pieces for token in self.one(piece)]) != "".join(pieces):
            raise ModelError(
                "the tokenizer changes spaces when a text is tokenized in pieces (an old SentencePiece tokenizer?); "
                "whet needs one that does not: sampled tokens and rendered ones could not be joined"
            )

    def all(self, scripts: Sequence[Script], *, most: int | None) -> list[Encoded | DataError]:
        """Scripts in one call of the tokenizer for all of their pieces; see `Template.encode`."""
        found: dict[int, Encoded | DataError] = {}
        if most is not None:
            found = {number: TooLong() for number, script in enumerate(scripts) if self._exceeds(script, most)}
        for running in (False, True):
            chosen = [n for n, script in enumerate(scripts) if script.running is running and n not in found]
            ids = iter(self._texts([text for n in chosen for text, _ in scripts[n].pieces], special=running))
            for number in chosen:
                parts = [(next(ids), flag) for _, flag in scripts[number].pieces]
                found[number] = self._joined(parts, running=running)
        return [found[number] for number in range(len(scripts))]

    def refuse_two_bos(self, tokens: Sequence[int]) -> None:
        """Raise `DataError` where data or template begin a text that the tokenizer begins, too."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(tokens[:2]) == [bos, bos]:
            raise DataError(
                f"the text starts with two {self.tokenizer.bos_token!r}; remove one from the data or the chat template"
            )

    def _texts(self, texts: Sequence[str], *, special: bool) -> list[bytes]:
        """Texts as `one` has them, 4 bytes a token; `special`: with what the tokenizer puts around a text by itself."""
        if not texts:
            return []
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # one that is written in Python
            found = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
            return [array("i", ids).tobytes() for ids in found]
        backend.no_truncation()
        backend.no_padding()
        if self.words is not None:
            return self.words.tokens(texts, special=special)
        found = backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [array("i", encoding.ids).tobytes() for encoding in found]

    def _exceeds(self, script: Script, most: int) -> bool:
        """Whether a long text has more than `most` tokens for certain, without tokenizing all of it.

        Where a text is cut, its tokens may be others, but never twice as many: slices have thousands of them.
        """
        size = max(SLICE, 4 * most)
        if sum(len(piece) for piece, _ in script.pieces) <= 2 * size:
            return False
        text, count = "".join(piece for piece, _ in script.pieces), 0
        for at in range(0, len(text), size):
            count += len(self.one(text[at : at + size]))
            if count > 2 * most:
                return True
        return False

    def _joined(self, parts: Sequence[tuple[bytes, bool]], *, running: bool) -> Encoded | DataError:
        tokens = np.frombuffer(b"".join(ids for ids, _ in parts), np.int32)
        if running and (not len(tokens) or int(tokens[-1]) not in self.stop_ids):
            eos = self.tokenizer.eos_token_id
            tokens = np.append(tokens, np.int32(self.turn_end if eos is None else eos))
        try:
            self.refuse_two_bos(tokens[:2].tolist())
        except DataError as error:
            return error
        trained = np.repeat([flag for _, flag in parts], [len(ids) // 4 for ids, _ in parts])
        if running:
            trained = np.ones(len(tokens), np.bool_)
        trained[:1] = False
        return Encoded(tokens=tokens, trained=trained)
