"""Sampling in several processes: the same bits as in one, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest
import torch

from tests.laws.support import tiny_model
from tests.laws.test_company import bits
from whet.config import ModelConfig
from whet.errors import SamplerError
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.sampling import forks
from whet.sampling.base import Request, SamplingParams, run, sample_all
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.forks import ForkingEngine, deal
from whet.sampling.tickets import Ticket

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> LanguageModel:
    path = getattr(request, "param", "tiny")
    return tiny_model(dtype=torch.float32) if path == "tiny" else load_model(ModelConfig(path=path))


both = pytest.mark.parametrize("model", ["tiny", "whet:demo"], indirect=True, scope="module")


def asked(model: LanguageModel, *, prompts: int = 10, samples: int = 8, most: int = 40) -> list[Request]:
    """Groups of requests; prompts of 1 to 140 tokens, ragged answers."""
    draw = random.Random(5)
    found = []
    for _ in range(prompts):
        prompt = tuple(draw.randrange(model.vocabulary) for _ in range(draw.choice((1, 2, 3, 17, 18, 60, 140))))
        for _ in range(samples):
            params = SamplingParams(max_tokens=draw.randint(1, most))
            found.append(Request(prompt=prompt, seed=len(found), params=params, samples=samples))
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    assert torch.get_num_threads() == count, "all threads are there again"
    torch.set_num_threads(before)


def children(*, ended: bool = False) -> list[int]:
    """Processes of this one that go on, or that have ended and were not asked how."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,stat=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    found = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, state, name, *_ in found if name != "ps" and state.startswith("Z") is ended]


def none_left() -> bool:
    """Whether all have ended, or are about to."""
    deadline = time.monotonic() + 60
    while children():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def alone(model: LanguageModel) -> list[tuple[bytes, bytes]]:
    with threads(1):
        return [bits(answer) for answer in run(sample_all(EmbeddedSampler(model), asked(model)))]


def forked(model: LanguageModel, processes: int = 2) -> ForkingEngine:
    engine = EmbeddedSampler(model, processes=processes).engine
    assert isinstance(engine, ForkingEngine)
    return engine


@both
@pytest.mark.parametrize(("count", "processes"), [(1, 2), (2, 3)])
def test_processes_change_no_bit(
    model: LanguageModel, alone: list[tuple[bytes, bytes]], count: int, processes: int
) -> None:
    with threads(count):
        sampler = EmbeddedSampler(model, processes=processes)
        for _ in range(2):
            assert [bits(answer) for answer in run(sample_all(sampler, asked(model)))] == alone
        assert not sampler.engine.busy
    assert none_left()


@both
def test_nor_do_two_threads(model: LanguageModel, alone: list[tuple[bytes, bytes]]) -> None:
    short = [at for at, request in enumerate(asked(model)) if request.params.max_tokens < 9]
    with threads(2):
        answers = run(sample_all(EmbeddedSampler(model), [asked(model)[at] for at in short]))
    assert [bits(answer) for answer in answers] == [alone[at] for at in short]


@both
def test_nor_do_processes_where_more_threads_do(model: LanguageModel) -> None:
    with threads(4):
        single = [bits(answer) for answer in run(sample_all(EmbeddedSampler(model), asked(model)[::7]))]
        answers = run(sample_all(EmbeddedSampler(model, processes=4), asked(model)))
    assert [bits(answer) for answer in answers[::7]] == single


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGSTOP", "half an answer"])
def test_what_a_process_owed_is_written_again(
    model: LanguageModel,
    alone: list[tuple[bytes, bytes]],
    ending: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = ForkingEngine._answer

    def once(engine: ForkingEngine, share: Sequence[Ticket], channel: Connection) -> None:
        send = channel.send

        def last(said: object) -> None:
            if ending == "half an answer":
                os.write(channel.fileno(), (1000).to_bytes(4, "big") + b"half")
                os._exit(1)
            send(said)
            os.kill(os.getpid(), signal.Signals[ending])

        monkeypatch.setattr(channel, "send", last)
        answer(engine, share, channel)

    monkeypatch.setattr(forks, "HUNG_S", 0.2)
    monkeypatch.setattr(forks, "LEAST_ROWS", 8)
    short = [at for at, request in enumerate(asked(model)) if request.params.max_tokens < 14]
    monkeypatch.setattr(ForkingEngine, "_answer", once)
    with threads(2), caplog.at_level(logging.WARNING):
        answers = run(sample_all(EmbeddedSampler(model, processes=2), [asked(model)[at] for at in short]))
    assert [bits(answer) for answer in answers] == [alone[at] for at in short]
    assert "are written again" in caplog.text and none_left()


def test_requests_are_given_up_wherever_they_are(model: LanguageModel, alone: list[tuple[bytes, bytes]]) -> None:
    engine = forked(model)
    with threads(2):
        tickets = {engine.submit(request): at for at, request in enumerate(asked(model))}
        found = {tickets.pop(ticket): bits(answer) for ticket, answer in engine.step()}
        given_up = list(tickets)[::3]
        for ticket in given_up:
            engine.cancel(ticket)
        while engine.busy:
            found |= {tickets[ticket]: bits(answer) for ticket, answer in engine.step()}
        assert set(found) == set(range(len(alone))) - {tickets[ticket] for ticket in given_up}
        assert all(found[at] == alone[at] for at in found)
        tickets = {engine.submit(request): at for at, request in enumerate(asked(model))}
        engine.step()
        for ticket in tickets:
            engine.cancel(ticket)
        assert not engine.busy and none_left()
        for request in asked(model):
            engine.submit(request)
        engine.step()
        engine.clear()
    assert not engine.busy and none_left()


def test_an_engine_that_fails_in_a_fork_fails_in_the_first_process(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(ForkingEngine, "_answer", broken)
    with threads(2):
        answers = run(sample_all(EmbeddedSampler(model, processes=2), asked(model)))
    failures = [str(answer) for answer in answers if isinstance(answer, SamplerError)]
    assert failures and all("no more memory" in failure for failure in failures)
    assert none_left()


def test_a_fork_that_cannot_be_had_is_said(
    model: LanguageModel,
    alone: list[tuple[bytes, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused() -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", refused)
    with threads(1), caplog.at_level(logging.WARNING):
        sampler = EmbeddedSampler(model, processes=2)
        assert [bits(answer) for answer in run(sample_all(sampler, asked(model)))] == alone
    assert len(caplog.records) == 1 and "fork: [Errno 12] Cannot allocate memory" in caplog.text


@pytest.mark.parametrize("at_once", [1, 7])
def test_requests_that_come_later_go_to_whoever_has_least_to_do(
    model: LanguageModel, alone: list[tuple[bytes, bytes]], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "LEAST_ROWS", 4)
    engine, order, given, found = forked(model), list(enumerate(asked(model))), 0, {}
    tickets: dict[Ticket, int] = {}
    draw = random.Random(at_once)
    draw.shuffle(order)
    with threads(1):
        while order or engine.busy:
            for _ in range(min(at_once, len(order))):
                at, request = order.pop()
                tickets[engine.submit(request)] = at
            for ticket, answer in engine.step():
                found[tickets.pop(ticket)] = bits(answer)
            given = max([given, *(fork.asked for fork in engine._forks)])
            if tickets and draw.random() < 0.1:  # given up, and asked for again
                ticket = draw.choice(list(tickets))
                engine.cancel(ticket)
                order.append((tickets.pop(ticket), ticket.request))
    assert [found[at] for at in range(len(alone))] == alone
    assert given > 20, "another process has its share"
    assert none_left()


def test_a_process_that_does_not_listen_is_given_nothing(
    model: LanguageModel, alone: list[tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "LONGEST_FRAME", 500)  # a long prompt stays where it came
    with threads(2):
        sampler = EmbeddedSampler(model, processes=2)
        assert [bits(answer) for answer in run(sample_all(sampler, asked(model)))] == alone
        engine = forked(model)
        tickets = {engine.submit(request): at for at, request in enumerate(asked(model))}
        found = {tickets[ticket]: bits(answer) for ticket, answer in engine.step()}
        long = Request(prompt=tuple(range(1000)), seed=0, params=SamplingParams(max_tokens=1))
        assert not engine._forks[0].tell(0, long)
        os.kill(engine._forks[0].pid, signal.SIGSTOP)
        more = [engine.submit(request) for request in asked(model, prompts=200)]  # more than a socket holds
        assert 0 < sum(ticket in engine._forks[0].owed.values() for ticket in more) < len(more) / 2
        os.kill(engine._forks[0].pid, signal.SIGCONT)
        for ticket in more:
            engine.cancel(ticket)
        while engine.busy:
            found |= {tickets[ticket]: bits(answer) for ticket, answer in engine.step()}
    assert [found[at] for at in range(len(alone))] == alone


def test_what_is_heard_or_read_later_stays_in_the_first_process(model: LanguageModel) -> None:
    heard: list[list[int]] = []
    params = SamplingParams(max_tokens=5)
    with threads(2):
        engine = forked(model)
        for seed in range(40):
            engine.submit(Request(prompt=(1, 2, 3), seed=seed, params=params, heard=heard.append))
        engine.step()
        assert none_left() and heard
        engine.clear()
        for seed in range(40):
            engine.submit(Request(prompt=(1, 2, 3), seed=seed, params=params, goes_on=True))
        engine.step()
        assert none_left()
        engine.clear()


def test_few_requests_are_worth_no_process(model: LanguageModel) -> None:
    engine = forked(model)
    with threads(2):
        for request in asked(model)[: 2 * forks.LEAST_ROWS - 1]:
            engine.submit(request)
        engine.step()
        assert none_left()
        engine.clear()
        single = EmbeddedSampler(model, processes=2, max_running=1).engine
        for request in asked(model):
            single.submit(request)
        single.step()
        assert none_left(), "at most so many rows, in all processes together"
        single.clear()


def test_shares_cost_about_as_much_and_keep_groups_together(model: LanguageModel) -> None:
    engine = forked(model)
    tickets = [engine.submit(request) for request in asked(model, prompts=16, most=200)]
    shares = deal([], tickets, 4)
    assert sorted(ticket.request.seed for share in shares for ticket in share) == list(range(len(tickets)))
    held = [{ticket.prompt for ticket in share} for share in shares]
    assert sum(len(prompts) for prompts in held) == len(set().union(*held)), "no prompt is computed twice"
    costs = [forks._cost(share) for share in shares]
    assert max(costs) < 1.4 * min(costs)
    same = [ticket for ticket in tickets if ticket.prompt is tickets[0].prompt]
    assert forks._cost(same) == len(tickets[0].prompt.tokens) + sum(each.request.params.max_tokens for each in same)
    one = [engine.submit(request) for request in asked(model, prompts=1, samples=64)]
    assert [len(share) for share in deal([], one, 4)] == [16] * 4
    assert len(deal(tickets, one, 2)[0]) > len(tickets) / 2


def test_a_fork_ends_with_the_first_process(model: LanguageModel) -> None:
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        engine = forked(model)
        for seed in range(64):
            engine.submit(Request(prompt=(1, 2, 3), seed=seed, params=SamplingParams(max_tokens=20_000)))
        engine.step()
        os.write(writer, b"%d\n" % engine._forks[0].pid)
        while True:
            engine.step()
    child = int(os.read(reader, 100))
    os.kill(child, 0)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.close(reader)
    os.close(writer)
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{child}"):
        assert time.monotonic() < deadline, "it goes on for nobody"
        time.sleep(0.02)


def test_a_cancelled_task_ends_its_processes(model: LanguageModel) -> None:
    async def begin() -> None:
        task = asyncio.ensure_future(sample_all(sampler, asked(model, most=200)))
        while not children():
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    with threads(2):
        sampler = EmbeddedSampler(model, processes=2)
        run(begin())
    assert none_left()


@pytest.mark.parametrize("forked_before", [False, True])
def test_one_who_stops_it_while_it_forks_finds_all_as_it_was(
    model: LanguageModel, forked_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = ForkingEngine._fork

    def stopped(engine: ForkingEngine, share: Sequence[Ticket]) -> None:
        if forked_before:
            fork(engine, share)
        raise KeyboardInterrupt

    monkeypatch.setattr(ForkingEngine, "_fork", stopped)
    engine = forked(model)
    before = engine.max_running, engine._cache_tokens
    with threads(2):
        for request in asked(model):
            engine.submit(request)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.clear()
    assert (engine.max_running, engine._cache_tokens) == before and none_left()


def test_signals_are_for_the_first_process(
    model: LanguageModel,
    alone: list[tuple[bytes, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fork, masked = os.fork, signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def at_once() -> int:
        pid = fork()
        if not pid:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
        return pid

    monkeypatch.setattr(os, "fork", at_once)
    with threads(2), caplog.at_level(logging.WARNING):
        answers = run(sample_all(EmbeddedSampler(model, processes=2), asked(model)))
    assert [bits(answer) for answer in answers] == alone and not caplog.records
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == masked


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_processes_that_die_at_once_are_tried_once(
    model: LanguageModel,
    alone: list[tuple[bytes, bytes]],
    handler: signal.Handlers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ForkingEngine, "_answer", lambda *_: os._exit(3))
    before = signal.signal(signal.SIGCHLD, handler)  # ignored: the system buries them
    with threads(1), caplog.at_level(logging.WARNING):
        sampler = EmbeddedSampler(model, processes=3)
        for _ in range(2):
            assert [bits(answer) for answer in run(sample_all(sampler, asked(model)))] == alone
    assert len(caplog.records) == 2 and none_left()
    signal.signal(signal.SIGCHLD, before)


def test_a_fork_holds_no_file_of_the_first_process_which_holds_nothing_after_it(model: LanguageModel) -> None:
    reader, writer = os.pipe()
    with threads(2):
        engine = forked(model)
        limits = engine.max_running, engine._cache_tokens
        for request in asked(model, most=20):
            engine.submit(request)
        engine.step()
        assert (engine.max_running, engine._cache_tokens) == (limits[0] // 2, limits[1] // 2)
        os.close(writer)
        assert select.select([reader], [], [], 60)[0] and not os.read(reader, 1)
        os.kill(engine._forks[0].pid, signal.SIGSTOP)
        while engine.owed:
            engine.step()
        os.kill(engine._forks[0].pid, signal.SIGCONT)
        while engine.busy:
            engine.step()
        assert engine._forward is None, "what was made of the weights is gone, whoever wrote last"
    os.close(reader)


def test_it_works_in_any_thread_and_beside_many_files(model: LanguageModel, alone: list[tuple[bytes, bytes]]) -> None:
    async def inside() -> list[tuple[bytes, bytes]]:  # `run` takes another thread where a loop is running
        return [bits(answer) for answer in run(sample_all(EmbeddedSampler(model, processes=2), asked(model)))]

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    with threads(1):
        assert asyncio.run(inside()) == alone
        engine = forked(model)
        for request in asked(model):
            engine.submit(request)
        engine.step()
        fork, given = engine._forks[0], engine._forks[0].asked
        for request in asked(model):
            engine.submit(request)
        assert fork.asked > given
        while engine.busy:
            engine.step()
    for number in files:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert none_left()


def test_a_fork_writes_nothing_that_is_given_up_and_may_be_idle(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with threads(2):
        engine = forked(model)
        for seed in range(40):
            engine.submit(Request(prompt=(seed,), seed=seed, params=SamplingParams(max_tokens=20_000)))
        engine.step()
        (fork,) = engine._forks
        for ticket in list(fork.owed.values()):
            engine.cancel(ticket)
        deadline, used = time.monotonic() + 60, -1.0
        while used != (used := forks._cpu_s(fork.pid)):
            assert time.monotonic() < deadline, "it goes on"
            time.sleep(0.3)
        monkeypatch.setattr(forks, "HUNG_S", 0.01)
        for _ in range(5):
            engine.step()
            time.sleep(0.05)
        assert engine._forks == [fork] and used > 0
        engine.clear()


def test_what_is_written_again_reads_nothing_of_a_prompt_that_is_gone(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "LEAST_ROWS", 4)

    def request(seed: int, most: int) -> Request:
        return Request(prompt=range(60), seed=seed, params=SamplingParams(max_tokens=most), samples=16)

    engine, later, found = forked(model), [request(seed, 20) for seed in range(8)], {}
    with threads(1):
        expected = [bits(answer) for answer in run(sample_all(EmbeddedSampler(model), later))]
        for seed in range(7):
            engine.submit(request(seed, 3))
        engine.step()
        tickets = {engine.submit(each): each.seed for each in later}
        engine._part()
        os.kill(engine._forks[0].pid, signal.SIGSTOP)
        while engine.owed:
            found |= {tickets[ticket]: bits(answer) for ticket, answer in engine.step() if ticket in tickets}
        assert len(found) < 8
        for seed in range(6):  # another prompt has its place
            engine.submit(Request(prompt=range(60, 120), seed=seed, params=SamplingParams(max_tokens=60), samples=16))
        monkeypatch.setattr(forks, "HUNG_S", 0.05)
        while engine.busy:
            found |= {tickets[ticket]: bits(answer) for ticket, answer in engine.step() if ticket in tickets}
    assert [found[seed] for seed in range(8)] == expected


def test_a_fork_knows_the_beginnings_of_prompts(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ForkingEngine._answer

    def checked(engine: ForkingEngine, share: Sequence[Ticket], channel: Connection) -> None:
        assert engine._prefixes.find(share[0].prompt.tokens).tokens, "known before the fork"
        answer(engine, share, channel)

    monkeypatch.setattr(ForkingEngine, "_answer", checked)
    params, turns = SamplingParams(max_tokens=3), [(seed, *range(100)) for seed in range(40)]
    first = [Request(prompt=prompt, seed=0, params=params, goes_on=True) for prompt in turns]
    last = [Request(prompt=(*prompt, 7, 7), seed=0, params=params) for prompt in turns]
    with threads(1):
        sampler = EmbeddedSampler(model, processes=2)
        run(sample_all(sampler, first))
        answers = [bits(answer) for answer in run(sample_all(sampler, last))]
        assert answers == [bits(answer) for answer in run(sample_all(EmbeddedSampler(model), last))]
    assert none_left()


def test_nothing_of_the_first_process_is_finalised_in_a_fork(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer, first = ForkingEngine._answer, os.getpid()

    class Garbage:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            if os.getpid() != first:
                os._exit(9)

    def collecting(engine: ForkingEngine, share: Sequence[Ticket], channel: Connection) -> None:
        gc.collect()
        answer(engine, share, channel)

    monkeypatch.setattr(ForkingEngine, "_answer", collecting)
    gc.disable()
    Garbage()
    with threads(1), caplog.at_level(logging.WARNING):
        run(sample_all(EmbeddedSampler(model, processes=2), asked(model)))
    gc.enable()
    assert not caplog.records


def test_what_has_ended_is_buried(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "LEAST_ROWS", 4)
    assert none_left(), "of other tests"
    sampler, before = EmbeddedSampler(model, processes=3), len(children(ended=True))
    with threads(1):
        for _ in range(4):
            run(sample_all(sampler, asked(model, prompts=2, most=4)))
            assert none_left()
            assert len(children(ended=True)) <= before + 2, "those of the last time"
