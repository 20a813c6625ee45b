"""The embedded engine: continuous batching over the trainer's own weights, one step at a time.

Requests come (`submit`) and go (`cancel`) between steps. A step lets waiting requests in, writes one token for every
running row, and hands back what is done. A prompt is computed once for all requests that ask for it while one of them
waits or runs. What a step has to know of its rows is in tensors, so nothing in Python happens for each token, only
when a row comes or goes.

An answer is the same bits, tokens and log-probabilities, in whatever company it is written, on a CPU in float32: its
random numbers come from the request's own seed (one uniform number per token, used to invert the cumulative
distribution), its place in the cache from its own length (`sampling.kv_cache`), and the products' rows do not depend on
their number (`models.matmul.rows_alike`).

From the first request until the last one is done the engine holds a cache and, below float32, a cast of the weights.

Legend: S running rows, P prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from whet.errors import SamplerError
from whet.models.language import LanguageModel
from whet.models.matmul import padded, rows_alike
from whet.records import Completion
from whet.sampling.base import Request, SamplingParams
from whet.sampling.cuda_graph import BUCKET, Step
from whet.sampling.forward import Forward, plan
from whet.sampling.kv_cache import PROMPTS, TAILS, WHOLE, Member, Prefixes, Slab, size_class
from whet.sampling.tickets import Answers, Pens, SamplingKind, SharedPrompt, Ticket, batch_of, note, prefill_of, step_of

PREFILL_TOKENS = 1024
"""Most prompt tokens computed at once, or one prompt of any length: more do not fit the processor's caches."""
ADMIT_SHARE = 0.125
"""Waiting requests enter when at least this share of the places is free: a few prompts at once are cheaper than one."""
ADMIT_EVERY = 4
"""Requests that come one by one while others run enter together, at every fourth step."""
EARLY = 8
"""Rows leave a slab so many steps before it is full, together with one that must: a few copies instead of many."""
PREFIX_SHARE = 16
"""At most this part of the cache's bytes is for beginnings of prompts that may come again; they outlive requests."""
SHARED_TOKENS = 48
"""A prompt is kept once, apart, where that saves so many cached tokens a row; below, merging costs more."""

Done = list[tuple[Ticket, Completion | SamplerError]]


class Engine:
    """Runs requests over a model's weights as they are when the first of them starts."""

    def __init__(self, model: LanguageModel, *, max_running: int, cache_bytes: int) -> None:
        """At most so many rows side by side, and no more than whose keys and values fit; one always runs."""
        self.model, self.max_running, self.version = model, max_running, 0
        self._salt = 0  # of cached prompts: another after each hand-over
        self.plan = plan(model)
        self._recorded = self.plan.plain and model.routing is None  # a route is another one in every step
        cached = cache_bytes // self.plan.token_bytes
        self._usual = all(call.window is None and call.usual for call in self.plan.calls)
        alone = self._usual and model.device.type == "cpu" and model.routing is None
        self._prefixes = Prefixes(cached // PREFIX_SHARE if alone else 0)
        self._cache_tokens = cached - self._prefixes.most_tokens
        self.clear()

    @property
    def one_width(self) -> bool:
        """Whether rows with their prompt in front share one slab, as recorded steps want it."""
        return self.model.device.type == "cuda"

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._prompts)

    def submit(self, request: Request) -> Ticket:
        """Take a request in; it starts at a later step."""
        tokens = np.asarray(request.prompt, dtype=np.int64)
        key = (tokens.tobytes(), self._apart(len(tokens), request.samples), self._salt)
        params = SamplingKind.key(request.params)
        if params not in self._kinds:  # this may raise, and then there is no request
            self._kinds[params] = SamplingKind.of(params, self.model)
        prompt = self._prompts.setdefault(key, SharedPrompt(key=key, tokens=tokens))
        front = 0 if prompt.apart else len(tokens)
        ticket = Ticket(request=request, prompt=prompt, kind=self._kinds[params], front=front)
        prompt.waiting.append(ticket)
        self._waiting[prompt] = None
        self._queued += 1
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request, waiting or running; its place is free at once."""
        if ticket.slab is not None:
            with self._ungraded():
                self._leave([ticket])
        elif ticket in ticket.prompt.waiting:
            ticket.prompt.waiting.remove(ticket)
            self._queued -= 1
            self._forget(ticket.prompt)
        if not self.busy:
            self._release()

    def step(self) -> Done:
        """Let waiting requests in and write one token for every row. Returns those that are done."""
        if self.model.module.training:
            self.model.module.eval()
        done: Done = []
        with self._ungraded(), rows_alike():
            while self._may_enter() and (entered := self._enter()):
                done += self._begin(entered)
            if self._rows:
                done += self._decode()
        for row in self._heard:
            if row.slab is not None and row.request.heard is not None:
                row.request.heard(self._answers.written(row.line, self.steps - row.born + 1))
        if not self.busy:
            self._release()
        return done

    def _ungraded(self) -> torch.no_grad | torch.inference_mode:
        """A pass of our own needs no account of its views either; a module's might keep a tensor for training."""
        return torch.inference_mode() if self.plan.plain else torch.no_grad()

    def clear(self) -> None:
        """Forget every request, and what is known of prompts."""
        self._prefixes.clear()
        self._prompts: dict[tuple[bytes, bool, int], SharedPrompt] = {}
        self._waiting: dict[SharedPrompt, None] = {}
        self._queued = 0
        self._release()

    def _release(self) -> None:
        """Nothing waits or runs: the cache goes, and so does what was made of the weights."""
        self._forward: Forward | None = None
        self._decoding: Step | None = None
        self._slabs: dict[tuple[str, int], Slab] = {}
        self._kinds: dict[SamplingParams, SamplingKind] = {}
        self._answers = Answers(self.model.device, self.model.routing)
        self._rows: list[Ticket] = []
        self._heard: list[Ticket] = []
        self._token_S = self._position_S = torch.zeros(0, dtype=torch.long, device=self.model.device)
        self._held = self.steps = self._widest = self._until = 0
        self._switches: list[tuple[int, int]] = []
        self._changed = False

    @torch.no_grad()
    def switch(self, version: int, load: Callable[[], None]) -> None:
        """Go on under this version with the weights that `load` writes, between two steps.

        Running requests keep what they have cached, and their answers say from which token on the version is another.
        A request that starts later reads nothing that was computed before.
        """
        load()
        self.version = version
        self._prefixes.clear()
        if self._forward is None:  # nothing is cached
            return
        self._salt += 1
        self._switches.append((self.steps, version))
        self._forward = self.plan.bind(self.model, self._widest)  # some of it are copies
        self._decoding = step_of(self._forward, self.model.device, plain=self._recorded)
        waiting, self._waiting = list(self._waiting), {}
        for prompt in waiting:
            fresh = prompt.uncached(self._salt)
            self._prompts[fresh.key], self._waiting[fresh] = fresh, None
            self._forget(prompt)

    # -------------------------------------------------------------------------------- who comes in

    def _apart(self, length: int, samples: int) -> bool:
        """By the request alone, so that its bits do not depend on other requests."""
        return self._usual and length * (samples - 1) >= SHARED_TOKENS * samples

    def _may_enter(self) -> bool:
        if not self._rows or not self._queued:
            return bool(self._queued)
        free = self.max_running - len(self._rows)
        now = self._queued >= ADMIT_EVERY or self.steps % ADMIT_EVERY == 0
        return now and free >= min(ADMIT_SHARE * self.max_running, self._queued)

    def _enter(self) -> list[Ticket]:
        """Requests that become rows now, as many as there are places and memory for, their prompts computed."""
        entered: dict[SharedPrompt, list[Ticket]] = {}
        new: list[SharedPrompt] = []
        while self._waiting:
            prompt = next(iter(self._waiting))
            count = self._room(prompt, sum(len(each.tokens) for each in new))
            if not count:
                break
            if not prompt.known and prompt not in entered:
                new.append(prompt)
                self._held += prompt.cost if prompt.apart else 0
            entered.setdefault(prompt, []).extend(self._begun(prompt, count))
        self._place(entered)
        for prompt, tickets in entered.items():
            if prompt.running and not prompt.apart:
                self._repeat(prompt.running[0], tickets, len(prompt.tokens))
            prompt.running += tickets
        if new:
            self._prefill(new, entered)
        return [ticket for tickets in entered.values() for ticket in tickets]

    def _room(self, prompt: SharedPrompt, computed: int) -> int:
        """How many requests of this prompt enter now, beside prompts of so many tokens that are to be computed."""
        free = self.max_running - len(self._rows)
        wanted = min(len(prompt.waiting), self.max_running)
        if prompt.known:
            wanted = min(wanted, free)
        elif free < wanted or (computed and computed + len(prompt.tokens) > PREFILL_TOKENS):
            return 0
        if self.one_width and not prompt.apart:
            width = self._width_for(max(ticket.span for ticket in prompt.waiting))
            fitting = self._cache_tokens // width - len(self._rows)
        else:
            own = prompt.cost if prompt.apart and not prompt.known else 0
            fitting = (self._cache_tokens - self._held - own) // max(ticket.cost for ticket in prompt.waiting)
        if fitting >= wanted:
            return wanted
        return 0 if self._rows else max(1, fitting)

    def _begun(self, prompt: SharedPrompt, count: int) -> list[Ticket]:
        """The next requests of a prompt, each with a line for its answer."""
        tickets = [prompt.waiting.popleft() for _ in range(count)]
        if not prompt.waiting:
            del self._waiting[prompt]
        self._queued -= count
        self._reach(max(ticket.span for ticket in tickets))
        for ticket in tickets:
            ticket.line, ticket.born = self._answers.begin(ticket.request), self.steps
            ticket.version, ticket.switches = self.version, len(self._switches)
            self._held += ticket.cost
        self._rows += tickets
        self._changed = True
        return tickets

    def _place(self, entered: Mapping[SharedPrompt, Sequence[Ticket]]) -> None:
        """Places for these rows and for prompts that are kept apart, in each slab for all of them at once."""
        members: dict[Slab, list[Member]] = {}
        for prompt, tickets in entered.items():
            first = tickets[0]
            members.setdefault(self._slab(first.role, first.front + 1), []).extend(tickets)
            if prompt.apart and not prompt.known:
                members.setdefault(self._slab(PROMPTS, len(prompt.tokens)), []).append(prompt)
        for slab, new in members.items():
            slab.add(new)

    def _repeat(self, source: Ticket, rows: Sequence[Ticket], length: int) -> None:
        """These rows begin with the prompt of one that runs."""
        first = rows[0]
        assert source.slab is not None and first.slab is not None
        for layer in range(len(self.plan.shapes)):
            first.slab.fill(layer, first.place, len(rows), *source.slab.read(layer, source.place, length))

    def _reach(self, positions: int) -> None:
        """Be ready for so many positions: weights as they are now, angles, on a GPU slabs of one width."""
        if positions > self._widest:
            self._prefixes.expect([p._version for p in self.model.module.parameters()])
            self._widest, self._until = self._width_for(positions), 0
            self._forward = self.plan.bind(self.model, self._widest, self._forward)
            self._decoding = step_of(self._forward, self.model.device, plain=self._recorded)

    def _width_for(self, positions: int) -> int:
        return self._widest if positions <= self._widest else -(-max(positions, 2 * self._widest) // BUCKET) * BUCKET

    def _slab(self, role: str, tokens: int) -> Slab:
        """The slab for members of so many tokens."""
        fixed = self._least(role)
        width = fixed or size_class(tokens)
        if (role, width) not in self._slabs:
            capacity = min(self.max_running, self._cache_tokens // width) if fixed else None
            self._slabs[role, width] = Slab(width, self.plan.shapes, self.model.device, capacity=capacity)
        return self._slabs[role, width]

    def _prefill(self, prompts: Sequence[SharedPrompt], rows: Mapping[SharedPrompt, Sequence[Ticket]]) -> None:
        """The hidden state after each of these prompts; their keys and values go into the cache."""
        assert self._forward is not None
        known = [self._prefixes.find(prompt.tokens) for prompt in prompts]
        stream_N, positions_N, layout = prefill_of(prompts, rows, known, self.model)
        last_P = torch.tensor([entry.tokens.stop - 1 for entry in layout.entries], device=self.model.device)
        after_PD = self._forward.hidden(padded(stream_N), padded(positions_N), layout, padded(last_P))
        note(prompts, rows, after_PD, layout, self._prefixes)

    # ------------------------------------------------------------------------------ one token for all

    def _begin(self, entered: Sequence[Ticket]) -> Done:
        """The first token of these rows."""
        assert self._forward is not None
        after_PD = torch.stack([t.prompt.hidden_D for t in entered if t.prompt.hidden_D is not None])
        logits_PV = self._forward.logits(padded(after_PD))[: len(entered)]
        self._answers.read([(ticket.line, ticket.prompt.marks) for ticket in entered])
        _, ended = self._pens_of(entered, written=0).write(logits_PV)
        return self._finish([entered[row] for row in ended])

    def _decode(self) -> Done:
        """One more token for every row."""
        assert self._decoding is not None
        if self._changed or not self._until:
            self._arrange()
        else:
            self._batch.advance()
            self._position_S += 1
        self._answers.route(self._pens.line_S)
        logits_SV = self._decoding(self._token_S, self._position_S, self._batch)
        self.steps += 1
        self._until -= 1
        self._token_S, ended = self._pens.write(logits_SV)
        return self._finish([self._rows[row] for row in ended])

    def _arrange(self) -> None:
        """Rows came, went or filled their slabs: bring everything that a step knows of them up to date."""
        if not self._until:
            self._widen()
        if sum(slab.held for slab in self._slabs.values()) > self._cache_tokens:
            for slab in self._slabs.values():
                slab.trim()
        whole, tails, prompts = (
            [slab for (role, _), slab in sorted(self._slabs.items()) if role == wanted and slab.members]
            for wanted in (WHOLE, TAILS, PROMPTS)
        )
        self._rows = [row for slab in (*whole, *tails) for row in slab.members if isinstance(row, Ticket)]
        self._heard = [row for row in self._rows if row.request.heard is not None]
        for slab in (*whole, *tails):
            slab.arrange([self._column(row) for row in slab.members if isinstance(row, Ticket)])
        longest = 1 + max(len(row.prompt.tokens) + self.steps - row.born for row in self._rows)
        self._batch = batch_of(whole, tails, prompts, longest, self.model.device)
        self._until = min(row.slab.width - self._column(row) for row in self._rows if row.slab is not None)
        self._pens = self._pens_of(self._rows, written=1)
        self._token_S = self._pens.token_S
        positions = [len(row.prompt.tokens) + self.steps - row.born for row in self._rows]
        self._position_S = torch.tensor(positions, device=self.model.device)
        self._changed = False

    def _widen(self) -> None:
        """Rows that have filled their slab go on in a wider one."""
        moves: dict[tuple[Slab, Slab], list[Ticket]] = {}
        for slab in list(self._slabs.values()):
            rows = [row for row in slab.members if isinstance(row, Ticket)]
            columns = [self._column(row) for row in rows]
            if not rows or max(columns) < slab.width >= self._least(rows[0].role):
                continue
            for row, column in zip(rows, columns, strict=True):
                wider = self._slab(row.role, column + 1 + EARLY)
                if wider.width > slab.width:
                    moves.setdefault((slab, wider), []).append(row)
        for (_, wider), rows in moves.items():
            wider.take(rows)

    def _least(self, role: str) -> int:
        """The least width of slabs of this role: on a GPU, rows with their prompt in front have one."""
        return self._widest if self.one_width and role == WHOLE else 0

    def _finish(self, ended: Sequence[Ticket]) -> Done:
        """These rows are done."""
        if not ended:
            return []
        done: Done = []
        for row in ended:
            count, later = self.steps - row.born + 1, row.later(self._switches)
            done.append((row, self._answers.completion(row.line, count, row.request, row.version, later)))
        self._leave(ended)
        if any(isinstance(answer, SamplerError) for _, answer in done):
            for slab in self._slabs.values():
                slab.zero_nonfinite()
        return done

    def _leave(self, rows: Sequence[Ticket]) -> None:
        """These rows give their places back."""
        for slab in {row.slab for row in rows}:
            assert slab is not None
            slab.remove([row for row in rows if row.slab is slab])
        for row in rows:
            row.slab = None
            row.prompt.running.remove(row)
            self._answers.end(row.line)
            self._held -= row.cost
            self._forget(row.prompt)
        self._rows = [row for row in self._rows if row.slab is not None]
        self._changed = True

    def _forget(self, prompt: SharedPrompt) -> None:
        """A prompt without waiting or running requests."""
        if not prompt.waiting:
            self._waiting.pop(prompt, None)
        if prompt.waiting or prompt.running:
            return
        del self._prompts[prompt.key]
        if prompt.slab is not None:
            prompt.slab.remove([prompt])
            self._held -= prompt.cost

    def _pens_of(self, rows: Sequence[Ticket], *, written: int) -> Pens:
        lines = [(row.line, self.steps - row.born + written, row.request.params.max_tokens) for row in rows]
        return Pens(self._answers, lines, [row.kind for row in rows])

    def _column(self, row: Ticket) -> int:
        """Where its next token goes in its slab."""
        return row.front + self.steps - row.born
