"""A tokenizer's own chat template, with the mask that training needs.

Text is rendered by transformers' sandboxed Jinja and cut where trained spans begin and end; every piece is tokenized
by itself. So a training row starts with exactly the tokens that a sampler would have been shown, and no merge of the
tokenizer crosses the border between prompt and answer.

A trained span is what the model would have written: from the end of the generation prompt to the stop token, both
found in the rendered text and checked against the message. Where a template leaves something of an answer out (Qwen3
drops the thinking of earlier turns), there is no such span, and we say so instead of training on something else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from whet.errors import DataError, ModelError
from whet.records import Ending, Message, ToolCall
from whet.templates.base import Encoded, LossOn, Rendered, Script, Template, TooLong

Span = tuple[int, int]
"""Characters of a text: from the first up to, not including, the second."""

PROBE = "Probe7261"
"""An answer that no template treats specially and that is found again in what it writes."""

SLICE = 2**16
"""Characters that are tokenized at once of a text that may be far too long."""

OWN_TEMPLATE = "give model.chat_template a Jinja file"


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
        self._specials = {token.content: index for index, token in added.items() if token.special}
        self._special = re.compile("|".join(map(re.escape, sorted(self._specials, key=len, reverse=True))) or r"(?!)")
        self._turn_end = self._find_turn_end()
        eos = {tokenizer.eos_token_id} - {None}
        self._stop_ids = frozenset({self._specials[self._turn_end], *eos, *eos_ids})
        # A span may end with any of them: some templates close the last turn with the end of text.
        ends = [text for text, index in self._specials.items() if index in self._stop_ids]
        self._stop = re.compile("|".join(map(re.escape, ends)))
        self._check_pieces()

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

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        """The conversation so far and the opening of an assistant turn. Raises `DataError`."""
        self._refuse_specials(messages)
        text, _ = self._render(messages, tools, generation_prompt=True)
        _refuse_lost(text, messages, tools)
        tokens = self._encode(text)
        self._refuse_two_bos(tokens)
        return tuple(tokens)

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, loss_on: LossOn = "assistant"
    ) -> Rendered:
        """A finished conversation with its mask; see `Template`. Raises `DataError`."""
        return self._rendered(self.script(messages, tools, loss_on=loss_on))

    def script(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, loss_on: LossOn = "assistant"
    ) -> Script:
        """The conversation's text, cut where trained spans begin and end. Raises `DataError`."""
        self._refuse_specials(messages)
        text, blocks = self._render(messages, tools)
        _refuse_lost(text, messages, tools)
        marked = _marked(messages, loss_on)
        elsewhere = loss_on == "all"
        pieces: list[tuple[str, bool]] = []
        at = 0
        for index, (start, end) in self._spans(text, blocks, messages, tools, list(marked)):
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
        found: dict[int, Encoded | DataError] = {}
        if most is not None:
            found = {number: TooLong() for number, script in enumerate(scripts) if self._exceeds(script, most)}
        for running in (False, True):
            chosen = [n for n, script in enumerate(scripts) if script.running is running and n not in found]
            ids = iter(self._encode_all([text for n in chosen for text, _ in scripts[n].pieces], special=running))
            for number in chosen:
                parts = [(next(ids), flag) for _, flag in scripts[number].pieces]
                found[number] = self._joined(parts, running=running)
        return [found[number] for number in range(len(scripts))]

    def extend(
        self, tokens: Sequence[int], messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[int, ...]:
        """`tokens` unchanged, then what the template writes from the end of that turn to the next one's opening.

        Raises `DataError` where `tokens` do not end with a stop token: a turn that was cut off has no next one.
        """
        if not tokens or tokens[-1] not in self._stop_ids:
            raise DataError("the turn to be continued does not end with a stop token; it was cut off by its budget")
        self._refuse_specials(messages)
        # The text between two turns does not depend on what was said before, so a stand-in conversation shows it.
        called = [m.tool_call_id or "" for m in messages if m.role == "tool"]
        calls = tuple(ToolCall(name=PROBE, arguments={}, id=call_id) for call_id in called)
        before = (Message(role="user", content=PROBE), Message(role="assistant", content=PROBE, tool_calls=calls))
        turns = len(self._stop.findall(self._render(before, tools)[0]))
        text, _ = self._render([*before, *messages], tools, generation_prompt=True)
        ends = [match.end() for match in self._stop.finditer(text)]
        between = text[ends[turns - 1] :] if 0 < turns <= len(ends) else PROBE
        if PROBE in between:
            raise DataError(f"the chat template ends this kind of turn without a stop token; {OWN_TEMPLATE}")
        return (*tokens, *self._encode(between))

    def parse(self, completion: Sequence[int], ending: Ending) -> Message:
        """The text as it was written, thinking and tool calls included, without the stop token."""
        return Message(role="assistant", content=self.decode(completion[:-1] if ending is Ending.STOP else completion))

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special tokens included."""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    # ------------------------------------------------------------------------------------------- spans

    def _spans(
        self,
        text: str,
        blocks: Sequence[Span],
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        wanted: Sequence[int],
    ) -> Iterator[tuple[int, Span]]:
        """The checked spans of the wanted messages, in order."""
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if blocks and len(blocks) != len(turns):
            raise DataError(
                f"the chat template has {len(blocks)} generation blocks for {len(turns)} assistant messages, so the "
                f"mask is unclear; {OWN_TEMPLATE} with one block for each"
            )
        of_turn = dict(zip(turns, blocks, strict=True)) if blocks else {}
        for index in wanted:
            if blocks:
                start, _ = of_turn[index]
            else:
                opening, _ = self._render(messages[:index], tools, generation_prompt=True)
                if not text.startswith(opening):
                    raise self._no_span(index, "writes the turns before it differently than in the prompt for it")
                start = len(opening)
            # Messages cannot spell a stop token, so the first one ends the turn. Where a block ends is not asked:
            # some templates close it before the stop token, others after the newline behind it.
            stop = self._stop.search(text, start)
            if stop is None:
                raise self._no_span(index, "writes no stop token after it")
            self._check_span(index, messages[index], text[start : stop.end()])
            yield index, (start, stop.end())

    def _check_span(self, index: int, message: Message, span: str) -> None:
        """Whether all that the message says is in what would be trained."""
        parts = {"content": message.content, "thinking": message.thinking or ""}
        parts["tool calls"] = next((call.name for call in message.tool_calls if call.name not in span), "")
        for what, part in parts.items():
            if part.strip() not in span:
                raise self._no_span(index, f"leaves out (some of) its {what}")

    @staticmethod
    def _no_span(index: int, why: str) -> DataError:
        return DataError(
            f"messages[{index}]: the chat template {why}, so training would not see what a sampler writes; "
            f"{OWN_TEMPLATE} that keeps answers as they are, or train on the last turn only (loss_on: completion)"
        )

    # --------------------------------------------------------------------------------- text and tokens

    def _render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and the characters inside `{% generation %}` blocks where the template has them."""
        chat_template = self._tokenizer.get_chat_template(self._own, list(tools) or None)
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None
        variables: dict[str, Any] = dict(self._tokenizer.special_tokens_map)
        try:
            rendered: Any = render_jinja_template(
                [[_as_dict(message) for message in messages]],
                tools=list(tools) or None,
                chat_template=chat_template,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marked,
                **variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the chat template cannot write this conversation: {error}") from error
        texts, blocks = rendered
        return texts[0], blocks[0] if marked else []

    def _encode_all(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Texts as `_encode` has them; `special`: with what the tokenizer puts around a text by itself."""
        if not texts:
            return []
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:  # one that is written in Python
            ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
            return ids
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    def _exceeds(self, script: Script, most: int) -> bool:
        """Whether a long text has more than `most` tokens for certain, without tokenizing all of it.

        Where a text is cut, its tokens may be others, but never twice as many: slices have thousands of them.
        """
        text = "".join(piece for piece, _ in script.pieces)
        size = max(SLICE, 4 * most)
        if len(text) <= 2 * size:
            return False
        count = 0
        for at in range(0, len(text), size):
            count += len(self._encode(text[at : at + size]))
            if count > 2 * most:
                return True
        return False

    def _joined(self, parts: Sequence[tuple[list[int], bool]], *, running: bool) -> Encoded | DataError:
        tokens = list(chain.from_iterable(ids for ids, _ in parts))
        if running and (not tokens or tokens[-1] not in self._stop_ids):
            eos = self._tokenizer.eos_token_id
            tokens.append(self._specials[self._turn_end] if eos is None else eos)
        try:
            self._refuse_two_bos(tokens)
        except DataError as error:
            return error
        trained = np.repeat([flag for _, flag in parts], [len(ids) for ids, _ in parts])
        if running:
            trained = np.ones(len(tokens), np.bool_)
        trained[:1] = False
        return Encoded(tokens=np.array(tokens, np.int32), trained=trained)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        return ids

    def _rendered(self, script: Script) -> Rendered:
        (encoded,) = self.encode([script])
        if isinstance(encoded, DataError):
            raise encoded
        return Rendered(tokens=tuple(encoded.tokens.tolist()), trained=tuple(encoded.trained.tolist()))

    def _refuse_two_bos(self, tokens: Sequence[int]) -> None:
        bos = self._tokenizer.bos_token_id
        if bos is not None and list(tokens[:2]) == [bos, bos]:
            raise DataError(
                f"the text starts with two {self._tokenizer.bos_token!r}; remove one from the data or the chat template"
            )

    def _refuse_specials(self, messages: Sequence[Message]) -> None:
        """Text that spells a special token would become that token: a forged turn, or an end where none is."""
        for index, message in enumerate(messages):
            called = "".join(str(dict(call.arguments)) for call in message.tool_calls)
            found = self._special.search(message.content + "\n" + (message.thinking or "") + "\n" + called)
            if found:
                raise DataError(
                    f"messages[{index}]: the text contains the special token {found[0]!r}; remove it, "
                    "or the model would read it as a command"
                )

    # -------------------------------------------------------------------------------------- first look

    def _find_turn_end(self) -> str:
        """The special token that the template writes after an assistant's answer."""
        messages = [Message(role="user", content="Hello"), Message(role="assistant", content=PROBE)]
        try:
            text, blocks = self._render(messages, ())
            opening, _ = self._render(messages[:1], (), generation_prompt=True)
        except DataError as error:
            raise ModelError(f"{error}; {OWN_TEMPLATE}") from error
        if blocks and blocks[0][0] < len(opening):
            raise ModelError(
                "the chat template's generation block starts before its generation prompt ends, so headers would be "
                f"trained on; {OWN_TEMPLATE} with the block after the header"
            )
        _, found, tail = text.rpartition(PROBE)
        end = self._special.search(tail)
        if not found or end is None:
            missing = "an assistant's answer" if not found else "a special token after an assistant's answer"
            raise ModelError(f"the chat template does not write {missing}, so no sampler could stop; {OWN_TEMPLATE}")
        return end[0]

    def _check_pieces(self) -> None:
        """Pieces tokenized by themselves must join to the same text; old SentencePiece ones add spaces."""
        pieces = [f"Hello{self._turn_end}\nassistant", "\nyes", " no", PROBE]
        joined = self.decode([token for piece in pieces for token in self._encode(piece)])
        if joined != "".join(pieces):
            raise ModelError(
                "the tokenizer changes spaces when a text is tokenized in pieces (an old SentencePiece tokenizer?); "
                "whet needs one that does not: sampled tokens and rendered ones could not be joined"
            )


def _marked(messages: Sequence[Message], loss_on: LossOn) -> dict[int, bool]:
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


def _refuse_lost(text: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """What a template silently leaves out, the model would be trained to guess."""
    for index, message in enumerate(messages):
        if message.role in ("system", "developer", "user") and message.content.strip() not in text:
            raise DataError(f"messages[{index}]: the chat template leaves out {message.role} messages; {OWN_TEMPLATE}")
    if any(tool["function"]["name"] not in text for tool in tools):
        raise DataError(f"tools: the chat template leaves them out; {OWN_TEMPLATE} that writes tools")


def _as_dict(message: Message) -> dict[str, Any]:
    """The message as chat templates expect it; absent things have no key."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking is not None:
        fields["reasoning_content"] = message.thinking
    if message.tool_calls:
        fields["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields
