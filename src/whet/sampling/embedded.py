"""The embedded engine: continuous batching over the trainer's own weights.

Every distinct prompt is computed once, and all its answers read the same keys and values. A row that ends leaves
at once, the last row takes its place, and waiting requests enter when there is room for a few. What a step has to
know of its rows is in tensors, so nothing in Python happens for each token, only when somebody comes or goes.
Weights are the trainer's (same tensors, no hand-over), so version and weights cannot disagree.

A request's random numbers come from its own seed: one uniform number per token, used to invert the cumulative
distribution. What else is in the batch does not matter (beyond the rounding of batched matrix products).

Legend: S running rows, N requests, T most tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from whet.errors import SamplerError
from whet.models.attention import Tree, TreeLayout
from whet.models.language import LanguageModel
from whet.records import Completion, Ending, token_ids
from whet.sampling.base import Request, SamplingParams
from whet.sampling.cache import Cache, Entry, Prefill, Rows
from whet.sampling.choose import choose
from whet.sampling.forward import Forward, Plan, plan
from whet.sampling.static import Step, step_for

PREFILL_TOKENS = 1024
"""Most prompt tokens computed at once, or one prompt of any length: more do not fit the processor's caches."""
ADMIT_SHARE = 0.125
"""Waiting requests enter when at least this share of the slots is free: a few prompts at once are cheaper than one."""
SHARED_TOKENS = 3000
"""Prompts are kept once, apart, where that saves at least so many cached tokens; below, merging costs more."""
MARGIN = 0.25
"""Columns beyond the longest sequence, as a share of it, where requests wait: moving to the front is then rare."""


class EmbeddedSampler:
    """`TokenSampler` over a model in this process."""

    def __init__(self, model: LanguageModel, *, max_running: int = 256, cache_gib: float = 4.0) -> None:
        """At most so many rows side by side, and no more than whose keys and values fit; one always runs."""
        self.model = model
        self.max_running = max_running
        self.cache_bytes = int(cache_gib * 2**30)
        self.version = 0
        self.plan = plan(model)

    def publish(self, version: int) -> None:
        """Take note that the shared weights are now of this version."""
        self.version = version

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[Completion | SamplerError]:
        """One completion for each request, in order; an error for one whose logits are no numbers."""
        if not requests:
            return []
        self.model.module.eval()
        positions = max(len(r.prompt) + r.params.max_tokens for r in requests)
        cache = _cache(self.plan, requests, min(self.max_running, len(requests)), self.cache_bytes)
        forward = self.plan.bind(self.model, positions)
        step = step_for(forward, cache, self.model.device, plain=self.plan.plain)
        batch = _Batch(self.model, forward, step, cache, requests)
        batch.run()
        return [batch.answers.completion(number, self.version) for number in range(len(requests))]


class _Answers:
    """What has been written for each request, and the random numbers for what will be: one place for each token."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self.requests = requests
        self.size = max(r.params.max_tokens for r in requests)
        uniforms = np.zeros((len(requests), self.size))
        for number, r in enumerate(requests):
            uniforms[number, : r.params.max_tokens] = np.random.Generator(np.random.Philox(key=r.seed)).random(
                r.params.max_tokens
            )
        self.uniforms = torch.from_numpy(uniforms).flatten().to(device)
        self.tokens = torch.zeros(len(uniforms) * self.size, dtype=torch.long, device=device)
        self.logps = torch.zeros(len(self.tokens), device=device)
        self.counts = [0] * len(requests)

    def write(self, place_S: Tensor, token_S: Tensor, logp_S: Tensor) -> None:
        self.tokens.index_copy_(0, place_S, token_S)
        self.logps.index_copy_(0, place_S, logp_S.to(self.logps.dtype))

    def completion(self, number: int, version: int) -> Completion | SamplerError:
        written = slice(number * self.size, number * self.size + self.counts[number])
        tokens, logps = self.tokens[written].cpu().numpy(), self.logps[written].cpu().numpy()
        if logps[-1] != logps[-1]:
            return SamplerError(f"the model's logits are not finite at token {len(tokens)} of the answer")
        ending = Ending.STOP if int(tokens[-1]) in self.requests[number].params.stop_ids else Ending.LENGTH
        return Completion(tokens=token_ids(tokens), logprobs=logps.copy(), version=version, ending=ending)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Rows that are sampled alike: how, which ones (None: all), and what ends them."""

    params: SamplingParams
    rows: Tensor | None
    stops: Tensor


class _Batch:
    """The state of one `sample` call: who waits, who runs in which row, what each has written."""

    def __init__(
        self, model: LanguageModel, forward: Forward, step: Step, cache: Cache, requests: Sequence[Request]
    ) -> None:
        self.model, self.forward, self.step, self.cache, self.requests = model, forward, step, cache, requests
        self.answers = _Answers(requests, model.device)
        self.waiting = deque(_by_prompt(requests))
        self.queued = len(requests)
        self.begin = 0 if cache.prompts else max(len(r.prompt) for r in requests)
        self.column = self.begin
        self.rows: list[int] = []  # the request in each row
        self.firsts: list[int] = []  # its first column
        self.prompts: list[
            int
        ] = []  # the place of its prompt; this and the next are empty unless prompts are kept apart
        self.lengths: list[int] = []  # of those prompts
        empty = torch.zeros(0, dtype=torch.long, device=model.device)
        self.token_S = self.position_S = self.place_S = self.last_S = empty

    def run(self) -> None:
        """Until everything is written."""
        while self.waiting or self.rows:
            while self._room():
                self._admit()
            if self.rows:
                self._decode()

    def _room(self) -> bool:
        """Whether the next prompt enters now, with all its answers."""
        if not self.waiting:
            return False
        free, wanted = self.cache.slots - len(self.rows), len(self.waiting[0][1])
        enough = not self.rows or free >= min(ADMIT_SHARE * self.cache.slots, self.queued)
        return enough and free >= min(wanted, self.cache.slots)

    def _admit(self) -> None:
        """Compute waiting prompts until the rows or the budget are used up, and the first token of every answer."""
        free = self.cache.slots - len(self.rows)
        stream: list[int] = []
        entries: list[Entry] = []
        entered: list[int] = []
        while self.waiting and free >= min(len(self.waiting[0][1]), self.cache.slots):
            prompt, members = self.waiting[0]
            if stream and len(stream) + len(prompt) > PREFILL_TOKENS:
                break
            self.waiting.popleft()
            if len(members) > free:  # more answers than rows in all: the prompt is computed again for the rest
                self.waiting.appendleft((prompt, members[free:]))
                members = members[:free]
            row = len(self.rows) + len(entered)
            tokens = slice(len(stream), len(stream) + len(prompt))
            entries.append(Entry(tokens, slice(row, row + len(members)), len(self.lengths) + len(entries)))
            stream += prompt
            entered += members
            free -= len(members)
        self.queued -= len(entered)
        logits_PV = self._prefill(stream, entries)
        self._enter(entered, entries)
        counts = torch.tensor([entry.rows.stop - entry.rows.start for entry in entries], device=self.model.device)
        self._write(logits_PV.repeat_interleave(counts, 0), len(self.rows) - len(entered))

    def _prefill(self, stream: Sequence[int], entries: Sequence[Entry]) -> Tensor:
        """Logits (P, V) after each of these prompts; their keys and values go into the cache."""
        device = self.model.device
        trees = tuple(Tree(0, (entry.tokens.stop - entry.tokens.start,)) for entry in entries)
        layout = TreeLayout(trees, device, self.model.backend)
        prefill = Prefill(layout, self.cache, entries, self.column)
        hidden = self.forward.hidden(torch.tensor(stream, device=device), layout.positions_N, prefill)
        return self.forward.logits(hidden[torch.tensor([entry.tokens.stop - 1 for entry in entries], device=device)])

    def _enter(self, entered: Sequence[int], entries: Sequence[Entry]) -> None:
        """Rows for these requests, behind those that run."""
        for entry in entries:
            count = entry.rows.stop - entry.rows.start
            length = entry.tokens.stop - entry.tokens.start
            if self.cache.prompts:
                self.firsts += [self.column] * count
                self.prompts += [entry.prompt] * count
                self.lengths.append(length)
            else:
                self.firsts += [self.column - length] * count
        self.rows += entered
        begins = [number * self.answers.size for number in entered]
        lasts = [begin + self.requests[n].params.max_tokens - 1 for begin, n in zip(begins, entered, strict=True)]
        new = torch.tensor([[0] * len(entered), [len(self.requests[n].prompt) for n in entered], begins, lasts])
        state = torch.stack((self.token_S, self.position_S, self.place_S, self.last_S))
        self.token_S, self.position_S, self.place_S, self.last_S = torch.cat((state, new.to(state.device)), 1)
        self._changed()

    def _decode(self) -> None:
        """One token for every row."""
        if self.column == self.cache.columns:
            self._to_front()
        logits_SV = self.step(self.token_S, self.position_S, self.table, self.column)
        self.column += 1
        self.position_S += 1
        self.place_S += 1
        self._write(logits_SV, 0)

    def _write(self, logits_SV: Tensor, first: int) -> None:
        """Choose a token for each row from `first` on and note it; rows that end leave."""
        kinds = self.kinds if first == 0 else self._kinds(first)
        place_S = self.place_S[first:]
        uniform_S = self.answers.uniforms[place_S]
        token_S, logp_S, ended_S = self.token_S[first:], uniform_S.to(logits_SV.dtype), place_S == self.last_S[first:]
        for kind in kinds:
            rows = slice(None) if kind.rows is None else kind.rows
            token, logp = choose(logits_SV[rows], kind.params, uniform_S[rows])
            token_S[rows], logp_S[rows] = token, logp
            if len(kind.stops):
                ended_S[rows] |= (token[:, None] == kind.stops).any(-1)
        failed_S = logp_S.isnan()
        ended_S |= failed_S
        self.answers.write(place_S, token_S, logp_S)
        if ended_S.any():
            self._leave([first + row for row in ended_S.nonzero()[:, 0].tolist()])
            if failed_S.any():
                self.cache.clear_what_is_no_number()

    def _leave(self, ended: Sequence[int]) -> None:
        """These rows are done; the last rows take their places."""
        for row in ended:
            number = self.rows[row]
            self.answers.counts[number] = int(self.place_S[row]) + 1 - number * self.answers.size
        holes, movers, order = _fill(len(self.rows), ended)
        self.cache.move_rows(movers, holes, slice(self.table.first, self.column))
        self.rows, self.firsts = ([kept[row] for row in order] for kept in (self.rows, self.firsts))
        index = torch.tensor(order, dtype=torch.long, device=self.model.device)
        state = torch.stack((self.token_S, self.position_S, self.place_S, self.last_S))
        self.token_S, self.position_S, self.place_S, self.last_S = state[:, index]
        if self.cache.prompts:
            self._forget([self.prompts[row] for row in order])
        if self.rows:
            self._changed()
        else:
            self.column = self.begin

    def _forget(self, prompts: Sequence[int]) -> None:
        """Only these prompts are still read; the last ones take the places of the others."""
        ended = sorted(set(range(len(self.lengths))) - set(prompts))
        holes, movers, order = _fill(len(self.lengths), ended)
        self.cache.move_prompts(movers, holes)
        place = {prompt: at for at, prompt in enumerate(order)}
        self.prompts, self.lengths = [place[prompt] for prompt in prompts], [self.lengths[prompt] for prompt in order]

    def _to_front(self) -> None:
        """The columns are used up: what is still seen moves to the first ones."""
        seen = slice(self.table.first, self.column)
        end = max(self.begin, seen.stop - seen.start)
        self.cache.shift(len(self.rows), seen, slice(end - (seen.stop - seen.start), end))
        self.firsts = [first - (self.column - end) for first in self.firsts]
        self.column = end
        self._changed()

    def _changed(self) -> None:
        """Rows came, went or moved."""
        self.table = Rows(self.cache, self.firsts, self.prompts, self.lengths)
        self.kinds = self._kinds(0)

    def _kinds(self, first: int) -> list[_Kind]:
        """The rows from `first` on, by how they are sampled."""
        found: dict[SamplingParams, list[int]] = {}
        for row, number in enumerate(self.rows[first:]):
            found.setdefault(replace(self.requests[number].params, max_tokens=1), []).append(row)
        device = self.model.device
        return [
            _Kind(
                params=params,
                rows=None if len(found) == 1 else torch.tensor(rows, device=device),
                stops=torch.tensor(sorted(params.stop_ids), dtype=torch.long, device=device),
            )
            for params, rows in found.items()
        ]


def _cache(plan: Plan, requests: Sequence[Request], slots: int, most_bytes: int) -> Cache:
    """As large as these requests need it and memory allows, with prompts apart where that pays."""
    by_prompt = _by_prompt(requests)
    longest = max(len(prompt) for prompt, _ in by_prompt)
    answer = max(r.params.max_tokens for r in requests)
    repeated = sum(len(prompt) * (min(len(members), slots) - 1) for prompt, members in by_prompt)
    whole = any(not call.usual or (call.window is not None and call.window < longest + answer) for call in plan.calls)
    apart = repeated * slots >= SHARED_TOKENS * len(requests) and not whole
    columns, prompts = (answer, min(slots, len(by_prompt))) if apart else (longest + answer, 0)
    tokens = most_bytes // plan.token_bytes
    if slots < len(requests) or slots * columns + prompts * longest > tokens:
        columns = int((1 + MARGIN) * columns)
        per_row = columns + longest if apart else columns  # at worst every row has a prompt of its own
        slots = max(1, min(slots, tokens // per_row))
    return Cache(slots=slots, columns=columns, prompts=min(slots, prompts), prompt_columns=longest if apart else 0)


def _fill(count: int, ended: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """(places that become free among those that stay, who moves there, who then stands in each place)."""
    left, gone = count - len(ended), set(ended)
    holes = [place for place in ended if place < left]
    movers = [place for place in range(left, count) if place not in gone]
    order = list(range(left))
    for hole, mover in zip(holes, movers, strict=True):
        order[hole] = mover
    return holes, movers, order


def _by_prompt(requests: Sequence[Request]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Requests with the same prompt together, in order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(request.prompt, []).append(number)
    return list(groups.items())
