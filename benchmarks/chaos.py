"""Episodes of which one in five breaks something, and episodes whose tools are slow, beside the same in lock-step.

    python -m benchmarks.chaos [--episodes 200] [--call-s 10]
    python -m benchmarks.chaos --latency [--episodes 64] [--turns 4] [--seconds 2]

The first plays a class whose tool, in every fifth episode, hangs, dies, floods its output and its result, forks
processes that stay, or kills its parent. The other episodes must be bit for bit those that are played without them,
and all be over in less than two deadlines of a call.

The second lets the demo model answer (32 tokens a turn) in environments that take 0 to `--seconds` for a turn; in
lock-step all wait for the slowest one of a turn. Printed are episodes a second, and the share of time in which no
answer was being written.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

from whet.config import ModelConfig, SamplingConfig, TrainConfig
from whet.config.environment import EnvironmentConfig
from whet.config.rewards import EnvironmentReward
from whet.envs.base import Observed, Opening, Task
from whet.envs.rewards.build import build_rubric
from whet.envs.tools.play import ToolEnvironments
from whet.launch.world import LocalWorld
from whet.models.create import byte_tokenizer
from whet.models.locate import TEMPLATES
from whet.records import Completion, Episode, Message, Outcome
from whet.rollouts.play import Player
from whet.sampling.base import Request, SamplingParams, TokenSampler
from whet.sampling.scripted import ScriptedSampler
from whet.templates.jinja import JinjaTemplate

BREAKS = ("hang", "die", "flood", "fork", "parent")
CLASS = '''
import os, random, signal, time

class Chaos:
    def reset(self, how: str):
        self.how, self.drawn = how, 0.0
        return " how: " + how

    def work(self, number: int) -> str:
        """Work."""
        self.drawn = random.random()
        return f"{number * 2} {self.drawn}"

    def break_it(self, how: str) -> str:
        """Break something."""
        match how:
            case "hang":
                time.sleep(600)
            case "die":
                os._exit(3)
            case "flood":
                for _ in range(200):
                    print("x" * 100_000)
                return "y" * 50_000_000
            case "fork":
                for _ in range(20):
                    if os.fork() == 0:
                        os.setsid()
                        time.sleep(600)
                        os._exit(0)
            case "parent":
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(600)
        return "done"

    def reward(self):
        return self.drawn
'''


def write(text: str) -> None:
    """A line of the result."""
    sys.stdout.write(text + "\n")


def chaos(folder: Path, episodes: int, call_s: float) -> tuple[list[Episode], list[Episode], float]:
    """(all episodes, those of the good tasks played without the others, seconds of the former).

    Every fifth task breaks something, one kind after the other.
    """
    (folder / "chaos.py").write_text(CLASS)
    config = EnvironmentConfig(path=f"{folder / 'chaos.py'}:Chaos", limits={"call_s": call_s})
    tasks = [
        Task(
            id=f"t{number}",
            messages=(Message(role="user", content="Go."),),
            columns={"how": BREAKS[number // 5 % len(BREAKS)] if number % 5 == 0 else "well"},
        )
        for number in range(episodes)
    ]
    good = [number for number in range(episodes) if number % 5]
    with closing(ToolEnvironments(config)) as made:
        begun = time.monotonic()
        together = _play(made, tasks, range(episodes))
        seconds = time.monotonic() - begun
        alone = _play(made, [tasks[number] for number in good], good)
    return together, alone, seconds


def _play(made: ToolEnvironments, tasks: list[Task], places: range | list[int]) -> list[Episode]:
    tokenizer = byte_tokenizer()
    template = JinjaTemplate(tokenizer, chat_template=TEMPLATES["whet:hermes"].read_text())

    def say(conversation: list[Message]) -> str:
        said = conversation[-1].content
        how = said.rpartition("how: ")[2].split("<")[0].split()[0]
        turns = said.count("<tool_response>")
        if turns == 2:
            return "done"
        name, arguments = ("break_it", f'{{"how": "{how}"}}') if turns and how != "well" else ("work", '{"number": 3}')
        return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'

    player = Player(
        sampler=ScriptedSampler(say, encode=template._encoder.one, decode=tokenizer.decode),  # type: ignore[arg-type]
        template=template,
        environment=made.make,
        rubric=build_rubric([EnvironmentReward(kind="environment")]),
        params=SamplingParams(max_tokens=500, stop_ids=template.stop_ids),
        max_length=10_000,
        max_turns=4,
        observation_tokens=200,
    )
    return [group.episodes[0] for group in player.play(tasks, 1, step=0, seed=5, positions=list(places)).groups]


def judged(together: list[Episode], alone: list[Episode]) -> str:
    """What is wrong; empty where the good episodes are the same and the others' fates are known."""
    good = [episode for number, episode in enumerate(together) if number % 5]
    wrong = sum(one != other for one, other in zip(good, alone, strict=True))
    unscored = sum(episode.score.value is None for episode in together)
    finished = all(episode.outcome is Outcome.FINISHED for episode in good)
    return "" if finished and not wrong and not unscored else f"{wrong} differ, {unscored} unscored, {finished=}"


# ----------------------------------------------------------------------------------------------- latency


@dataclass
class Slow:
    """A few turns, each of which takes a time that follows from the task and the turn."""

    task: Task
    turns: int
    seconds: float
    barrier: asyncio.Barrier | None
    turn: int = 0

    async def start(self, *, seed: int) -> Opening:
        """Begin."""
        return Opening(messages=self.task.messages)

    async def step(self, message: Message) -> Observed:
        """Wait for the tool, and in lock-step for all the others."""
        await asyncio.sleep(Random(f"{self.task.id} {self.turn}").uniform(0, self.seconds))
        if self.barrier is not None:
            await self.barrier.wait()
        self.turn += 1
        return Observed(messages=(Message(role="user", content="3+4"),), over=self.turn == self.turns)

    async def close(self) -> Mapping[str, float]:
        """Nothing."""
        return {}


class Watched:
    """A sampler, and the time in which it has nothing to write."""

    def __init__(self, sampler: TokenSampler) -> None:
        self.sampler, self.running, self.idle_s, self.since = sampler, 0, 0.0, time.monotonic()

    @property
    def version(self) -> int:
        """Of the sampler's weights."""
        return self.sampler.version

    async def sample(self, request: Request) -> Completion:
        """The completion."""
        if self.running == 0:
            self.idle_s += time.monotonic() - self.since
        self.running += 1
        try:
            return await self.sampler.sample(request)
        finally:
            self.running -= 1
            self.since = time.monotonic()


def latency(episodes: int, turns: int, seconds: float) -> None:
    """Play both ways and print."""
    policy = LocalWorld().policy(ModelConfig(path="whet:demo"), TrainConfig(), SamplingConfig(max_running=episodes))
    tasks = [Task(id=f"t{n}", messages=(Message(role="user", content="1+2"),)) for n in range(episodes)]
    player = Player(
        sampler=policy.sampler,
        template=policy.template,
        environment=lambda task: Slow(task, turns=turns, seconds=seconds, barrier=None),
        rubric=build_rubric([EnvironmentReward(kind="environment")]),
        params=SamplingParams(max_tokens=32, stop_ids=policy.template.stop_ids),
        max_length=policy.max_length,
        max_turns=turns,
    )
    player.play(tasks, 1, step=0, seed=0)  # warm
    for name, lock in (("each on its own", False), ("lock-step", True)):
        watched = Watched(policy.sampler)
        barrier = asyncio.Barrier(episodes) if lock else None
        make = partial(Slow, turns=turns, seconds=seconds, barrier=barrier)
        begun = time.monotonic()
        replace(player, sampler=watched, environment=make).play(tasks, 1, step=0, seed=0)
        took = time.monotonic() - begun
        write(f"{name:16} {episodes / took:5.1f} episodes a second, {watched.idle_s / took:4.0%} of the time waiting")


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=None)
    parser.add_argument("--call-s", type=float, default=10.0)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    if options.latency:
        latency(options.episodes or 64, options.turns, options.seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        together, alone, seconds = chaos(Path(folder), options.episodes or 200, options.call_s)
    fates = ", ".join(f"{kind} {together[5 * n].outcome.value}" for n, kind in enumerate(BREAKS))
    write(f"{len(together)} episodes in {seconds:.1f} s, a deadline being {options.call_s:g} s; {fates}")
    wrong = judged(together, alone)
    if wrong or seconds >= 2 * options.call_s:
        raise SystemExit(f"failed: {wrong or 'too slow'}")
    write(f"the {len(alone)} others are bit for bit what they are alone")


if __name__ == "__main__":
    main()
