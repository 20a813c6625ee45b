"""Scripts as tokens: many at once, on all cores and without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from whet.errors import DataError, ModelError
from whet.templates.base import Encoded, Script, TooLong
from whet.templates.messages import CUT

SLICE = 2**16
"""Characters that are tokenized at once of a text that may be far too long."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer and the tokens at which texts end."""

    tokenizer: Any
    stop_ids: frozenset[int]
    turn_end: int
    """Ends running text where the tokenizer has no end of text."""

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

    def _texts(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Texts as `one` has them; `special`: with what the tokenizer puts around a text by itself."""
        if not texts:
            return []
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # one that is written in Python
            ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
            return ids
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=special)]

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

    def _joined(self, parts: Sequence[tuple[list[int], bool]], *, running: bool) -> Encoded | DataError:
        tokens = list(chain.from_iterable(ids for ids, _ in parts))
        if running and (not tokens or tokens[-1] not in self.stop_ids):
            eos = self.tokenizer.eos_token_id
            tokens.append(self.turn_end if eos is None else eos)
        try:
            self.refuse_two_bos(tokens)
        except DataError as error:
            return error
        trained = np.repeat([flag for _, flag in parts], [len(ids) for ids, _ in parts])
        if running:
            trained = np.ones(len(tokens), np.bool_)
        trained[:1] = False
        return Encoded(tokens=np.array(tokens, np.int32), trained=trained)
