"""Where in an answer's tokens a piece of its text is complete: grades of steps meet tokens here, and nowhere else."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence


def completing_tokens(
    tokens: Sequence[int], answer: str, ends: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> tuple[int, ...]:
    """For each end (characters of `answer`, ascending) the place of the token that completes what precedes it.

    A token completes a piece if decoding the tokens up to it shows the piece's last character and decoding fewer does
    not (half a character decodes to something else than what becomes of it, and does not count as shown). The last
    token, which is the stop token where there is one, belongs to a piece that ends with the answer. `answer` is what
    the tokens spell, or a part of that.
    """
    text = decode(tokens)
    before = text.find(answer)
    assert before >= 0, "an answer is spelled by its tokens"

    def shown(count: int) -> int:
        part = decode(tokens[:count])
        return next((at for at, (left, right) in enumerate(zip(part, text, strict=False)) if left != right), len(part))

    places = [bisect_left(range(1, len(tokens) + 1), before + end, key=shown) for end in ends]
    if ends and ends[-1] == len(answer):
        places[-1] = len(tokens) - 1
    return tuple(places)
