"""Laws of sampler processes: the same bits as in this process, whoever dies; no weights but those that were sent."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.laws.support import SHAPE, answers_of, tiny_model
from tests.test_rollouts import TEMPLATE, Lengths, player, task
from whet.algorithms.policy import policy_gradient
from whet.algorithms.state import Setting
from whet.config import MachineConfig, ModelConfig, PolicyConfig, TrainConfig
from whet.config.lag import LagConfig
from whet.envs.base import SingleTurn
from whet.errors import SamplersLost
from whet.models.matmul import library
from whet.records import Completion
from whet.rollouts.ledger import AheadFeed
from whet.sampling.base import Request, SamplingParams, run
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.engine import Engine
from whet.sampling.fleet import Fleet, Held
from whet.sampling.process import STEADY_VERSIONS, LostReplica, Replica, ReplicaState
from whet.sampling.weight_sync import Probe, weights_digest
from whet.training.engine import LocalTrainer

PARAMS = SamplingParams(max_tokens=20)


def requests(count: int = 12, **more: int) -> list[Request]:
    prompts = [range(3, 9 + n % 4) for n in range(count)]
    return [Request(prompt=tuple(p), seed=n, params=PARAMS, samples=3, **more) for n, p in enumerate(prompts)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two replicas that keep two past versions, for all of these laws: they start once."""
    machine = MachineConfig.model_validate({"samplers": {"replicas": 2}, "restarts": {"sampler": 100_000}})
    options = {
        "model": ModelConfig(path="whet:tiny", create=SHAPE).model_dump(mode="json"), "lora": None, "quantised": False,
        "max_running": 8, "cache_gib": 1.0, "threads": torch.get_num_threads(), "products": library(),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("fleet") / "weights"
    with closing(Fleet(tiny_model(dtype=torch.float32), machine, options, folder, past=2)) as made:
        yield made


def healthy(fleet: Fleet, version: int | None = None) -> bool:
    """Wait until all replicas are well, and have these weights."""
    return wait_until(lambda: all(
        each.health is ReplicaState.HEALTHY and version in (None, each.version) for each in fleet.replicas
    ))  # fmt: skip


def in_process(fleet: Fleet, **more: int) -> list[Completion]:
    sampler = EmbeddedSampler(fleet.model)
    sampler.publish(fleet.version)
    return answers_of(sampler, requests(**more))


def move(fleet: Fleet, by: float = 0.02) -> None:
    """The trainer's weights change."""
    with torch.no_grad():
        for p in fleet.model.parameters.values():
            p.add_(by * torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view_as(p))


def test_other_processes_write_the_same_bits_under_each_version(fleet: Fleet) -> None:
    fleet.publish(0)
    first = in_process(fleet)
    assert answers_of(fleet, requests()) == first
    assert 0 < fleet.gaps[0] < 1e-5, "measured at the same version"
    move(fleet)
    fleet.publish(1)
    second = in_process(fleet)
    assert second != first
    assert answers_of(fleet, requests()) == second
    assert answers_of(fleet, requests(version=0)) == first, "a past version, on purpose"
    assert {each.version for each in answers_of(fleet, requests(version=0))} == {0}
    for version in (2, 3):
        fleet.publish(version)
    (refused,) = answers_of(fleet, requests(1, version=0))
    assert str(refused) == "weights of version 0 are not kept; there are [1, 2, 3]"


def test_requests_of_one_version_are_spread_over_all_samplers(fleet: Fleet) -> None:
    move(fleet)
    fleet.publish(4)
    assert healthy(fleet)
    before = [each._count for each in fleet.replicas]
    assert answers_of(fleet, requests(24, version=4)) == in_process(fleet, count=24)
    assert min(each._count - was for each, was in zip(fleet.replicas, before, strict=True)) >= 5
    assert healthy(fleet, 4)


def test_a_sampler_that_is_killed_changes_no_bit_and_comes_back_with_the_weights(fleet: Fleet) -> None:
    fleet.publish(4)
    expected = in_process(fleet, count=60)

    async def play() -> list[Completion]:
        asked = [asyncio.ensure_future(fleet.sample(request)) for request in requests(60)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        victim = max(fleet.replicas, key=lambda each: len(each.owed))
        assert victim.owed, "in the middle of its work"
        os.kill(victim.pid, signal.SIGKILL)
        return await asyncio.gather(*asked)

    before = deaths(fleet)
    assert run(play()) == expected
    assert deaths(fleet) == before + 1
    assert healthy(fleet, 4)


def deaths(fleet: Fleet) -> int:
    return sum(100_000 - each.restarts for each in fleet.replicas)


def wait_until(holds: Callable[[], bool], within_s: float = 120) -> bool:
    give_up = time.monotonic() + within_s
    while not holds() and time.monotonic() < give_up:
        time.sleep(0.02)
    return holds()


def test_weights_that_are_not_those_that_were_sent_are_refused_before_they_are_used(fleet: Fleet) -> None:
    """A damaged file costs the samplers that read it; with the right one they come back."""
    said: list[str] = []
    fleet._say = said.append
    move(fleet)
    fleet.publish(5)
    path = fleet._held[5].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    asked = [fleet._thread.begin(fleet._sample(request)) for request in requests()]
    assert wait_until(lambda: bool(said))
    assert f"{path}: the digest of the weights is not that of those that were handed over" in said[0]
    assert not any(each.done() for each in asked)
    path.write_bytes(whole)
    assert [each.result(120) for each in asked] == in_process(fleet)


def test_a_sampler_that_hangs_is_named_with_what_it_owes_and_its_work_is_done_by_another(fleet: Fleet) -> None:
    said: list[str] = []
    patient, fleet._patience = fleet._patience, fleet._patience.model_copy(update={"request_s": 6.0})
    assert healthy(fleet)
    for each in fleet.replicas:  # their next processes are listened to with this patience
        os.kill(each.pid, signal.SIGKILL)
    before = deaths(fleet)
    assert wait_until(lambda: deaths(fleet) == before + 2) and healthy(fleet)
    fleet._say = said.append
    os.kill(fleet.replicas[0].pid, signal.SIGSTOP)
    assert answers_of(fleet, requests()) == in_process(fleet)
    first = next(line for line in said if line.startswith("sampler 0 "))
    assert first.startswith("sampler 0 died: owes ") and "answers and was silent for 6 s" in first
    fleet._patience = patient


def test_no_cached_token_crosses_a_hand_over_and_answers_say_who_wrote_which_token() -> None:
    """A hand-over in the middle: what begins afterwards is written as if nothing had run before."""
    for shared in (1, 60):  # a prompt in front of each answer; one that is kept once, apart
        model, other = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32, seed=5)
        old, new = ({k: p.detach().clone() for k, p in m.parameters.items()} for m in (model, other))
        asked = [
            Request(
                prompt=tuple(range(3, 13 + shared)), seed=n, params=SamplingParams(max_tokens=10 + n % 3), samples=8
            )
            for n in range(8)
        ]
        engine = Engine(model, max_running=4, cache_bytes=2**24)
        before, after = _written(engine, asked), _written(Engine(other, max_running=4, cache_bytes=2**24), asked)
        for at in (1, 5):
            engine.version = 0
            mixed = _written(engine, asked, at, partial(_set, model.parameters, new))
            for one, theirs, ours in zip(mixed, before, after, strict=True):
                changed = one.later[0][0] if one.later else len(one.tokens)
                assert one.versions.tolist() == (
                    [1] * len(one.tokens) if one.version else [0] * changed + [1] * (len(one.tokens) - changed)
                )
                assert (one.tokens[:changed] == (ours if one.version else theirs).tokens[:changed]).all()
                if one.version:
                    assert (one.logprobs == ours.logprobs).all()
                elif one.later:
                    assert (one.logprobs[changed:] != theirs.logprobs[changed:]).any()
            assert {one.version for one in mixed} == {0, 1}
            assert any(one.later for one in mixed)
            _set(model.parameters, old)


def _set(parameters: dict, values: dict) -> None:
    for name, p in parameters.items():
        p.data.copy_(values[name])


def _written(
    engine: Engine, asked: list[Request], at: int = -1, load: Callable[[], None] | None = None
) -> list[Completion]:
    tickets, done, step = [engine.submit(each) for each in asked], {}, 0
    while engine.busy:
        if step == at and load is not None:
            engine.switch(1, load)
        done |= dict(engine.step())
        step += 1
    return [done[ticket] for ticket in tickets]  # type: ignore[misc]


# ------------------------------------------------------------------------------------- exact, end to end


class Delayed:
    """The fleet, with random waits before and after each request; it may kill a sampler on the way."""

    def __init__(self, fleet: Fleet, seed: int, kill_at: int = -1) -> None:
        self.fleet, self.draw, self.kill_at, self.count = fleet, random.Random(seed), kill_at, 0

    version = property(lambda self: self.fleet.version)
    gaps = property(lambda self: self.fleet.gaps)

    async def sample(self, request: Request) -> Completion:
        await asyncio.sleep(0.05 * self.draw.random() ** 3)
        self.count += 1
        if self.count == self.kill_at:
            victim = next(each for each in self.fleet.replicas if each.pid)
            os.kill(victim.pid, signal.SIGKILL)
        written = await self.fleet.sample(request)
        await asyncio.sleep(0.05 * self.draw.random() ** 3)
        return written


def learned(fleet: Fleet, latency: int, kill_at: int = -1) -> tuple[str, list[float]]:
    """Five steps of RL at lag 2 from the same weights; the digest of the weights, and the reward of each step."""
    model = tiny_model(dtype=torch.float32)
    fleet.model, fleet._own, fleet._held, fleet.version = model, EmbeddedSampler(model, max_running=1), {}, -1
    fleet.gaps.clear()
    sampler = Delayed(fleet, latency, kill_at)
    trainer = LocalTrainer(model, TrainConfig(lr=3e-3, steps=5))
    policy = PolicyConfig.model_validate({"preset": "decoupled_ppo", "minibatches": 2})
    setting = Setting(
        config=policy, train=trainer.config, steps=5, prompts_per_step=3, temperature=1.0, max_tokens=12, max_gap=0.01,
        weights={"reward": 1.0}, lag=2,
    )  # fmt: skip
    made = player(
        environment=SingleTurn, sampler=sampler, rubric=Lengths(), max_length=128,
        params=SamplingParams(max_tokens=12, stop_ids=TEMPLATE.stop_ids),
    )  # fmt: skip
    feed = AheadFeed(
        player=made, tasks=[task(f"t{n}", f"Q{n}") for n in range(9)], samples=3, steps=5, seed=3, sampler=sampler,  # type: ignore[arg-type]
        hand_over=fleet.publish, lag=LagConfig(steps=2, order="exact"), prompts_per_step=3, progress_s=60.0,
    )  # fmt: skip
    with closing(feed):
        steps = list(policy_gradient(trainer, feed, setting))
    assert [step.metrics["lag/max"] for step in steps] == [0, 1, 2, 2, 2]
    assert all(step.metrics["sampling/engine_gap"] < 1e-5 for step in steps)
    assert any(step.metrics["lag/kl/2"] > 1e-6 for step in steps[2:]), "older weights are other weights"
    return weights_digest(model.parameters), [step.metrics["reward"] for step in steps]


def test_exact_the_same_weights_under_any_latencies_and_with_a_killed_sampler(fleet: Fleet) -> None:
    first = learned(fleet, 1)
    assert learned(fleet, 2) == first
    assert learned(fleet, 3) == first
    before = deaths(fleet)
    assert learned(fleet, 4, kill_at=20) == first
    assert deaths(fleet) > before


def test_a_long_stretch_without_a_death_gives_all_restarts_back() -> None:
    replica = Replica(0, 3)

    def dies_after(versions: int, first: int = 7) -> int:
        for version in range(first, first + versions + 1):
            replica.confirm(version)
        replica.bury("")
        return replica.restarts

    assert dies_after(1) == 2
    assert dies_after(STEADY_VERSIONS - 1, first=40) == 1, "counted from the first version of this process"
    assert [dies_after(STEADY_VERSIONS), dies_after(1)] == [2, 1]
    replica.confirm(90)
    replica.confirm(90 + STEADY_VERSIONS)
    replica.confirm(90 + STEADY_VERSIONS + 1)
    assert [dies_after(0, 111), dies_after(0), dies_after(0)] == [2, 1, 0]
    assert not replica.gone and dies_after(0) == 0 and replica.gone


def test_a_process_that_died_under_new_weights_leaves_its_obituary_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, replica, (asked,) = Fleet.__new__(Fleet), Replica(0, 5), requests(1)
    fleet._held = {3: Held(path=Path("none"), digest="", probe=Probe(request=asked, tokens=[], logps=[]))}
    fleet._patience, fleet._change = MachineConfig().deadlines, asyncio.Event()

    async def dies(*_: object) -> None:
        replica.bury("")
        replica.be(ReplicaState.RESTARTING)
        replica.obituary = ""  # of the next one, as `_live` begins it
        raise LostReplica("sampler 0: its process ended")

    monkeypatch.setattr(replica, "load", dies)
    asyncio.run(fleet._renew(replica, 3))
    assert "died" not in replica.describe() and "ended" not in replica.describe()


def test_when_no_sampler_is_left_the_error_says_of_each_what_became_of_it(fleet: Fleet) -> None:
    fleet.publish(4)
    assert healthy(fleet)  # each has a process
    for each in fleet.replicas:
        each.restarts = 0
        os.kill(each.pid, signal.SIGKILL)
    with pytest.raises(
        SamplersLost, match=r"no sampler is left: sampler 0 .* is dead .*its process ended.*; sampler 1 "
    ):
        run(fleet.sample(requests(1)[0]))


def test_who_waits_for_older_requests_waits_for_no_sampler() -> None:
    """Its deadline begins when it is its turn: the older one gives up first, though it came later."""

    async def story() -> None:
        (waiting,) = requests(1)
        held = Held(path=Path("none"), digest="", probe=Probe(request=waiting, tokens=[], logps=[]))
        fleet = Fleet.__new__(Fleet)
        fleet.version, fleet._past, fleet._held, fleet._wanted = 3, 1, {2: held, 3: held}, Counter()
        patience = {"request_s": 0.2, "start_s": 0.2}
        fleet._patience, fleet._change = (
            MachineConfig.model_validate({"deadlines": patience}).deadlines,
            asyncio.Event(),
        )
        fleet.replicas = [Replica(0, 5)]
        newer = asyncio.create_task(fleet._choose(replace(waiting, version=3)))
        await asyncio.sleep(0.1)
        older = asyncio.create_task(fleet._choose(replace(waiting, version=2)))
        await asyncio.wait([older])
        assert isinstance(older.exception(), SamplersLost) and not newer.done()
        with pytest.raises(SamplersLost, match="a request waits for a sampler since"):
            await newer

    asyncio.run(story())


def test_who_waits_for_the_newest_weights_takes_those_that_come_meanwhile() -> None:
    """Of replicas that take each version at once, older ones are not kept; and who gives up lets others look."""

    async def story() -> None:
        (waiting,) = requests(1)
        held = Held(path=Path("none"), digest="", probe=Probe(request=waiting, tokens=[], logps=[]))
        fleet = Fleet.__new__(Fleet)
        fleet.version, fleet._past, fleet._held, fleet._wanted = 3, None, {3: held}, Counter()
        fleet._patience, fleet._change = MachineConfig().deadlines, asyncio.Event()
        fleet.replicas = [Replica(0, 5)]
        wait = asyncio.create_task(fleet._choose(waiting))
        await asyncio.sleep(0)
        assert fleet._wanted == {3: 1}
        await fleet._adopt(4, held)
        fleet.replicas[0].be(ReplicaState.HEALTHY)
        fleet._changed()
        assert await asyncio.wait_for(wait, 5.0) is fleet.replicas[0]
        assert not fleet._wanted
        fleet.replicas[0].be(ReplicaState.STALE)
        asked = asyncio.create_task(fleet._sample(waiting))
        await asyncio.sleep(0)
        change = fleet._change
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert change.is_set()

    asyncio.run(story())
