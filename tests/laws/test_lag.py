"""Laws of the lag: what is sampled ahead is trained once, no later than its bound, whatever the latencies are."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.laws.nursery import Nursery
from tests.laws.test_resume import MODEL, contents
from tests.test_rollouts import TEMPLATE, Lengths, player, task
from whet.config import PolicyConfig
from whet.config.lag import LagConfig
from whet.config.loading import load_recipe
from whet.envs.base import SingleTurn
from whet.errors import ConfigError, RunError, SamplerError, SamplersLost, TrainingError
from whet.records import Completion, Ending, Group
from whet.rollouts.feed import Feed, Taken
from whet.rollouts.ledger import AheadFeed
from whet.sampling.base import Request

P, G = 4, 2
"""Groups of a step, answers of a group."""
FEED = ("player", "tasks", "samples", "steps", "seed", "hand_over")


@dataclass
class Latent:
    """A sampler apart, in this process: answers take as long as `latency` says, and may live over a hand-over."""

    latency: Callable[[Request], float] = lambda _: 0.0
    version: int = -1
    gaps: dict[int, float] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    begun: threading.Condition = field(default_factory=threading.Condition)
    fails: set[int] = field(default_factory=set)
    """Seeds of requests that are lost once."""

    async def sample(self, request: Request) -> Completion:
        with self.begun:
            self.seen.append(request)
            self.begun.notify_all()
        first = self.version if request.version is None else request.version
        await asyncio.sleep(self.latency(request))
        if request.seed in self.fails:
            self.fails.remove(request.seed)
            raise SamplerError("its sampler died")
        text = [*TEMPLATE._encoder.one(str(request.seed % 1000)), *TEMPLATE.stop_ids]
        later = () if request.version is not None or self.version == first else ((1, self.version),)
        return Completion(tokens=text, logprobs=[-1.0] * len(text), version=first, ending=Ending.STOP, later=later)

    def publish(self, version: int) -> None:
        self.version = version

    def describe(self) -> str:
        return "sampler 0 (process 17) is healthy since 3 s and owes 8 answers"

    def save(self, folder: Path) -> None:
        (folder / "versions.json").write_text("{}")

    def load(self, folder: Path) -> None:
        assert (folder / "versions.json").exists()

    def close(self) -> None:
        pass


def ahead(sampler: Latent, order: str = "strict", lag: int = 1, *, steps: int = 20, **more: object) -> AheadFeed:
    """A feed of 24 tasks over this sampler; `window` is half of what is admitted."""
    config = LagConfig(steps=lag, order=order, window=0.5)  # type: ignore[arg-type]
    given = {"progress_s": 30.0, "lag": config, "prompts_per_step": P, "sampler": sampler, **more}
    return AheadFeed(
        player=player(environment=SingleTurn, sampler=sampler, rubric=Lengths()),
        tasks=[task(f"t{number}", f"Question {number}") for number in range(24)],
        samples=G, steps=steps, seed=3, hand_over=sampler.publish, **given,
    )  # fmt: skip


def jittery(seed: int, longest: float = 0.02) -> Callable[[Request], float]:
    """A latency that differs from request to request, in order of arrival; some take much longer than others."""
    draw = random.Random(seed)
    return lambda _: longest * draw.random() ** 4


def lags(taken: Taken, step: int) -> list[int]:
    """How many hand-overs old the oldest token of each group is."""
    return [step - min(t.completion.version for e in group.episodes for t in e.turns) for group in taken.played]


def steps_of(feed: AheadFeed, start: int = 0, until: int = 20) -> Iterator[tuple[int, Taken]]:
    """Takes and hand-overs as an algorithm makes them."""
    feed.publish(start)
    for step in range(start, until):
        taken = feed.take(P, step=step)
        feed.publish(step + 1)
        yield step, taken


def seeds(groups: Sequence[Group]) -> list[int]:
    return [episode.seed for group in groups for episode in group.episodes]


# ------------------------------------------------------------------------------------------ the ledger


@pytest.mark.parametrize("order", ["exact", "strict", "window"])
@pytest.mark.parametrize("lag", [1, 2])
def test_every_position_is_trained_once_and_no_later_than_its_bound(order: str, lag: int) -> None:
    sampler = Latent(jittery(lag))
    trained: list[int] = []
    oldest = 0
    with closing(ahead(sampler, order, lag)) as feed:
        bound = feed.lag.bound(P)
        assert bound == (lag if order != "window" else {1: 2, 2: 4}[lag])
        for step, taken in steps_of(feed):
            trained += seeds(taken.played)
            oldest = max(oldest, *lags(taken, step))
            assert feed.admitted <= min(20, step + 2 + lag) * P
    assert lag <= oldest <= bound
    assert len(trained) == len(set(trained)) == 20 * P * G
    assert sorted(trained) == sorted(seeds_at_lag_0(20)), "the same positions as without a lag, and no others"
    assert len(sampler.seen) == 20 * P * G, "and none was sampled twice, or in vain"


def seeds_at_lag_0(steps: int) -> list[int]:
    from whet.rollouts.feed import Feed

    sampler = Latent()
    with closing(ahead(sampler)) as made:
        names = ("player", "tasks", "samples", "steps", "seed", "hand_over")
        plain = Feed(**{name: getattr(made, name) for name in names})
    plain.publish(0)
    return seeds([group for step in range(steps) for group in plain.take(P, step=step).groups])


def test_a_window_takes_what_is_there_and_never_leaves_a_slow_group_behind() -> None:
    """The first group of all is slow: strict waits for it, a window goes on without it as long as its bound allows."""
    first = seeds_at_lag_0(1)[0]
    for order, earliest in (("strict", 0), ("window", 1)):
        sampler = Latent(lambda request: 0.3 if request.seed == sampler.seen[0].seed else 0.0)  # noqa: B023
        with closing(ahead(sampler, order, 2)) as feed:
            when = [step for step, taken in steps_of(feed) if first in seeds(taken.played)]
            assert when == [earliest]


def test_exact_samples_each_position_at_the_version_by_which_it_was_admitted() -> None:
    with closing(ahead(Latent(jittery(5)), "exact", 2)) as feed:
        for step, taken in steps_of(feed):
            assert lags(taken, step) == [min(step, 2)] * P
            assert [seeds([group])[0] for group in taken.groups] == seeds_at_lag_0(20)[
                step * P * G : (step + 1) * P * G : G
            ]


def test_sampling_of_the_next_step_begins_before_training_of_this_one_ends() -> None:
    """While a step trains (between its `take` and its `publish`) requests of the next one are at work."""
    sampler = Latent(jittery(1))
    with closing(ahead(sampler)) as feed:
        feed.publish(0)
        for step in range(6):
            feed.take(P, step=step)
            # what this step's publish admits is of step + 2; that of step + 1 must have begun by now
            with sampler.begun:
                assert sampler.begun.wait_for(lambda step=step: len(sampler.seen) >= (step + 2) * P * G, 20)
                assert len(sampler.seen) == (step + 2) * P * G
            feed.publish(step + 1)


def test_what_the_machinery_lost_is_asked_again_with_the_same_seeds() -> None:
    sampler = Latent()
    with closing(ahead(sampler)) as feed:
        feed.publish(0)
        expected = feed.take(P, step=0).groups
    lost = Latent(fails=set(_request_seeds(sampler)[:3]))
    with closing(ahead(lost)) as feed:
        feed.publish(0)
        assert feed.take(P, step=0).groups == expected
    assert not lost.fails and set(_request_seeds(lost)) == set(_request_seeds(sampler))


def _request_seeds(sampler: Latent) -> list[int]:
    return [request.seed for request in sampler.seen]


def test_a_silent_sampler_is_named_within_its_deadline() -> None:
    with closing(ahead(Latent(lambda _: 1000.0), progress_s=0.2)) as feed:
        feed.publish(0)
        with pytest.raises(
            SamplersLost,
            match=r"step 1: no group was finished for 0.2 s .*8 are awaited: position 0, "
            r"admitted at version 0, in flight since .* from sampler 0 \(process 17\) .*owes 8 answers",
        ):
            feed.take(P, step=0)


def test_a_step_that_fails_takes_nothing() -> None:
    """Its groups are still to be had, by a run that goes on from the checkpoint that is written then."""
    sampler = Latent(lambda request: 1000.0 if len(sampler.seen) > 3 * P * G else 0.0)
    with closing(ahead(sampler, progress_s=0.2)) as feed:
        feed.publish(0)
        feed.take(P, step=0)
        feed.publish(1)
        state = feed.state
        with pytest.raises(SamplersLost):
            feed.take(3 * P, step=1)
        assert (feed.trained, state["trained"], state["admitted"]) == (P, float(P), 3.0 * P)


@pytest.mark.parametrize("order", ["exact", "strict"])
def test_a_resumed_ledger_goes_on_with_what_was_buffered_and_plays_the_rest_again(order: str, tmp_path: Path) -> None:
    with closing(ahead(Latent(), order, 2)) as feed:
        whole = [taken.groups for _, taken in steps_of(feed)]
    hanging = Latent(lambda request: 1000.0 if len(hanging.seen) > 5 * P * G - 5 else 0.0)  # three groups
    with closing(ahead(hanging, order, 2)) as feed:
        done = list(steps_of(feed, until=2))
        for _ in range(200):  # until all that does not hang is buffered
            feed.save(tmp_path)
            if len((tmp_path / "groups.jsonl").read_text().splitlines()) == 9:
                break
            time.sleep(0.01)
        state = feed.state
    fresh = Latent()
    with closing(ahead(fresh, order, 2)) as feed:
        feed.load(tmp_path)
        feed.restore(state)
        rest = [taken.groups for _, taken in steps_of(feed, start=2)]
    everything = [taken.groups for _, taken in done] + rest
    assert [seeds(groups) for groups in everything] == [seeds(groups) for groups in whole]
    if order == "exact":
        assert everything == whole
    assert len(fresh.seen) == (20 * P - 2 * P - 9) * G, "two steps were trained, and nine groups were buffered"


@pytest.mark.parametrize(
    ("order", "lag", "more", "fits"),
    [
        ("strict", 2, {}, True),
        ("strict", 3, {}, True),
        ("window", 2, {}, True),
        ("strict", 1, {}, False),
        ("exact", 2, {}, False),
        ("strict", 2, {"prompts_per_step": P // 2}, False),
    ],
)
def test_a_ledger_goes_on_under_a_lag_that_allows_what_it_holds_or_not_at_all(
    order: str, lag: int, more: dict, fits: bool, tmp_path: Path
) -> None:
    with closing(ahead(Latent(), "strict", 2)) as feed:
        list(steps_of(feed, until=2))
        feed.save(tmp_path)
        state = feed.state
    with closing(ahead(Latent(), order, lag, **more)) as feed:
        if not fits:
            with pytest.raises(RunError, match=r"begun with lag.steps: 2, order: strict.*--restart"):
                feed.load(tmp_path)
            return
        feed.load(tmp_path)
        feed.restore(state)
        assert len(list(steps_of(feed, start=2))) == 18


def test_what_was_played_ahead_is_not_skipped_by_going_on_without_a_lag() -> None:
    with closing(ahead(Latent(), lag=2)) as feed:
        list(steps_of(feed, until=2))
        state = feed.state
        plain = Feed(**{name: getattr(feed, name) for name in FEED})
        with pytest.raises(RunError, match=r"12 groups of later steps were begun.*go on with that lag, or --restart"):
            plain.restore(state)
        list(steps_of(feed, start=2))
        plain.restore(feed.state)
        assert plain.position == 20 * P


def test_the_time_of_training_is_no_wait_for_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.rollouts.ledger.LOOK_S", 0.01)
    with closing(ahead(Latent(lambda _: 0.3), progress_s=5.0)) as feed:
        feed.publish(0)
        feed._progress -= 100.0  # an update, or an evaluation, that took so long
        assert len(feed.take(P, step=0).groups) == P


@pytest.mark.parametrize(("order", "allowed"), [("strict", "a lag of at most 1"), ("exact", "version 0 alone")])
def test_a_sampler_that_does_not_keep_to_the_order_ends_the_step(order: str, allowed: str) -> None:
    sampler = Latent()
    sample = sampler.sample

    async def older(request: Request) -> Completion:
        return replace(await sample(request), version=-5)

    sampler.sample = older  # type: ignore[method-assign]
    with closing(ahead(sampler, order)) as feed:
        feed.publish(0)
        with pytest.raises(TrainingError, match=rf"step 1: position 0 has tokens of versions \[-5\].*{allowed}"):
            feed.take(P, step=0)


# ------------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize(
    ("stage", "machine", "why"),
    [
        ("algorithm: grpo", "{samplers: {replicas: 1}}", "correction: {kind: truncate}.*decoupled_ppo.*lag.steps: 0"),
        ("algorithm: decoupled_ppo", "{}", "machine: {samplers: {replicas: 1}} or vLLM servers"),
        (
            "algorithm: decoupled_ppo\n    sampling: {engine: vllm}", "{samplers: {replicas: 1}}",
            "stages.rl.sampling.engine is vllm; use engine: embedded, or replicas: 0",
        ),
    ],
)  # fmt: skip
def test_a_lag_that_nothing_corrects_or_serves_is_refused(stage: str, machine: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"""
name: r
model: whet:demo
machine: {machine}
stages:
  rl:
    kind: rl
    tasks: {{generate: arithmetic}}
    {stage}
    lag: {{steps: 1}}
    train: {{steps: 5}}
""")
    with pytest.raises(ConfigError, match=why):
        load_recipe(tmp_path / "r.yaml")


def test_servers_have_no_past_versions_for_the_exact_order() -> None:
    server = {"engine": "vllm", "server": "http://127.0.0.1:1"}
    stage = {"kind": "rl", "tasks": {"generate": "arithmetic"}, "algorithm": "decoupled_ppo", "train": {"steps": 5}}
    for order in ("strict", "window", "exact"):
        given = {**stage, "lag": {"steps": 1, "order": order}, "sampling": server}
        recipe = {"name": "r", "model": "whet:demo", "stages": {"rl": given}}
        if order != "exact":
            load_recipe(recipe)
        else:
            with pytest.raises(ConfigError, match=r"stages.rl.lag.order: exact samples with past versions"):
                load_recipe(recipe)


def test_importance_ratios_against_the_sampler_are_a_correction() -> None:
    PolicyConfig.model_validate({"ratio": {"denominator": "sampler"}}).check_lag(1)
    PolicyConfig.model_validate("decoupled_ppo").check_lag(1)


# --------------------------------------------------------------------------------- whole runs, killed

RECIPE = f"""
name: lagging
seed: 2
model: {MODEL}
save: {{every: 2}}
machine: {{samplers: {{replicas: 2}}}}
stages:
  rl:
    kind: rl
    tasks: {{generate: arithmetic, count: 24, digits: 1}}
    rewards: [{{kind: verifier}}, {{kind: length, above_tokens: 8, weight: -1}}]
    algorithm: {{preset: decoupled_ppo, minibatches: 2}}
    prompts_per_step: 4
    rollouts_per_prompt: 4
    sampling: {{max_tokens: 12, max_running: 10}}
    evaluation: {{tasks: {{generate: arithmetic, count: 4, digits: 1, split: test}}}}
    eval_every: 3
    lag: {{steps: 2, order: exact}}
    train: {{lr: 0.003, steps: 6}}
"""


def test_exact_a_run_that_was_killed_ends_as_one_that_was_not_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"lag-{os.getpid()}-{tmp_path.name}"
    monkeypatch.setenv("WHET_TEST_MARK", mark)
    (tmp_path / "r.yaml").write_text(RECIPE)
    nursery = Nursery(tmp_path)
    try:
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        done = nursery.obey("run", "r.yaml", f"out={whole}", folder=whole)
        assert done.code == 0, done.errors
        assert (
            nursery.obey("run", "r.yaml", f"out={broken}", folder=broken, at=done.changes * 3 // 5).code
            == -signal.SIGKILL
        )
        assert any((broken / "checkpoints").glob("*/step-*/rollouts/ledger.json"))
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up and len(marked(mark)) > 1:
            time.sleep(0.05)
        assert len(marked(mark)) == 1, "the nursery alone: samplers die with their driver"
        done = nursery.obey("run", "r.yaml", f"out={broken}", folder=broken)
        assert done.code == 0, done.errors
        assert "continues after step" in done.errors
        assert contents(broken) == contents(whole)
    finally:
        nursery.close()


def marked(mark: str) -> list[int]:
    """Processes that have the mark in their environment, and are not dead."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]
