"""Programs that ask whet's endpoint: their calls are turns, in the rows that a class gives; and whose fault it was."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs whet[serve]")

from whet.algorithms.groups import to_rows
from whet.config import CreateConfig, ModelConfig, SamplingConfig, TrainConfig
from whet.config.environment import EnvironmentConfig
from whet.config.rewards import EnvironmentReward, TurnsReward
from whet.envs.base import Task
from whet.envs.endpoint.play import ProgramEnvironments
from whet.envs.endpoint.worker import load
from whet.envs.rewards.build import build_rubric
from whet.envs.tools.play import Environments, ToolEnvironments
from whet.errors import ConfigError, DataError
from whet.launch.world import LocalWorld
from whet.pipeline.stage import Policy
from whet.records import Episode, Message, Outcome
from whet.rollouts.play import Player
from whet.sampling.base import SamplingParams, TokenSampler
from whet.sampling.scripted import ScriptedSampler

CODE = '''
import json, os, subprocess, sys, time

import httpx

from whet import Broken
from whet.envs.tools.schema import as_tool


class Talk:
    """Three words of a user, and a tool."""

    def reset(self, **row):
        self.words = 0

    def look(self, key: str) -> str:
        """Look a key up.

        Args:
            key: Which one.
        """
        return "it is " + key * 2

    def user(self, message):
        self.words += 1
        return f"more {self.words}" if self.words < 3 else None

    def turn_reward(self):
        return float(self.words)

    def reward(self):
        return float(self.words)


def ask(messages, tools=None, timeout=60.0, key=None, **more):
    body = {"model": os.environ["WHET_MODEL"], "messages": messages, "tools": tools, **more}
    headers = {"Authorization": "Bearer " + (key or os.environ["OPENAI_API_KEY"])}
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=timeout, trust_env=False)


def said(response):
    return response.raise_for_status().json()["choices"][0]["message"]


def talk(task):
    """The same play as the class has, by a program."""
    talk, tools, messages = Talk(), [as_tool("look", Talk().look).schema], list(task["messages"])
    talk.reset()
    turns = []
    while True:
        response = ask(messages, tools)
        if response.status_code == 400:
            return {"reward": talk.reward(), "turns": turns}
        answer = said(response)
        messages.append(answer)
        for call in answer.get("tool_calls") or ():
            result = talk.look(**json.loads(call["function"]["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if not answer.get("tool_calls"):
            word = talk.user(answer["content"])
            if word is None:
                return {"reward": talk.reward(), "turns": [*turns, talk.turn_reward()]}
            messages.append({"role": "user", "content": word})
        turns.append(talk.turn_reward())


def user(text):
    return {"role": "user", "content": text}


def branches(task):
    """One conversation goes on, another one begins, and the first goes on again."""
    first = [user("first")]
    first.append(said(ask(first)))
    first.append(user("on"))
    first.append(said(ask(first)))
    other = [user("other")]
    said(ask(other))
    first.append(user("again"))
    said(ask(first))
    said(ask(first[:1] + [{"role": "assistant", "content": "not what it said"}, user("so?")]))
    said(ask([user("first"), first[1], user("on")]))  # a turn that was there, once more
    return 1


def retries(task):
    """A client that does not wait, and asks the same again: twice before there is an answer, once after."""
    for _ in range(2):
        try:
            ask([user("slow")], timeout=0.2)
        except httpx.TimeoutException:
            pass
    time.sleep(0.6)
    again = said(ask([user("slow")]))["content"]
    return {"same": float(again == "answer 1"), "next": float(said(ask([user("slow")]))["content"] == "answer 2")}


def faults(task):
    how = task["how"]
    if how == "dies early":
        raise ValueError("no")
    if how == "asks nothing":
        return 1
    answer = said(ask(task["messages"], stream=False))
    if how == "dies":
        int(answer["content"])
    if how == "broken":
        raise Broken("the database is gone")
    if how == "hangs":
        subprocess.Popen(["sleep", "987654"])
        time.sleep(60)
    if how == "exits":
        os._exit(3)
    if how == "not finite":
        return float("nan")
    if how == "too many turns":
        return {"reward": 1, "turns": [0.5, 0.5]}
    if how == "stops":
        said(ask([user("x")], stop=["x"]))
    if how == "floods":
        return float(ask([user("x" * 10_000_000)]).status_code)
    if how == "other model":
        return float(ask([user("x")], model="gpt-4o").status_code)
    if how == "other key":
        return float(ask([user("x")], key="whet-00").status_code)
    if how == "is cut off":
        while True:
            said(ask([user("x")]))
    if how == "goes on":
        while (response := ask([user("x")])).status_code == 200:
            pass
        return {"over": float(response.json()["error"]["code"] == "episode_over"), "turns": [0, 0.5]}
    return 1


if __name__ == "__main__":
    task = json.loads(os.environ["WHET_TASK"])
    print(said(ask(task["messages"]))["content"])
    print({"json": '{"a": 1, "b": 0.5, "turns": [3]}', "text": "done", "broken": "1", "wrong": "0.5"}[task["how"]])
    sys.exit({"broken": 75, "wrong": 1}.get(task["how"], 0))
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "programs.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def tiny() -> Policy:
    shape = CreateConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=16, max_length=2000)
    model = ModelConfig(path="whet:tiny", create=shape, chat_template=Path("whet:hermes"))
    return LocalWorld().policy(model, TrainConfig(), SamplingConfig())


def a_task(number: int = 0, **columns: Any) -> Task:
    return Task(id=str(number), messages=(Message(role="user", content=f"Go {number}."),), columns=columns)


def play(
    made: Environments,
    policy: Policy,
    tasks: Sequence[Task],
    *,
    sampler: TokenSampler | None = None,
    samples: int = 1,
    turns: int = 8,
    max_tokens: int = 30,
) -> list[Episode]:
    player = Player(
        sampler=sampler or policy.sampler,
        template=policy.template,
        environment=made.make,
        rubric=build_rubric([EnvironmentReward(kind="environment"), TurnsReward(kind="turns", weight=0.5)]),
        params=SamplingParams(max_tokens=max_tokens, stop_ids=policy.template.stop_ids),
        max_length=2000,
        max_turns=turns,
    )
    groups = player.play(tasks, samples, step=1, seed=7).groups
    return [episode for group in groups for episode in group.episodes]


def scripted(policy: Policy, says: Callable[[str], str]) -> ScriptedSampler:
    template: Any = policy.template
    return ScriptedSampler(lambda c: says(c[-1].content), encode=template._encoder.one, decode=template.decode)


@pytest.fixture
def opened() -> Iterator[Callable[..., ProgramEnvironments]]:
    made: list[ProgramEnvironments] = []

    def open_one(**config: Any) -> ProgramEnvironments:
        made.append(ProgramEnvironments(EnvironmentConfig(kind="endpoint", **config)))
        return made[-1]

    yield open_one
    for each in made:
        each.close()


# --------------------------------------------------------------------------------------------- the law


def shown(episode: Episode) -> Any:
    return (episode.seed, episode.messages, episode.turns, to_rows(episode), episode.score, episode.outcome)


def test_a_program_gives_the_rows_of_the_class(code: Path, tiny: Policy, opened: Any) -> None:
    """Tokens, log-probabilities, masks and messages, bit for bit: sampled ones, and calls that a script writes."""
    program = opened(path=f"{code}:talk")
    of_class = ToolEnvironments(EnvironmentConfig(path=f"{code}:Talk"))
    tasks = [a_task(n) for n in range(3)]

    def calls(prompt: str) -> str:
        turn = prompt.count("<|im_start|>assistant")
        call = '<tool_call>{"name": "look", "arguments": {"key": "K"}}</tool_call>'
        return {1: "I look.\n" + call, 2: call + call.replace("K", "Q"), 3: "It is."}.get(turn, "So.")

    try:
        for sampler, most in ((None, 150), (scripted(tiny, calls), 300)):
            how: dict[str, Any] = {"sampler": sampler, "samples": 2, "max_tokens": most}
            left, right = play(of_class, tiny, tasks, **how), play(program, tiny, tasks, **how)
            assert list(map(shown, left)) == list(map(shown, right))
            assert max(len(episode.turns) for episode in left) >= 3
        assert all(episode.score.turns == (0, 0, 0.5, 1, 1.5) and episode.score.value == 6.0 for episode in left)
    finally:
        of_class.close()


def test_another_history_is_another_row_of_the_episode(code: Path, tiny: Policy, opened: Any) -> None:
    made = opened(path=f"{code}:branches")
    sampler = scripted(tiny, lambda prompt: f"answer {len(prompt)}")
    (episode,) = play(made, tiny, [a_task()], sampler=sampler)
    assert episode.outcome is Outcome.FINISHED
    prompts = [turn.prompt.tolist() for turn in episode.turns]
    ends = [prompt + turn.completion.tokens.tolist() for prompt, turn in zip(prompts, episode.turns, strict=True)]
    assert prompts[1][: len(ends[0])] == ends[0]  # goes on
    assert prompts[2][: len(prompts[0])] != prompts[0]  # another one
    assert prompts[3][: len(ends[1])] == ends[1]  # goes on where the second turn ended, over the third
    assert prompts[4][: len(ends[0])] != ends[0]  # rewritten history is rendered anew
    assert prompts[5][: len(ends[0])] == ends[0] and prompts[5] == prompts[1]
    rows = to_rows(episode)
    assert [int(row.trained_count) for row in rows] == [
        sum(len(episode.turns[n].completion.tokens) for n in turns) for turns in ((0, 1), (2,), (3,), (4,), (5,))
    ]
    assert [message.role for message in episode.messages].count("assistant") == len(episode.turns) == 6


def test_a_client_that_asks_again_gets_the_same_answer(code: Path, tiny: Policy, opened: Any) -> None:
    answers = iter(range(1, 5))

    def says(prompt: str) -> str:
        time.sleep(0.5)
        return f"answer {next(answers)}"

    (episode,) = play(opened(path=f"{code}:retries"), tiny, [a_task()], sampler=scripted(tiny, says))
    assert len(episode.turns) == 2 and episode.score.value == 2.0


# ----------------------------------------------------------------------------------------- whose fault


ENDS: Mapping[str, tuple[Outcome, float | None]] = {
    "well": (Outcome.FINISHED, 1.0),
    "dies": (Outcome.POLICY_ERROR, 0.0),
    "dies early": (Outcome.ENVIRONMENT_ERROR, None),
    "asks nothing": (Outcome.ENVIRONMENT_ERROR, None),
    "broken": (Outcome.ENVIRONMENT_ERROR, None),
    "hangs": (Outcome.POLICY_ERROR, 0.0),
    "exits": (Outcome.POLICY_ERROR, 0.0),
    "not finite": (Outcome.ENVIRONMENT_ERROR, None),
    "too many turns": (Outcome.ENVIRONMENT_ERROR, None),
    "stops": (Outcome.ENVIRONMENT_ERROR, None),
    "floods": (Outcome.FINISHED, 413.0),
    "other model": (Outcome.FINISHED, 404.0),
    "other key": (Outcome.FINISHED, 401.0),
    "goes on": (Outcome.TRUNCATED, 1.25),
    "is cut off": (Outcome.TRUNCATED, 0.0),
}


def test_whose_fault_it_is_and_that_no_play_hinders_another(code: Path, tiny: Policy, opened: Any) -> None:
    made = opened(path=f"{code}:faults", columns=["how"], limits={"episode_s": 3.0})
    began = time.monotonic()
    episodes = play(
        made,
        tiny,
        [a_task(n, how=how) for n, how in enumerate(ENDS)],
        sampler=scripted(tiny, lambda _: "no number"),
        turns=4,
    )
    found = {how: (episode.outcome, episode.score.value) for how, episode in zip(ENDS, episodes, strict=True)}
    assert found == ENDS, {how: episode.score.note for how, episode in zip(ENDS, episodes, strict=True)}
    assert time.monotonic() - began < 30
    time.sleep(0.1)
    assert not [each for each in Path("/proc").glob("[0-9]*/cmdline") if b"987654" in _read(each)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_command_says_its_reward_in_its_last_line(code: Path, tiny: Policy, opened: Any) -> None:
    made = opened(command=[sys.executable, str(code)], columns=["how"])
    tasks = [a_task(n, how=how) for n, how in enumerate(("json", "text", "broken", "wrong"))]
    episodes = play(made, tiny, tasks, sampler=scripted(tiny, lambda _: "hello"))
    assert [each.score.value for each in episodes] == [3.0, 0.0, None, 0.0]
    assert episodes[1].score.parts["environment"] is None
    outcomes = [each.outcome for each in episodes]
    assert outcomes[2:] == [Outcome.ENVIRONMENT_ERROR, Outcome.POLICY_ERROR] and "code 75" in episodes[2].score.note


def test_what_a_command_prints_is_read_to_its_last_line_and_not_kept() -> None:
    program = "import sys\nfor _ in range(300): sys.stdout.write('x' * 1_000_000)\nprint('\\n{\"won\": 2}')"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = load("", [sys.executable, "-c", program])({"env": {}, "seed": 1})
    assert said == {"worth": {"won": 2.0}}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_what_cannot_be_is_said_before(code: Path, opened: Any) -> None:
    with pytest.raises(ValueError, match="needs a command, or a function"):
        EnvironmentConfig(kind="endpoint")
    with pytest.raises(ValueError, match="call_s is not read"):
        EnvironmentConfig(kind="endpoint", command=["x"], limits={"call_s": 1})
    whole = EnvironmentConfig(kind="endpoint", command=["x"], limits={"turns": 3})
    assert EnvironmentConfig.model_validate_json(whole.model_dump_json()) == whole  # as a run keeps it
    with pytest.raises(ValueError, match="add kind: endpoint"):
        EnvironmentConfig(command=["x"])
    with pytest.raises(ConfigError, match="no function 'tlak'; did you mean 'talk'"):
        opened(path=f"{code}:tlak")
    made = opened(path=f"{code}:talk", columns=["how"])
    with pytest.raises(DataError, match="columns name 'how'"):
        made.check(a_task())
    with pytest.raises(DataError, match="can be told 120,000"):
        made.check(a_task(how="x" * 120_000))
