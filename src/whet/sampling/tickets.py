"""What the engine knows of a request: its row and its prompt, what is written for it, and how its next token is chosen.

A stop string is found by a table over tokens (`models.marks`): one look-up for each sampled token says whether a string
is complete.

Legend: S rows, V vocabulary, B blocks of the vocabulary, X tokens of a block, Q states of the stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from whet.errors import SamplerError
from whet.models.attention import Tree, TreeLayout
from whet.models.language import LanguageModel
from whet.models.marks import COMPLETE, Routing, stop_table
from whet.models.matmul import padded
from whet.records import Completion, Ending
from whet.sampling.base import Request, SamplingParams
from whet.sampling.cuda_graph import RecordedStep, StaticStep, Step, record_cuda_graph
from whet.sampling.forward import Forward
from whet.sampling.kv_cache import TAILS, WHOLE, Beginning, Member, Prefixes, Slab, size_class
from whet.sampling.layouts import Decode, DecodeBatch, Entry, Prefill, Shared

BLOCK = 64
"""Tokens whose probabilities are added up before they are accumulated over the vocabulary."""
BELOW_ONE = 1 - 2**-53
"""A share of a sum in double precision that stays below the sum."""


@dataclass(eq=False, slots=True)
class Ticket(Member):
    """A request on its way: waiting, or running as a row of a slab."""

    request: Request = field(kw_only=True)
    prompt: SharedPrompt = field(kw_only=True)
    kind: SamplingKind = field(kw_only=True)
    front: int = field(kw_only=True)
    """Columns before its answer: its prompt's, where that is not kept apart."""
    line: int = -1
    """Where its answer is written."""
    born: int = 0
    """The steps that had been taken when it began to run."""
    version: int = 0
    """Of the weights that wrote its first token."""
    switches: int = 0
    """The hand-overs that had been made by then, of those while the engine was at work."""

    def later(self, switches: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """(first token, version) for each hand-over since it began, of those after so many steps each."""
        return tuple((at - self.born + 1, version) for at, version in switches[self.switches :])

    @property
    def role(self) -> str:
        """Of the slabs in which it stands."""
        return TAILS if self.prompt.apart else WHOLE

    @property
    def span(self) -> int:
        """Most tokens, prompt and answer."""
        return len(self.prompt.tokens) + self.request.params.max_tokens

    @property
    def cost(self) -> int:
        """Cached tokens that its row may come to need."""
        return size_class(self.front + self.request.params.max_tokens)


@dataclass(eq=False, slots=True)
class SharedPrompt(Member):
    """A prompt that tickets wait for or run on; it has a place of its own where it is kept apart."""

    key: tuple[bytes, bool, int] = field(kw_only=True)
    """Its tokens, whether it is kept apart, and the hand-over since which it is computed: none of another is read."""
    tokens: np.ndarray = field(kw_only=True)
    waiting: deque[Ticket] = field(default_factory=deque)
    running: list[Ticket] = field(default_factory=list)
    hidden_D: Tensor | None = None
    """The hidden state after it, once that is computed."""
    marks: int = 0
    """The state of the marks of roles after it."""

    def uncached(self, salt: int) -> SharedPrompt:
        """The same, of which nothing is computed, for those that wait for this one."""
        fresh = SharedPrompt(key=(*self.key[:2], salt), tokens=self.tokens, waiting=self.waiting)
        for ticket in fresh.waiting:
            ticket.prompt = fresh
        self.waiting = deque()
        return fresh

    @property
    def apart(self) -> bool:
        """Whether its keys and values are kept once for all its rows."""
        return self.key[1]

    @property
    def cost(self) -> int:
        """Cached tokens that it needs where it is kept apart."""
        return size_class(len(self.tokens))

    @property
    def known(self) -> bool:
        """Whether its keys and values are there to be read."""
        return self.slab is not None if self.apart else bool(self.running)


# ----------------------------------------------------------------------------------------- passes


def route_prompts(prompts: Sequence[SharedPrompt], routing: Routing | None) -> None:
    """Send a stream of these prompts through adapters by their tokens' roles, where that is done."""
    if routing is not None:
        states_P = routing.read([prompt.tokens for prompt in prompts])
        for prompt, state in zip(prompts, states_P, strict=True):
            prompt.marks = state


def batch_of(
    whole: Sequence[Slab], tails: Sequence[Slab], prompts: Sequence[Slab], longest: int, device: torch.device
) -> DecodeBatch:
    """The rows of these slabs, those whose prompt is apart beside their prompts; the longest has so many tokens."""
    number = {row: at for at, row in enumerate(row for slab in tails for row in slab.members)}
    place_T, shared, at = [0] * len(number), [], 0
    for slab in prompts:
        asking = [p for p in slab.members if isinstance(p, SharedPrompt)]
        slab.arrange([len(prompt.tokens) - 1 for prompt in asking])
        shared.append(Shared.of(slab, [[number[row] for row in prompt.running] for prompt in asking], device))
        for prompt in asking:
            for rank, row in enumerate(prompt.running):
                place_T[number[row]] = at + rank
            at += shared[-1].shape[1]
    places = torch.tensor(place_T, dtype=torch.long, device=device)
    return DecodeBatch((*whole, *tails), len(whole), shared, places, longest)


def prefill_of(
    prompts: Sequence[SharedPrompt],
    rows: Mapping[SharedPrompt, Sequence[Ticket]],
    known: Sequence[Beginning],
    model: LanguageModel,
) -> tuple[Tensor, Tensor, Prefill]:
    """(tokens_N, positions_N, layout) of these prompts, without what is known of them; sent through their adapters."""
    entries, at = [], 0
    for prompt, beginning in zip(prompts, known, strict=True):
        member, places = (prompt, 1) if prompt.apart else (rows[prompt][0], len(rows[prompt]))
        assert member.slab is not None
        tokens = slice(at, at := at + len(prompt.tokens) - beginning.tokens)
        entries.append(Entry(tokens, member.slab, member.place, places, beginning))
    route_prompts(prompts, model.routing)
    whole = TreeLayout(tuple(Tree(0, (len(prompt.tokens),)) for prompt in prompts), model.device, model.backend)
    both = [(prompt.tokens, beginning.tokens) for prompt, beginning in zip(prompts, known, strict=True)]
    new = [torch.from_numpy(tokens[start:]) for tokens, start in both]
    positions = [torch.arange(start, len(tokens)) for tokens, start in both]
    return torch.cat(new).to(model.device), torch.cat(positions).to(model.device), Prefill(entries, whole)


def note(
    prompts: Sequence[SharedPrompt],
    rows: Mapping[SharedPrompt, Sequence[Ticket]],
    after_PD: Tensor,
    layout: Prefill,
    prefixes: Prefixes,
) -> None:
    """Note what was computed of these prompts: the last hidden state, and what a later prompt may begin with."""
    for prompt, entry, after_D in zip(prompts, layout.entries, after_PD[: len(prompts)], strict=True):
        prompt.hidden_D = after_D
        if any(row.request.goes_on for row in rows[prompt]):
            prefixes.keep(prompt.tokens, tuple(entry.computed), entry.known.tokens)


class EagerStep:
    """Logits of the next token, by kernels for just the rows and columns that there are."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def __call__(self, token_S: Tensor, position_S: Tensor, batch: DecodeBatch) -> Tensor:
        """(rows, V): writes the keys and values of these tokens into their rows' next columns."""
        hidden = self._forward.hidden(padded(token_S), padded(position_S), Decode(batch))
        return self._forward.logits(hidden)[: len(token_S)]


def step_of(forward: Forward, device: torch.device, *, plain: bool) -> Step:
    """Recorded on a GPU, where the forward pass is our own."""
    eager = EagerStep(forward)
    if device.type != "cuda" or not plain:
        return eager
    return RecordedStep(eager, lambda slab: StaticStep(forward, slab, device), record_cuda_graph)


# -------------------------------------------------------------------------------- what is written


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
    """`stop_table`, where there are such strings."""

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


# ------------------------------------------------------------------------------------- the next token


def choose(logits_SV: Tensor, params: SamplingParams, uniform_S: Tensor) -> tuple[Tensor, Tensor]:
    """(token_S, logp_S): inverse-CDF sampling; the log-probability is under the distribution sampled from.

    `uniform_S` are double-precision numbers of [0, 1). Temperature 0 takes the largest logit and reports its
    log-probability at temperature 1. Where logits are no numbers the log-probability is NaN, and the token any.
    """
    logits_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
    if params.temperature not in (0, 1):
        logits_SV = logits_SV / params.temperature
    if params.temperature != 0:
        logits_SV = truncate(logits_SV, top_p=params.top_p, top_k=params.top_k)
    p_SV = logits_SV.softmax(-1)
    missing = -p_SV.shape[-1] % BLOCK
    p_SBX = (F.pad(p_SV, (0, missing)) if missing else p_SV).unflatten(-1, (-1, BLOCK))  # of none `pad` makes a copy
    token_S = (_largest(p_SBX) if params.temperature == 0 else _invert(p_SBX, uniform_S[:, None]))[:, 0]
    token_S.clamp_max_(p_SV.shape[-1] - 1)
    return token_S, p_SV.gather(-1, token_S[:, None])[:, 0].log_()


def _largest(p_SBX: Tensor) -> Tensor:
    """The first of the largest, first by blocks: an argmax over the whole vocabulary takes ten times as long."""
    block_S1 = p_SBX.amax(-1).argmax(-1, keepdim=True)
    return block_S1 * BLOCK + _of_block(p_SBX, block_S1).argmax(-1, keepdim=True)


def _invert(p_SBX: Tensor, uniform_S1: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes the uniform number: its block, then its place in it.

    A block or token without probability is never the first whose sum exceeds a number, provided that the number stays
    below the last sum.
    """
    cdf_SB = p_SBX.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted_S1 = uniform_S1 * cdf_SB[:, -1:]
    block_S1 = torch.searchsorted(cdf_SB, wanted_S1, right=True).clamp_max_(cdf_SB.shape[-1] - 1)
    before_S1 = torch.where(block_S1 > 0, cdf_SB.gather(-1, (block_S1 - 1).clamp_min_(0)), 0.0)
    inner_SX = _of_block(p_SBX, block_S1).double().cumsum(-1)
    within_S1 = torch.minimum((wanted_S1 - before_S1).clamp_min_(0), inner_SX[:, -1:] * BELOW_ONE)
    return block_S1 * BLOCK + torch.searchsorted(inner_SX, within_S1, right=True)


def _of_block(p_SBX: Tensor, block_S1: Tensor) -> Tensor:
    return p_SBX[torch.arange(len(p_SBX), device=p_SBX.device), block_S1[:, 0]]


def truncate(logits_SV: Tensor, *, top_p: float, top_k: int | None) -> Tensor:
    """Logits with everything outside top-k and then the nucleus (top-p, Holtzman 2019) at -inf."""
    if top_k is not None and top_k < logits_SV.shape[-1]:
        smallest = logits_SV.topk(top_k, dim=-1).values[:, -1:]
        logits_SV = logits_SV.masked_fill(logits_SV < smallest, float("-inf"))
    if top_p < 1:
        sorted_SV, order = logits_SV.sort(-1, descending=True)
        p_SV = sorted_SV.softmax(-1)
        outside = p_SV.cumsum(-1) - p_SV >= top_p  # the token that crosses the bound stays
        logits_SV = logits_SV.masked_fill(outside.gather(-1, order.argsort(-1)), float("-inf"))
    return logits_SV
