"""What is being written for each running request, and the random numbers for what will be.

Legend: S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from whet.errors import SamplerError
from whet.models.language import LanguageModel
from whet.models.marks import Routing
from whet.records import Completion, Ending
from whet.sampling.base import Request, SamplingParams
from whet.sampling.sample_token import choose
from whet.sampling.stop_strings import COMPLETE, stop_table


class Answers:
    """One line of places for each running request, as many places as the longest answer may have tokens."""

    def __init__(self, device: torch.device, routing: Routing | None = None) -> None:
        self._device, self.routing = device, routing
        self.uniforms = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self.logps = torch.zeros(0, 0, device=device)
        self.states = torch.zeros(0, 1, dtype=torch.int32, device=device)  # of the stop strings
        self.marks = torch.zeros(0, 1, dtype=torch.int32, device=device)  # of the marks of roles, prompt included
        self._free: list[int] = []

    @property
    def size(self) -> int:
        """Places of a line."""
        return self.tokens.shape[1]

    def begin(self, request: Request) -> int:
        """A line for this request, with the random numbers that follow from its seed."""
        count = request.params.max_tokens
        if not self._free or count > self.size:
            self._grow(max(self.size, count))
        line = self._free.pop()
        draws = np.random.Generator(np.random.Philox(key=request.seed)).random(count)
        self.uniforms[line, :count] = torch.from_numpy(draws)
        self.states[line] = 0
        return line

    def read(self, marks: Sequence[tuple[int, int]]) -> None:
        """The state of the marks of roles after each of these lines' prompts."""
        for line, state in marks:
            self.marks[line] = state

    def route(self, line_S: Tensor) -> None:
        """Send what was written last on these lines through the adapters of its role."""
        if self.routing is not None:
            self.routing.role_N = self.routing.role_Q[self.marks[line_S, 0]]

    def end(self, line: int) -> None:
        """The line is free for another request."""
        self._free.append(line)

    def written(self, line: int, count: int) -> list[int]:
        """The first so many tokens of a line."""
        tokens: list[int] = self.tokens[line, :count].tolist()
        return tokens

    def completion(
        self, line: int, count: int, request: Request, version: int, later: tuple[tuple[int, int], ...]
    ) -> Completion | SamplerError:
        """The first so many tokens of a line, or an error where the last one's logits were no numbers."""
        tokens, logps = (held[line, :count].cpu().numpy().copy() for held in (self.tokens, self.logps))
        if np.isnan(logps[-1]):
            return SamplerError(f"the model's logits are not finite at token {count} of the answer")
        complete = Ending.STOP_STRING if self.states[line] == COMPLETE else Ending.LENGTH
        ending = Ending.STOP if int(tokens[-1]) in request.params.stop_ids else complete
        return Completion(tokens=tokens, logprobs=logps, version=version, ending=ending, later=later)

    def _grow(self, size: int) -> None:
        lines = len(self.tokens)
        more = lines if self._free else max(8, 2 * lines)
        for name in ("uniforms", "tokens", "logps", "states", "marks"):
            old = getattr(self, name)
            new = old.new_zeros(more, 1 if name in ("states", "marks") else size)
            new[:lines, : old.shape[1]] = old
            setattr(self, name, new)
        self._free += range(more - 1, lines - 1, -1)


@dataclass(eq=False, frozen=True, slots=True)
class SamplingKind:
    """How some requests are sampled alike, and what ends them."""

    params: SamplingParams
    stops: Tensor
    strings_QV: Tensor | None
    """`stop_strings.stop_table`, where there are such strings."""

    @staticmethod
    def key(params: SamplingParams) -> SamplingParams:
        """Equal for requests that are sampled alike."""
        return replace(params, max_tokens=1)

    @classmethod
    def of(cls, params: SamplingParams, model: LanguageModel) -> SamplingKind:
        """The kind of these parameters."""
        stops = torch.tensor(sorted(params.stop_ids), dtype=torch.long, device=model.device)
        if not params.stop:
            return cls(params, stops, None)
        strings_QV = torch.from_numpy(stop_table(model.tokenizer, model.vocabulary, params.stop))
        return cls(params, stops, strings_QV.to(model.device))


class Pens:
    """Where each of some rows writes next, and how its token is chosen."""

    def __init__(self, answers: Answers, lines: Sequence[tuple[int, int, int]], kinds: Sequence[SamplingKind]) -> None:
        """Of each row: its line, how many tokens stand there, and how many there may be."""
        self._answers = answers
        self.line_S, count_S, most_S = torch.tensor(lines, device=answers.tokens.device).T
        line_S = self.line_S
        self.place_S, self.last_S = line_S * answers.size + count_S, line_S * answers.size + most_S - 1
        by_kind: dict[SamplingKind, list[int]] = {}
        for row, kind in enumerate(kinds):
            by_kind.setdefault(kind, []).append(row)
        self._kinds = [
            (kind, slice(None) if len(by_kind) == 1 else torch.tensor(rows, device=line_S.device))
            for kind, rows in by_kind.items()
        ]

    @property
    def token_S(self) -> Tensor:
        """What was written last."""
        return self._answers.tokens.view(-1)[self.place_S - 1].long()

    def write(self, logits_SV: Tensor) -> tuple[Tensor, list[int]]:
        """(token_S, the rows that have ended): choose a token for each row, and note it."""
        answers = self._answers
        uniform_S = answers.uniforms.view(-1)[self.place_S]
        token_S, logp_S = torch.empty_like(self.place_S), torch.empty_like(uniform_S, dtype=answers.logps.dtype)
        ended_S = self.place_S == self.last_S
        for kind, rows in self._kinds:
            token, logp = choose(logits_SV[rows], kind.params, uniform_S[rows])
            token_S[rows], logp_S[rows] = token, logp.to(logp_S.dtype)
            if len(kind.stops):
                ended_S[rows] |= (token[:, None] == kind.stops).any(-1)
            if kind.strings_QV is not None:
                lines = self.line_S[rows]
                state = kind.strings_QV[answers.states[lines, 0], token]
                answers.states[lines, 0] = state
                ended_S[rows] |= state == COMPLETE
        ended_S |= logp_S.isnan()
        if answers.routing is not None:
            state_S = answers.marks[self.line_S, 0]
            answers.marks[self.line_S, 0] = answers.routing.next_QV[state_S, token_S]
        answers.tokens.view(-1).index_copy_(0, self.place_S, token_S.int())
        answers.logps.view(-1).index_copy_(0, self.place_S, logp_S)
        self.place_S += 1
        return token_S, ended_S.nonzero()[:, 0].tolist() if ended_S.any() else []
