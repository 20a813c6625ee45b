"""Strings as tables over tokens: one look-up a token says how far into one a text is, or between which it stands.

The states are the beginnings of the strings that a text may end with (an Aho-Corasick automaton over bytes). Each
token of the vocabulary is run through it once from every state, so a string is found wherever tokens cut it, inside
one of them or across many.

A token's *role* is where it stands: inside thinking, inside a call, or in neither. It is predicted in the role of what
precedes it, so an opening mark is written from outside, a closing one from inside. Of routed adapters (DART,
2602.00994) a token passes through the one of its role, which prefixes alone decide: trainer and sampler agree.

Legend: Q states, V vocabulary, B bytes, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from whet.errors import ModelError
from whet.records import TokenIds

States = npt.NDArray[np.int32]
Blocks = npt.NDArray[np.int64]
ROLES = ("answer", "reasoning", "call")
CALL = ROLES.index("call")
ADAPTERS = ("reason", "act")
"""Of routed adapters: that of everything else, and that of calls."""
COMPLETE = -1
"""The state once a stop string is complete; as an index it is the table's last row, which leads nowhere else."""
Marks = Mapping[str, tuple[str, str]]
"""What opens and what closes a role, by its name."""


@dataclass(frozen=True, slots=True)
class RoleTable:
    """Between which marks a text stands, token by token. A text begins in state 0."""

    next_QV: States
    role_Q: Blocks

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int, marks: Marks) -> RoleTable:
        """For these marks; a special token of the vocabulary (the end of a turn) ends every role."""
        spelled = spellings(tokenizer, vocabulary)
        for string in (mark for pair in marks.values() for mark in pair):
            tokens = tokenizer(string, add_special_tokens=False)["input_ids"]
            if not b"".join(spelled[token] for token in tokens).endswith(string.encode()):
                raise ModelError(f"train.roles: the tokenizer does not spell {string!r} token by token")
        opened = {marks[role][0].encode(): ROLES.index(role) for role in ROLES[1:]}
        next_QV, role_Q = token_table(spelled, [opened, *({marks[role][1].encode(): 0} for role in ROLES[1:])])
        used = {mark for pair in marks.values() for mark in pair}
        ends = [index for index, text in tokenizer.added_tokens_decoder.items() if text.special]
        next_QV[:, [index for index in ends if spelled[index].decode() not in used]] = 0
        return cls(next_QV, role_Q)

    def states(self, tokens: TokenIds) -> States:
        """The state after each token, (N,)."""
        found, state = np.empty(len(tokens), np.int32), 0
        for place, token in enumerate(tokens.tolist()):
            found[place] = state = self.next_QV[state, token]
        return found

    def roles(self, tokens: TokenIds) -> Blocks:
        """The role after each token, (N,): that in which the next one is predicted."""
        return self.role_Q[self.states(tokens)]


class Routing:
    """Which of two adapters the tokens of the next forward pass go through."""

    def __init__(self, marks: Marks, table: RoleTable, adapter: Any, device: torch.device) -> None:
        self.marks, self.table = marks, table
        self.next_QV, self.role_Q = (torch.from_numpy(part).to(device) for part in (table.next_QV, table.role_Q))
        self.role_N: Tensor | None = None
        """Roles of that pass's tokens; padding after them is in none. None: no token is in a call."""
        for name, part in adapter.named_modules():
            for wanted, adapted in enumerate(ADAPTERS):
                if name.endswith(f".lora_A.{adapted}"):
                    part.register_forward_hook(partial(self._masked, bool(wanted)))

    def read(self, prompts: Sequence[TokenIds]) -> list[int]:
        """Route a stream of these prompts; the state after each."""
        states = [self.table.states(tokens) for tokens in prompts]
        self.role_N = self.role_Q[torch.from_numpy(np.concatenate(states)).to(self.role_Q.device)]
        return [int(state_N[-1]) for state_N in states]

    def _masked(self, acts: bool, part: Any, given: tuple[Tensor, ...], said: Tensor) -> Tensor:
        if self.role_N is None:
            return said * 0 if acts else said
        missing = said.shape[-2] - len(self.role_N)
        assert missing >= 0, "a role for each token of the pass"
        through_N = F.pad(self.role_N == CALL, (0, missing)) == acts
        return said * through_N[:, None].to(said.dtype)


def token_table(spelled: Sequence[bytes], blocks: Sequence[Mapping[bytes, int]]) -> tuple[States, Blocks]:
    """(the state after a token (Q, V), the block of a state (Q,)).

    In each block some strings are looked for; where one is complete, a text goes on at the begin of the block that it
    leads to. State 0 is the begin of the first block.
    """
    next_QB, block_Q = _automaton(blocks)
    length_V = np.array([len(text) for text in spelled])
    first_V, bytes_N = np.cumsum(length_V) - length_V, np.frombuffer(b"".join(spelled), np.uint8)
    table_QV = np.repeat(np.arange(len(next_QB), dtype=np.int32)[:, None], len(spelled), axis=1)
    for at in range(length_V.max()):
        (longer,) = np.nonzero(length_V > at)
        table_QV[:, longer] = next_QB[table_QV[:, longer], bytes_N[first_V[longer] + at]]
    return table_QV, block_Q


def _automaton(blocks: Sequence[Mapping[bytes, int]]) -> tuple[States, Blocks]:
    """(the state after a byte (Q, B), the block of a state (Q,))."""
    begun = [sorted({b"", *(s[:n] for s in strings for n in range(len(s)))}, key=len) for strings in blocks]
    first = [0, *accumulate(map(len, begun))]
    next_QB = np.zeros((first[-1], 256), np.int32)
    for block, strings in enumerate(blocks):
        number = {text: first[block] + place for place, text in enumerate(begun[block])}
        for text, state in number.items():
            next_QB[state] = first[block]
            for byte in set(b"".join(strings)):
                longer = text + bytes([byte])
                done = next((to for string, to in strings.items() if longer.endswith(string)), None)
                ends = (longer[at:] for at in range(len(longer) + 1))
                next_QB[state, byte] = next(number[e] for e in ends if e in number) if done is None else first[done]
    return next_QB, np.repeat(np.arange(len(blocks)), [len(texts) for texts in begun])


def spellings(tokenizer: Any, vocabulary: int) -> list[bytes]:
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


# -------------------------------------------------------------------------------- stop strings


@lru_cache(maxsize=8)
def stop_table(tokenizer: Any, vocabulary: int, strings: tuple[str, ...]) -> States:
    """The state after a token, (Q, V); a text begins in state 0.

    Raises `ModelError` where the tokenizer's tokens do not join to the text that they stand for.
    """
    spelled = spellings(tokenizer, vocabulary)
    for string in strings:
        tokens = tokenizer(string, add_special_tokens=False)["input_ids"]
        if not b"".join(spelled[token] for token in tokens).endswith(string.encode()):
            raise ModelError(f"sampling.stop: the tokenizer does not spell {string!r} token by token; leave it out")
    table_QV, _ = token_table(spelled, [dict.fromkeys((string.encode() for string in strings), 1), {}])
    table_QV[table_QV == len(table_QV) - 1] = COMPLETE
    return table_QV


def completing(table_QV: States, tokens: Sequence[int]) -> int | None:
    """How many of the tokens there are when a string is complete; None: it never is."""
    state = 0
    for count, token in enumerate(tokens, start=1):
        state = table_QV[state, token]
        if state == COMPLETE:
            return count
    return None
