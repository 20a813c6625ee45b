"""The embedded engine on several cores: each works on a share of the requests, in a process that is forked for it.

Most of what a small model computes for a token is too little to be cut: two threads write 1.3 to 1.6 times as fast as
one, two processes nearly twice (docs/benchmarks.md). So when enough requests wait and none runs, the engine deals them
out and forks. A fork has all there is at that moment, the weights in the order in which products read them included,
and hands back nothing but answers; it ends with its share. What comes later is the first process's own.

Which process writes an answer, and how many there are, shows in no bit of it (`sampling.engine`). So what a process
owed when it died is written again by the first one.

A fork has one thread: the others are not there, and what they held stays locked. So it touches nothing but tensors, and
one that uses no CPU time counts as dead.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from whet.errors import SamplerError
from whet.models.language import LanguageModel
from whet.sampling.engine import Done, Engine
from whet.sampling.tickets import Ticket

LEAST_ROWS = 16
"""Requests that each process must have: products of fewer rows cost nearly as much."""
LOOK_S = 0.02
"""Longest wait for another process, between two looks at what else there is to do."""
BEAT_S = 1.0
"""How often a process looks whether the first one is still there to hear it."""
HUNG_S = 30.0
"""A process that has used no CPU time for so long is given up."""

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Fork:
    """A process at work, and the requests that it has not answered, by number."""

    pid: int
    heard: Connection
    owed: dict[int, Ticket]
    cpu_s: float = 0.0
    """What it had used when it was last seen to use some."""
    seen: float = field(default_factory=time.monotonic)

    def hangs(self) -> bool:
        """Whether it does nothing."""
        used = _cpu_s(self.pid)
        if used != self.cpu_s:
            self.cpu_s, self.seen = used, time.monotonic()
        return time.monotonic() - self.seen > HUNG_S

    def end(self) -> int:
        """End it, if it has not ended; its exit code."""
        self.heard.close()
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class ForkingEngine(Engine):
    """An engine that forks where enough requests wait for each of `processes` to be worth it."""

    def __init__(self, model: LanguageModel, *, max_running: int, cache_bytes: int, processes: int) -> None:
        """Rows and cache as for an engine: of all processes together."""
        self._forks: list[_Fork] = []
        self._processes, self._threads = processes, 1
        super().__init__(model, max_running=max_running, cache_bytes=cache_bytes)
        self._limits = self.max_running, self._cache_tokens

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._forks) or super().busy

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request; a process that owes no other one ends."""
        for fork in self._forks:
            for number in [number for number, owed in fork.owed.items() if owed is ticket]:
                del fork.owed[number]
                self._join()
                return
        super().cancel(ticket)

    def clear(self) -> None:
        """Forget every request."""
        for fork in self._forks:
            fork.owed.clear()
        self._join()
        super().clear()

    def step(self) -> Done:
        """As of an engine; what the other processes have written is done as well."""
        if not self._forks and not self._rows and self._queued >= LEAST_ROWS * self._processes:
            self._part()
        if super().busy:
            return [*self._told(0), *super().step()]
        done = self._told(LOOK_S)
        if not self.busy:
            self._release()
        return done

    # ----------------------------------------------------------------------------------- in the first process

    def _part(self) -> None:
        """Deal the waiting requests out, and fork; but what is heard while it is written, or read later, stays here."""
        waiting = [ticket for prompt in self._waiting for ticket in prompt.waiting]
        ours = [ticket for ticket in waiting if ticket.request.heard is not None or ticket.request.goes_on]
        given = [ticket for ticket in waiting if ticket.request.heard is None and not ticket.request.goes_on]
        if len(given) < LEAST_ROWS * self._processes:
            return
        self._reach(max(ticket.span for ticket in waiting))  # one copy of the weights for all
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.max_running, self._cache_tokens = (max(1, limit // self._processes) for limit in self._limits)
        for share in deal(ours, given, self._processes)[1:]:
            try:
                self._fork(share)
            except OSError as error:
                _log.warning("sampling goes on in fewer processes: fork: %s", error)
                self._processes = 1 + len(self._forks)
                break
        if not self._forks:
            self._alone()

    def _fork(self, share: Sequence[Ticket]) -> None:
        """Have a process write the answers to these."""
        heard, telling = Pipe(duplex=False)
        with telling, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: there are other threads
            pid = os.fork()
            if not pid:
                heard.close()
                self._live(share, telling)
        self._forks.append(_Fork(pid, heard, dict(enumerate(share))))
        for ticket in share:
            super().cancel(ticket)

    def _told(self, patience_s: float) -> Done:
        """What others have written; waits so long for the first of it."""
        done: Done = []
        told = wait([fork.heard for fork in self._forks], patience_s)
        for fork in [fork for fork in self._forks if fork.heard in told]:
            try:
                said = fork.heard.recv()
            except EOFError:
                self._again(fork, "has died")
                continue
            if isinstance(said, SamplerError):
                raise said
            done += [(fork.owed.pop(number), answer) for number, answer in said if number in fork.owed]
        self._join()
        for fork in [] if told else [fork for fork in self._forks if fork.hangs()]:
            self._again(fork, f"has done nothing for {HUNG_S:g} s")
        return done

    def _join(self) -> None:
        """End those that owe nothing."""
        for fork in [fork for fork in self._forks if not fork.owed]:
            fork.end()
            self._leave_out(fork)

    def _leave_out(self, fork: _Fork) -> None:
        """It is gone."""
        self._forks.remove(fork)
        if not self._forks:
            self._alone()

    def _alone(self) -> None:
        """All threads, rows and memory are this process's again."""
        torch.set_num_threads(self._threads)
        self.max_running, self._cache_tokens = self._limits

    def _again(self, fork: _Fork, why: str) -> None:
        """Write what it owes here."""
        said = "a sampling process %s (exit code %d); its %d requests are written again, to the same answers"
        _log.warning(said, why, fork.end(), len(fork.owed))
        for ticket in fork.owed.values():
            self._await(ticket)
        self._leave_out(fork)

    # -------------------------------------------------------------------------------------- in a fork

    def _live(self, share: Sequence[Ticket], telling: Connection) -> None:
        """Write these answers, and end."""
        gc.freeze()  # nothing of the first process is finalised here
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the first process that is asked to stop
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for fork in self._forks:
            fork.heard.close()  # else that one would not notice that the first process is gone
        self._forks = []
        try:
            self._write({ticket: number for number, ticket in enumerate(share)}, telling)
        except BrokenPipeError:
            pass  # nobody waits for it
        except BaseException as error:  # noqa: BLE001  raised in the first process
            telling.send(SamplerError(f"{type(error).__name__}: {error}"))
        finally:
            os._exit(0)

    def _write(self, numbers: Mapping[Ticket, int], telling: Connection) -> None:
        for ticket in [ticket for prompt in self._waiting for ticket in prompt.waiting if ticket not in numbers]:
            super().cancel(ticket)
        said = time.monotonic()
        while super().busy:
            done = super().step()
            if done or time.monotonic() - said > BEAT_S:
                telling.send([(numbers[ticket], answer) for ticket, answer in done])
                said = time.monotonic()


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
    return [shares[0], *(share for share in shares[1:] if share)]


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
