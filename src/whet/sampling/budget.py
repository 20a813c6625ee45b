"""Budget forcing (s1, Muennighoff et al. 2025, 2501.19393): thinking is cut at a budget, or made to go on.

A sampler around another one: what it returns is one completion, in which the tokens that were forced have the
log-probability 0. For evaluation; nothing may be trained on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from whet.records import Completion, Ending, seed_of, token_ids
from whet.sampling.base import Request, TokenSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSampler:
    """`TokenSampler` that lets another one think for a number of tokens, and then answer."""

    sampler: TokenSampler
    thinking: int
    """Most tokens of thinking, forced ones included; the request's `max_tokens` are those of the answer behind it."""
    end: str
    """What ends thinking. An answer without it has not ended thinking, and is cut like any other."""
    cut: Sequence[int]
    """Written where thinking is cut."""
    wait: Sequence[int]
    """Written in the place of `end` where thinking is extended."""
    extensions: int
    """How often it is."""
    max_length: int
    """Most tokens that the model attends to."""
    decode: Callable[[Sequence[int]], str]

    @property
    def version(self) -> int:
        """That of the other sampler."""
        return self.sampler.version

    async def sample(self, request: Request) -> Completion:
        """Thinking and answer as one completion; `SamplerError` as the other sampler raises it."""
        written, logprobs = list[int](), list[float]()

        async def go_on(part: int, most: int, stop: tuple[str, ...]) -> Ending:
            prompt = [*map(int, request.prompt), *written]
            room = min(most, self.max_length - len(prompt))
            if room < 1:
                return Ending.LENGTH
            params = replace(request.params, max_tokens=room, stop=stop)
            seed = seed_of(request.seed, part) if part else request.seed
            found = await self.sampler.sample(replace(request, prompt=prompt, seed=seed, params=params))
            written.extend(found.tokens.tolist())
            logprobs.extend(found.logprobs.tolist())
            return found.ending

        ending = await go_on(0, self.thinking, (self.end,))
        for part in range(1, self.extensions + 1):
            kept = self._before_end(written) if ending is Ending.STOP_STRING else self.thinking
            left = self.thinking - kept - len(self.wait)
            if left < 1:
                break
            written[kept:] = self.wait
            logprobs[kept:] = [0.0] * len(self.wait)
            ending = await go_on(part, left, (self.end,))
        if ending is Ending.LENGTH:
            written += self.cut
            logprobs += [0.0] * len(self.cut)
        if ending is not Ending.STOP:
            ending = await go_on(self.extensions + 1, request.params.max_tokens, request.params.stop)
        return Completion(
            tokens=token_ids(written), logprobs=np.array(logprobs, np.float32), version=self.version, ending=ending
        )

    def _before_end(self, tokens: Sequence[int]) -> int:
        """How many tokens stand before those that spell the end of thinking, which is last."""
        return next(kept for kept in range(len(tokens) - 1, -1, -1) if self.end in self.decode(tokens[kept:]))
