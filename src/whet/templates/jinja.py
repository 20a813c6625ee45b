"""A tokenizer's own chat template, with the mask that training needs.

Text is rendered by transformers' sandboxed Jinja and cut where trained spans begin and end; every piece is tokenized
by itself. So a training row starts with exactly the tokens that a sampler would have been shown, and no merge of the
tokenizer crosses the border between prompt and answer.

A trained span is what the model would have written: from the end of the generation prompt to the stop token, both
found in the rendered text and checked against the message, before the next turn begins. Where a template leaves
something of an answer out (Qwen3 drops the thinking of earlier turns) or ends earlier answers otherwise (OLMo,
gpt-oss), there is no such span, and that is an error. Where the next turn's header (GLM) or an inline call's closing
tag ends an answer, it ends it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import groupby, takewhile
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from whet.errors import DataError, ModelError
from whet.records import Ending, Message, ToolCall
from whet.templates.base import NO_SETTINGS, Chat, Encoded, LossOn, Rendered, Script, Settings, Template, Tools
from whet.templates.dialects import Dialect, Schemas, schemas_of
from whet.templates.messages import (
    OURS,
    OWN_TEMPLATE,
    WITH_TOOLS,
    Calls,
    Encoder,
    any_of,
    as_dict,
    marked_messages,
    missing,
    no_span,
    refuse_lost,
    refuse_specials,
    with_cuts,
)
from whet.templates.outlines import Outlines, Starts
from whet.templates.probe import (
    PROBE,
    Span,
    find_calls,
    find_dialect,
    find_forgotten,
    find_turn_end,
    find_uneven,
    has_blocks,
)  # fmt: skip

_log = logging.getLogger(__name__)


class JinjaTemplate(Template):
    """The template of a transformers tokenizer, or another one given as text.

    `eos_ids`: what the model's generation config calls ends of text; they are stop tokens as well.
    Raises `ModelError` where there is no template, or one that cannot end an assistant's turn.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None, eos_ids: Collection[int] = ()
    ) -> None:
        if chat_template is None and not tokenizer.chat_template:
            raise ModelError(
                f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template (a base model?); {OWN_TEMPLATE}"
            )
        self._tokenizer = tokenizer
        self._own = chat_template
        added = tokenizer.added_tokens_decoder
        self._added = {token.content: index for index, token in added.items()}
        self._specials = {token.content: index for index, token in added.items() if token.special}
        self._special = any_of(self._specials)
        self._markup = any_of(text for text in self._added if re.search(r"[^\w\s]", text))
        self._said: set[str] = set()
        self._calls = Calls()
        self._outlines = Outlines(self._render, str(chat_template or tokenizer.chat_template))
        self._closed: dict[str, bool] = {}  # whether a kind of turn ends with a stop token
        eos = frozenset({tokenizer.eos_token_id, *eos_ids} - {None})
        self._turn_end, self._headed = find_turn_end(self._render, self._special, self._specials, eos)
        self._stop_ids = eos | {self._specials[self._turn_end]}
        # A span may end with any of them: some templates close the last turn with the end of text.
        self._ends = [text for text, index in self._specials.items() if index in self._stop_ids]
        self._stop = any_of(self._ends)
        self._encoder = Encoder(tokenizer, self._stop_ids, self._specials[self._turn_end])
        self._calls = find_calls(self._write)
        self._uneven = find_uneven(self._render)
        self._encoder.refuse_changed_pieces(f"Hello{self._turn_end}\nassistant", "\nyes", " no", PROBE)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer, the chat template and the stop tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        words = self._tokenizer.get_vocab() if backend is None else backend.to_str()
        known = (words, self._own or self._tokenizer.chat_template, self._tokenizer.special_tokens_map)
        return hashlib.sha256(repr((*known, sorted(self._stop_ids))).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token that the template writes after an assistant's turn, and the ends of text."""
        return self._stop_ids

    @property
    def turn_end(self) -> int:
        """The token that the template writes after an assistant's turn."""
        return self._encoder.turn_end

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        *,
        settings: Settings = NO_SETTINGS,
        untrusted: bool = False,
    ) -> tuple[int, ...]:
        """The conversation so far and the opening of an assistant turn. Raises `DataError`."""
        if untrusted:
            messages = with_cuts(messages, self._special)
        refuse_specials(messages, self._special)
        text, _ = self._render(Chat(messages, tools, settings), generation_prompt=True)
        refuse_lost(text, messages, tools)
        tokens = self._encoder.in_pieces(text)
        self._encoder.refuse_two_bos(tokens)
        return tuple(tokens)

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        *,
        loss_on: LossOn = "assistant",
        settings: Settings = NO_SETTINGS,
    ) -> Rendered:
        """A finished conversation with its mask; see `Template`. Raises `DataError`."""
        return self._rendered(self.script(messages, tools, loss_on=loss_on, settings=settings))

    def script(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        *,
        loss_on: LossOn = "assistant",
        settings: Settings = NO_SETTINGS,
    ) -> Script:
        """The conversation's text, cut where trained spans begin and end. Raises `DataError`."""
        refuse_specials(messages, self._special)
        chat = Chat(messages, tools, settings)
        text, blocks = self._render(chat)
        refuse_lost(text, messages, tools)
        starts = {} if blocks else self._outlines.starts(text, chat)
        if self._headed and messages[-1].role == "assistant":
            text += self._next_header(text, chat)
        marked = marked_messages(messages, loss_on)
        elsewhere = loss_on == "all"
        pieces: list[tuple[str, bool]] = []
        at = 0
        for index, (start, end) in self._spans(text, blocks, starts, chat, list(marked)):
            if start < at:
                raise no_span(index, "begins it before the turn before it ends")
            pieces += [(text[at:start], elsewhere), (text[start:end], marked[index])]
            at = end
        pieces.append((text[at:], elsewhere))
        return Script(tuple(pieces))

    def text(self, text: str) -> Rendered:
        """Running text: what the tokenizer puts in front, the text, a stop token. Raises `DataError` if it is empty."""
        return self._rendered(self.running(text))

    def running(self, text: str) -> Script:
        """The text as it is. Raises `DataError` if it is empty."""
        if not text.strip():
            raise DataError("the text is empty; leave the row out")
        return Script(((text, True),), running=True)

    def encode(self, scripts: Sequence[Script], *, most: int | None = None) -> list[Encoded | DataError]:
        """Scripts as tokens, in one call of the tokenizer for all of their pieces; see `Template`."""
        return self._encoder.all(scripts, most=most)

    def extend(
        self, tokens: Sequence[int], messages: Sequence[Message], *, settings: Settings = NO_SETTINGS
    ) -> tuple[int, ...]:
        """`tokens` unchanged, then what the template writes from the end of that turn to the next one's opening.

        Raises `DataError` where `tokens` do not end with a stop token: a turn that was cut off has no next one.
        """
        inside = not tokens or tokens[-1] not in self._stop_ids
        if inside and not (self._inline and messages and messages[0].role == "tool"):
            raise DataError("the turn to be continued does not end with a stop token; it was cut off by its budget")
        messages = with_cuts(messages, self._markup)
        chat = Chat(messages, settings=settings)
        # The text between two turns does not depend on what was said before, so a stand-in conversation shows it.
        calls = tuple(
            ToolCall(name=m.name or PROBE, arguments={"of": PROBE}, id=m.tool_call_id or "")
            for m in messages
            if m.role == "tool" and inside is self._inline  # an inline result behind an ended answer opens another
        )
        try:
            between = self._between(calls, chat)
        except DataError:  # a template of one call in a turn
            between = self._between(calls[:1], chat)
        return (*tokens, *self._encoder.in_pieces(between))

    def parse(self, completion: Sequence[int], ending: Ending, tools: Tools = ()) -> Message:
        """The text as it was written, thinking included, without the stop token; with `tools` their calls apart."""
        written = completion[:-1] if ending is Ending.STOP else completion
        if not tools or ending is Ending.LENGTH or (ending is Ending.STOP_STRING and not self._inline):
            return Message(role="assistant", content=self.decode(written))
        content, calls = self._read(self.dialect, completion, schemas_of(tools))
        sound = all(call.status == "ok" for call in calls)
        return Message(
            role="assistant", content=content, tool_calls=calls, written="" if sound else self.decode(written)
        )

    @cached_property
    def dialect(self) -> Dialect:
        """The first of the dialects that reads back a call which this template wrote. Raises `DataError`."""
        stop = None if self._headed else self._stop
        found = find_dialect(self._render, stop, lambda each, text, of: self._read(each, self._encoder.one(text), of))
        if found is None:
            raise DataError(f"tools: no dialect reads the calls that the chat template writes; {WITH_TOOLS}")
        return found

    def stops(self, tools: Tools) -> tuple[str, ...]:
        """The closing tags of these tools where results stand inside answers. Raises `DataError` as `dialect` does."""
        return self.dialect.stops(schemas_of(tools)) if tools else ()

    @cached_property
    def _inline(self) -> bool:
        with suppress(DataError):  # a template without tools
            return self.dialect.inline
        return False

    @cached_property
    def forgets(self) -> tuple[str, ...]:
        """After whose turns the thinking of earlier answers is left out."""
        return find_forgotten(self._render)

    def shorten(self, text: str, most: int) -> str:
        """The text, its middle left out where it has more tokens than that."""
        return self._encoder.shorten(text, most)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special tokens included."""
        return self._encoder.decode(tokens)

    def _read(self, dialect: Dialect, tokens: Sequence[int], tools: Schemas) -> tuple[str, tuple[ToolCall, ...]]:
        """Content and calls of a turn, up to its stop token, which may close a call."""
        markers = {self._added[text]: n for n, text in enumerate(dialect.markers) if text in self._added}
        turn = list(takewhile(lambda token: token in markers or token not in self._stop_ids, tokens))
        runs = groupby(turn, key=lambda token: token if token in markers else -1)
        pieces = [self.decode(list(run)) if key < 0 else markers[key] for key, run in runs]
        return dialect.parse(pieces, tools, markers.values())

    def _reads_back(self, calls: Sequence[ToolCall], span: str, tools: Tools) -> bool:
        """Whether the span says all of these calls, though it may not spell the names of their arguments."""
        found = self._read(self.dialect, self._encoder.one(span), schemas_of(tools))[1] if calls and tools else ()
        return bool(found) and found == tuple(replace(call, id="") for call in calls)

    def _between(self, calls: tuple[ToolCall, ...], chat: Chat) -> str:
        before = (Message(role="user", content=PROBE), Message(role="assistant", content=PROBE, tool_calls=calls))
        stop = self._ending(replace(chat, messages=before))
        shown, _ = self._render(replace(chat, messages=before))
        place = len(stop.findall(shown, 0, shown.rfind(PROBE)))  # of the answer's stop token among all
        text, _ = self._render(replace(chat, messages=[*before, *chat.messages]), generation_prompt=True)
        ends = [match.end() for match in stop.finditer(text)]
        between = text[ends[place] :] if place < len(ends) else PROBE
        if PROBE in between:
            raise DataError(f"the chat template ends this kind of turn without a stop token; {OWN_TEMPLATE}")
        return between

    def _ending(self, chat: Chat) -> re.Pattern[str]:
        """What ends an answer of the conversation: a stop token, and where calls are inline the tag that closes one."""
        names = {*schemas_of(chat.tools), *(call.name for message in chat.messages for call in message.tool_calls)}
        return any_of([*self._ends, *self.dialect.stops(names)]) if names and self._inline else self._stop

    # ------------------------------------------------------------------------------------------- spans

    def _spans(
        self, text: str, blocks: Sequence[Span], starts: Starts, chat: Chat, wanted: Sequence[int]
    ) -> Iterator[tuple[int, Span]]:
        """The checked spans of the wanted messages, in order."""
        messages = chat.messages
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if blocks and len(blocks) != len(turns):
            raise DataError(
                f"the chat template has {len(blocks)} generation blocks for {len(turns)} assistant messages, so the "
                f"mask is unclear; {OWN_TEMPLATE} with one block for each"
            )
        if blocks:
            starts = {turn: start for turn, (start, _) in zip(turns, blocks, strict=True)}
        ending = self._ending(chat)
        for index in wanted:
            start = starts.get(index, -1)
            if start < 0:
                opening, _ = self._render(replace(chat, messages=messages[:index]), generation_prompt=True)
                if not text.startswith(opening):
                    raise no_span(index, "writes the turns before it differently than in the prompt for it")
                start = len(opening)
            # Messages cannot spell a stop token, so the first one ends the turn. Where a block ends is not asked:
            # some templates close it before the stop token, others after the newline behind it.
            stop = ending.search(text, start)
            if stop is None or not self._closes(text[:start], chat, index, ending):
                raise no_span(index, "writes no stop token between it and the next turn")
            span = text[start : stop.end()]
            lost = missing(messages[index], span)
            if lost and not self._reads_back(messages[index].tool_calls, span, chat.tools):
                raise no_span(index, lost)
            self._tell_uneven(index, messages)
            yield index, (start, stop.end())

    def _closes(self, before: str, chat: Chat, index: int, ending: re.Pattern[str]) -> bool:
        """Whether a stop token stands before the next message, which is found by giving it another text.

        Rendered once for a kind of turn: what ends it depends on its parts and on the next role, not on its words.
        """
        turn, following = chat.messages[index], chat.messages[index + 1 :]
        if not following:
            return True
        has = (bool(turn.content.strip()), turn.thinking is None, bool(turn.tool_calls), following[0].role)
        kind = f"{has} {json.dumps(dict(chat.settings), sort_keys=True, default=str)}"
        if kind not in self._closed:
            marker = replace(following[0], content=PROBE, thinking=None, tool_calls=())
            text, _ = self._render(replace(chat, messages=[*chat.messages[: index + 1], marker]))
            next_turn = text.rfind(PROBE)
            known = next_turn >= 0 and text.startswith(before)
            self._closed[kind] = known and ending.search(text, len(before), next_turn) is not None
        return self._closed[kind]

    def _next_header(self, text: str, chat: Chat) -> str:
        """The header that would follow the conversation: a tool's after a call, else a user's."""
        calls = chat.messages[-1].tool_calls
        marker = Message(role="tool" if calls else "user", content=PROBE, tool_call_id=calls[0].id if calls else None)
        longer, _ = self._render(replace(chat, messages=[*chat.messages, marker]))
        header = self._stop.search(longer, len(text))
        if header is None or not longer.startswith(text):
            raise no_span(len(chat.messages) - 1, "writes it differently where another turn follows")
        return longer[len(text) : header.end()]

    def _tell_uneven(self, index: int, messages: Sequence[Message]) -> None:
        """Once: what a last answer is trained with and this one is trained without."""
        if self._uneven and index + 1 < len(messages):
            self._tell(
                f"the chat template writes {self._uneven!r} into the last answer of a conversation only, so rows of "
                "several answers train both ways of answering; loss_on: completion trains the last one"
            )

    def _tell(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _log.warning("%s", what)

    def _render(self, chat: Chat, *, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the characters inside `{% generation %}` blocks where the template has them."""
        chat_template = self._tokenizer.get_chat_template(self._own, list(chat.tools) or None)
        marked = has_blocks(chat_template)
        settings = self._checked(chat.settings, chat_template)
        try:
            rendered: Any = render_jinja_template(
                [[as_dict(m, self._calls) for m in chat.messages]],
                tools=list(chat.tools) or None,
                chat_template=chat_template,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marked,
                **{**self._tokenizer.special_tokens_map, **settings},
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the chat template cannot write this conversation: {error}") from error
        texts, blocks = rendered
        return texts[0], blocks[0] if marked else []

    def _checked(self, settings: Settings, chat_template: str) -> Settings:
        """The settings, none of which is a variable of ours; those that the template does not read are named once."""
        for key in settings:
            if key in OURS:
                raise DataError(f"chat_template_kwargs: {key!r} cannot be set there; remove it")
            if key not in chat_template:
                self._tell(f"chat_template_kwargs: the chat template does not read {key!r}, so it changes nothing")
        return settings

    def _rendered(self, script: Script) -> Rendered:
        (encoded,) = self.encode([script])
        if isinstance(encoded, DataError):
            raise encoded
        return Rendered(tokens=tuple(encoded.tokens.tolist()), trained=tuple(encoded.trained.tolist()))

    def _write(self, calls: Calls, messages: Sequence[Message]) -> str:
        """The conversation, with calls written this way from now on."""
        self._calls = calls
        return self._render(Chat(messages))[0]
