"""Stop strings as a table over tokens: one look-up for each sampled token says whether a string is complete.

The states are the beginnings of the strings that a text may end with (an Aho-Corasick automaton over bytes). Each
token of the vocabulary is run through it once from every state, so a string is found wherever tokens cut it, inside
one of them or across many.

Legend: Q states, V vocabulary, B bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import ModelError

States = npt.NDArray[np.int32]
COMPLETE = -1
"""The state once a string is complete; as an index it is the table's last row, which leads nowhere else."""


@lru_cache(maxsize=8)
def stop_table(tokenizer: Any, vocabulary: int, strings: tuple[str, ...]) -> States:
    """The state after a token, (Q, V); a text begins in state 0.

    Raises `ModelError` where the tokenizer's tokens do not join to the text that they stand for.
    """
    spelled = _spellings(tokenizer, vocabulary)
    for string in strings:
        tokens = tokenizer(string, add_special_tokens=False)["input_ids"]
        if not b"".join(spelled[token] for token in tokens).endswith(string.encode()):
            raise ModelError(f"sampling.stop: the tokenizer does not spell {string!r} token by token; leave it out")
    next_QB = _automaton([string.encode() for string in strings])
    length_V = np.array([len(text) for text in spelled])
    first_V, bytes_N = np.cumsum(length_V) - length_V, np.frombuffer(b"".join(spelled), np.uint8)
    table_QV = np.repeat(np.arange(len(next_QB), dtype=np.int32)[:, None], vocabulary, axis=1)
    table_QV[-1] = COMPLETE
    for at in range(length_V.max()):
        (longer,) = np.nonzero(length_V > at)
        table_QV[:, longer] = next_QB[table_QV[:, longer], bytes_N[first_V[longer] + at]]
    return table_QV


def completing(table_QV: States, tokens: Sequence[int]) -> int | None:
    """How many of the tokens there are when a string is complete; None: it never is."""
    state = 0
    for count, token in enumerate(tokens, start=1):
        state = table_QV[state, token]
        if state == COMPLETE:
            return count
    return None


def _automaton(strings: Sequence[bytes]) -> States:
    """The state after a byte, (Q, B)."""
    begun = sorted({string[:count] for string in strings for count in range(len(string))}, key=len)
    number = {text: state for state, text in enumerate(begun)}
    next_QB = np.zeros((len(begun) + 1, 256), np.int32)
    next_QB[-1] = COMPLETE
    for state, text in enumerate(begun):
        for byte in set(b"".join(strings)):
            longer = text + bytes([byte])
            if any(longer.endswith(string) for string in strings):
                next_QB[state, byte] = COMPLETE
            else:
                ends = (longer[at:] for at in range(len(longer)))
                next_QB[state, byte] = next((number[end] for end in ends if end in number), 0)
    return next_QB


def _spellings(tokenizer: Any, vocabulary: int) -> list[bytes]:
    """The bytes that each token adds to a text; special tokens count as they are written."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    pieces: dict[int, str] = {index: piece for piece, index in tokenizer.get_vocab().items()} | added
    shown = [byte for byte in range(33, 256) if chr(byte).isprintable()]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}  # GPT-2's
    byte_level = "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))

    def spelling(index: int) -> bytes:
        piece = pieces.get(index, "")
        if index in added:
            return piece.encode()
        if byte_level:
            return bytes(alphabet[letter] for letter in piece)
        if len(piece) == 6 and piece.startswith("<0x"):  # SentencePiece's byte of a character that it lacks
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    return [spelling(index) for index in range(vocabulary)]
