"""A sampler that says what it was told to: environments, rewards and whole runs are tested without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from whet.errors import SamplerError
from whet.records import Completion, Ending, Message, token_ids
from whet.sampling.base import Request

Script = Callable[[Sequence[Message]], str]
"""The answer to a conversation."""


class ScriptedSampler:
    """`TokenSampler`: it says texts, one after another, or a function of the conversation.

    The function is shown one user message, the prompt as `decode` spells it (chat markup included). The answer is
    written as `encode` spells it, then the smallest of the request's stop tokens; it ends with the token that completes
    one of its stop strings, and what is longer than `max_tokens` is cut and ends by length. Every token has the same
    log-probability. Raises `SamplerError` where the texts are used up.
    """

    def __init__(
        self,
        answers: Sequence[str] | Script,
        *,
        encode: Callable[[str], Sequence[int]] = lambda text: list(text.encode()),
        decode: Callable[[Sequence[int]], str] = lambda tokens: bytes(tokens).decode(),
        logprob: float = -1.0,
    ) -> None:
        self._answer = answers if callable(answers) else _one_after_another(answers)
        self._encode, self._decode = encode, decode
        self._logprob = logprob
        self.version = 0

    def publish(self, version: int) -> None:
        """Report this version from now on."""
        self.version = version

    async def sample(self, request: Request) -> Completion:
        """The scripted answer as tokens."""
        text = self._answer([Message(role="user", content=self._decode([int(token) for token in request.prompt]))])
        whole = (*self._encode(text), *sorted(request.params.stop_ids)[:1])
        tokens = whole[: request.params.max_tokens]
        ending = Ending.STOP if tokens and tokens[-1] in request.params.stop_ids else Ending.LENGTH
        for count in range(1, len(tokens) + 1) if request.params.stop else ():
            if any(string in self._decode(tokens[:count]) for string in request.params.stop):
                tokens, ending = tokens[:count], Ending.STOP_STRING
                break
        return Completion(
            tokens=token_ids(tokens),
            logprobs=np.full(len(tokens), self._logprob, np.float32),
            version=self.version,
            ending=ending,
        )


def _one_after_another(answers: Sequence[str]) -> Script:
    left = iter(answers)

    def script(_: Sequence[Message]) -> str:
        try:
            return next(left)
        except StopIteration:
            raise SamplerError(f"the script has {len(answers)} answers, and one more was asked for") from None

    return script
