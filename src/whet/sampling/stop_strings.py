"""Stop strings as a table over tokens: one look-up for each sampled token says whether a string is complete.

Legend: Q states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from whet.errors import ModelError
from whet.models.marks import States, spellings, token_table

COMPLETE = -1
"""The state once a string is complete; as an index it is the table's last row, which leads nowhere else."""


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
