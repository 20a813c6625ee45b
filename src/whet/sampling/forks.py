"""The embedded engine on several cores: each works on a share of the requests, in a process that is forked for it.

Most of what a small model computes for a token is too little to be cut: two threads write 1.3 to 1.6 times as fast as
one, two processes nearly twice (docs/benchmarks.md). So where there are enough requests the engine forks and
deals out those that wait. A fork has all there is at that moment, the weights in the order in which products read them
included; all it is told are the requests that come later, and all that it tells are answers. When nothing is left to
do it ends.

Which process writes an answer, and how many there are, shows in no bit of it (`sampling.engine`). So what a process
owed when it died is written again by the first one.

A fork has one thread: the others are not there, and what they held stays locked. So it touches nothing but tensors, and
one that uses no CPU time counts as dead.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import select
import signal
import sys
import time
import warnings
from collections.abc import Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from whet.errors import SamplerError
from whet.models.language import LanguageModel
from whet.sampling.base import Queue, Request, routed
from whet.sampling.engine import Done, Engine
from whet.sampling.tickets import SharedPrompt, Ticket

LEAST_ROWS = 16
"""Requests that each process must have: products of fewer rows cost nearly as much."""
LOOK_S = 0.02
"""Longest wait for another process, between two looks at what else there is to do."""
LONGEST_FRAME = 100_000
"""Bytes of a request that is given to a process at work: what a socket takes at once that says it takes more."""
HUNG_S = 30.0
"""A process that has used no CPU time for so long is given up."""

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Fork:
    """A process at work, and the requests that it has not answered, by number."""

    number: int
    pid: int
    channel: Connection
    owed: dict[int, Ticket]
    asked: int
    """Numbers that were given out."""
    cpu_s: float = 0.0
    """What it had used when it was last seen to use some."""
    seen: float = field(default_factory=time.monotonic)

    def tell(self, number: int, request: Request | None) -> bool:
        """Give it a request, or (None) take that one back. False where it does not listen at once.

        The system says that a socket takes more when three quarters of its buffer are free: so nothing waits here.
        """
        frame, takes = pickle.dumps((number, request)), select.poll()  # `select` knows no file numbers above 1023
        takes.register(self.channel, select.POLLOUT)
        if len(frame) > LONGEST_FRAME or not takes.poll(0):
            return False
        with suppress(ConnectionError):  # that it is gone is seen where it is read
            self.channel.send_bytes(frame)
        self.seen = time.monotonic()
        return True

    def hangs(self) -> bool:
        """Whether it owes something and does nothing."""
        used = _cpu_s(self.pid)
        if used != self.cpu_s or not self.owed:
            self.cpu_s, self.seen = used, time.monotonic()
        return time.monotonic() - self.seen > HUNG_S

    def end(self) -> None:
        """End it, if it has not ended. Nobody waits for the system to take its memory back."""
        self.channel.close()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def left(self, patience: int = os.WNOHANG) -> int | None:
        """Its exit code, once the system has let go of it; with a patience of 0 that is awaited."""
        try:
            pid, status = os.waitpid(self.pid, patience)
        except ChildProcessError:  # the program that we are in ignores SIGCHLD: the code is lost
            return 255
        return os.waitstatus_to_exitcode(status) if pid else None


class ForkingEngine(Engine):
    """An engine that forks where there are enough requests for each of `processes` to be worth it."""

    number = 0

    def __init__(self, model: LanguageModel, *, max_running: int, cache_bytes: int, processes: int) -> None:
        """Rows and cache as for an engine: of all processes together."""
        self._forks: list[_Fork] = []
        self._ended: list[_Fork] = []
        self._processes, self._threads = min(processes, max_running), 1
        super().__init__(model, max_running=max_running, cache_bytes=cache_bytes)
        self._limits = self.max_running, self._cache_tokens

    @property
    def owed(self) -> Sized:
        """What this process has to do."""
        return range(len(self._rows) + self._queued)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return super().busy or any(fork.owed for fork in self._forks)

    def _await(self, ticket: Ticket) -> None:
        """Give it to the process with least to do, if that is another one and listens."""
        among: list[Queue] = [self, *self._forks] if _may_go(ticket) else [self]
        fork = routed(among, ticket.request)
        if isinstance(fork, _Fork) and fork.tell(fork.asked, ticket.request):
            fork.owed[fork.asked] = ticket
            fork.asked += 1
        else:
            super()._await(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request, wherever it is."""
        for fork in self._forks:
            for number in [number for number, owed in fork.owed.items() if owed is ticket]:
                del fork.owed[number]
                fork.tell(number, None)
        super().cancel(ticket)
        self._join()

    def clear(self) -> None:
        """Forget every request."""
        for fork in self._forks:
            fork.owed.clear()
        super().clear()
        self._join()

    def step(self) -> Done:
        """As of an engine; what the other processes have written is done as well."""
        if not self._forks and len(self._rows) + self._queued >= LEAST_ROWS * self._processes > LEAST_ROWS:
            self._part()
        done = self._told(0 if super().busy else LOOK_S) if self._forks else []
        if super().busy:
            done += super().step()
        self._join()
        return done

    # ----------------------------------------------------------------------------------- in the first process

    def _part(self) -> None:
        """Fork, and deal out the requests that wait."""
        self._ended = [fork for fork in self._ended if fork.left() is None]
        waiting = [ticket for prompt in self._waiting for ticket in prompt.waiting]
        if sum(map(_may_go, (*self._rows, *waiting))) < LEAST_ROWS * self._processes:
            return
        self._reach(max(ticket.span for ticket in (*self._rows, *waiting)))  # one copy of the weights for all
        staying = [*self._rows, *(ticket for ticket in waiting if not _may_go(ticket))]
        shares = deal(staying, [ticket for ticket in waiting if _may_go(ticket)], self._processes)
        self._threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            self.max_running, self._cache_tokens = (max(1, limit // self._processes) for limit in self._limits)
            for share in shares[1:]:
                self._fork(share)
                for ticket in share:
                    super().cancel(ticket)
        except OSError as error:
            _log.warning("sampling goes on in fewer processes: fork: %s", error)
            self._processes = 1 + len(self._forks)
        finally:
            if not self._forks:
                self._alone()

    def _fork(self, share: Sequence[Ticket]) -> None:
        """Have a process that writes the answers to these, and to what it is told.

        It gets no signal that can be held back, so the handlers of the first process never run in it; Ctrl-Z stops it.
        """
        ours, theirs = Pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGTSTP})
        try:
            with theirs, warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: there are other threads
                pid = os.fork()
                if not pid:
                    self._live(share, theirs)
            self._forks.append(_Fork(1 + len(self._forks), pid, ours, dict(enumerate(share)), len(share)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _told(self, patience_s: float) -> Done:
        """What others have written; waits so long for the first of it."""
        done: Done = []
        told = wait([fork.channel for fork in self._forks], patience_s)
        for fork in [fork for fork in self._forks if fork.channel in told]:
            try:
                said = fork.channel.recv()
            except (EOFError, OSError):  # the second: in the middle of an answer
                self._again(fork, "has died")
                continue
            if isinstance(said, SamplerError):
                raise said
            done += [(fork.owed.pop(number), answer) for number, answer in said if number in fork.owed]
        for fork in [] if told else [fork for fork in self._forks if fork.hangs()]:
            self._again(fork, f"has done nothing for {HUNG_S:g} s")
        return done

    def _again(self, fork: _Fork, why: str) -> None:
        """Write what it owes here. There is none in its place: what ended it may end the next one, too."""
        self._forks.remove(fork)
        self._processes -= 1
        said = "a sampling process %s (exit code %d); its %d requests are written again, to the same answers"
        fork.end()
        _log.warning(said, why, fork.left(0), len(fork.owed))
        for ticket in fork.owed.values():
            ticket.prompt = SharedPrompt(key=ticket.prompt.key, tokens=ticket.prompt.tokens)  # none of it is known
            super()._await(ticket)
        if not self._forks:
            self._alone()

    def _join(self) -> None:
        """When all is done the other processes end."""
        if self._forks and not self.busy:
            for fork in self._forks:
                fork.end()
            self._ended, self._forks = [*self._ended, *self._forks], []
            self._alone()
            self._release()

    def _alone(self) -> None:
        """All threads, rows and memory are this process's again."""
        torch.set_num_threads(self._threads)
        self.max_running, self._cache_tokens = self._limits

    # -------------------------------------------------------------------------------------- in a fork

    def _live(self, share: Sequence[Ticket], channel: Connection) -> None:
        """Answer until it is ended."""
        try:
            gc.freeze()  # nothing of the first process is finalised here
            _let_go(channel.fileno())
            _closed, self._forks = self._forks, []  # finalised, they would close their files once more
            bound = self._forward, self._decoding, self._widest
            self._prompts, self._waiting, self._queued = {}, {}, 0  # what is known of their beginnings stays
            self._release()
            self._forward, self._decoding, self._widest = bound
            self._answer(share, channel)
        except (EOFError, ConnectionError):
            pass  # nobody waits for it
        except BaseException as error:  # noqa: BLE001  raised in the first process
            channel.send(SamplerError(f"{type(error).__name__}: {error}"))
        finally:
            os._exit(0)

    def _answer(self, share: Sequence[Ticket], channel: Connection) -> None:
        tickets = {number: self.submit(ticket.request) for number, ticket in enumerate(share)}
        while True:
            while not super().busy or channel.poll():
                number, request = channel.recv()
                if request is not None:
                    tickets[number] = self.submit(request)
                elif number in tickets:
                    super().cancel(tickets.pop(number))
            numbers = {ticket: number for number, ticket in tickets.items()}
            if done := super().step():
                channel.send([(numbers[ticket], answer) for ticket, answer in done])
                for ticket, _ in done:
                    del tickets[numbers[ticket]]


def _let_go(kept: int) -> None:
    """Close the first process's files but this one: who waits for the end of one, waits for its last holder."""
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number != kept:
            with suppress(OSError):  # that of the list itself
                os.close(number)


def _may_go(ticket: Ticket) -> bool:
    """Whether another process may write it: not what is heard meanwhile, nor what a later prompt reads."""
    return ticket.request.heard is None and not ticket.request.goes_on


def deal(ours: Sequence[Ticket], given: Sequence[Ticket], processes: int) -> list[list[Ticket]]:
    """Shares that cost about as much, `ours` in the first one.

    Requests of one prompt are neighbours in `given`, and stay together unless they are more than a share.
    """
    most = -(-len(given) // processes)
    parts: list[list[Ticket]] = []
    for ticket in given:
        if not parts or parts[-1][0].prompt is not ticket.prompt or len(parts[-1]) == most:
            parts.append([])
        parts[-1].append(ticket)
    shares = [list(ours), *([] for _ in range(processes - 1))]
    costs = [_cost(share) for share in shares]
    for part in sorted(parts, key=_cost, reverse=True):
        least = costs.index(min(costs))
        shares[least] += part
        costs[least] += _cost(part)
    return shares


def _cost(part: Sequence[Ticket]) -> int:
    """Tokens that requests may be, one prompt counted once."""
    prompts = {ticket.prompt: len(ticket.prompt.tokens) for ticket in part}
    return sum(prompts.values()) + sum(ticket.request.params.max_tokens for ticket in part)


def _cpu_s(pid: int) -> float:
    """CPU seconds that a process has used; -1 for one that is gone."""
    try:
        used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1.0
    return (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK")


def can_fork(model: LanguageModel) -> bool:
    """Whether a fork can go on with this model: on a CPU, where the system's libraries allow it."""
    return sys.platform == "linux" and model.device.type == "cpu"
