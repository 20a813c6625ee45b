"""Dialogues: a simulated user answers what the policy says, and a user that fails is the machinery's failure."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.test_tools import TEMPLATE, call
from whet.config.environment import EnvironmentConfig
from whet.config.rewards import EnvironmentReward
from whet.envs.base import Task
from whet.envs.rewards.build import build_rubric
from whet.envs.tools.play import ToolEnvironments
from whet.envs.tools.user import GREETING, STOP, SimulatedUsers
from whet.errors import ConfigError, DataError
from whet.launch.world import LocalWorld
from whet.models.create import byte_tokenizer
from whet.pipeline.playing import opened
from whet.records import Episode, Message, Outcome, Reply
from whet.rollouts.play import Player
from whet.sampling.base import SamplingParams, aside
from whet.sampling.scripted import ScriptedSampler

DESK = '''
class Desk:
    def reset(self, order: str):
        self.order, self.refunded = order, ""

    def refund(self, order: str) -> str:
        """Refund an order.

        Args:
            order: Its number.
        """
        self.refunded = order
        return "refunded"

    def reward(self):
        return float(self.refunded == self.order)


def customer(messages):
    part, said = messages[0]["content"], messages[-1]["content"]
    assert "order 7" in part and messages[1]["content"] == "Hello, how can I help you?"
    assert [each["role"] for each in messages] == ["system", *["user", "assistant"] * 8][: len(messages)]
    return "<think>hm</think> It is 7." if "Which" in said else f"Thanks. {STOP}"
'''.replace("{STOP}", STOP)
TASK = Task(
    id="t",
    messages=(Message(role="user", content="I want my money back."),),
    columns={"order": "7", "scenario": "You have order 7.", "script": ["It is 7.", "Sure?"]},
)
SAYS = ["Which order?", call("refund", '{"order": "7"}'), "Done."]


@pytest.fixture
def desk(tmp_path: Path) -> str:
    (tmp_path / "desk.py").write_text(DESK)
    (tmp_path / "policy.md").write_text("Refund what was ordered.\n")
    return str(tmp_path / "desk.py")


def play(made: ToolEnvironments, says: Any, task: Task = TASK, samples: int = 1) -> list[Episode]:
    tokenizer = byte_tokenizer()
    player = Player(
        sampler=ScriptedSampler(says, encode=TEMPLATE._encoder.one, decode=tokenizer.decode),
        template=TEMPLATE,
        environment=made.make,
        rubric=build_rubric([EnvironmentReward(kind="environment")]),
        params=SamplingParams(max_tokens=500, stop_ids=TEMPLATE.stop_ids),
        max_length=10_000,
        max_turns=6,
    )
    return list(player.play([task], samples, step=0, seed=0).groups[0].episodes)


def config(desk: str, **more: Any) -> EnvironmentConfig:
    system = Path(desk).parent / "policy.md"
    return EnvironmentConfig.model_validate({"kind": "dialogue", "path": f"{desk}:Desk", "system": system, **more})


def test_a_script_in_the_row_speaks_turn_by_turn(desk: str) -> None:
    with closing(ToolEnvironments(config(desk))) as made:
        (episode,) = play(made, [*SAYS, "Yes."])
        said = [(message.role, message.content) for message in episode.messages]
        assert said == [
            ("system", "Refund what was ordered."), ("user", "I want my money back."),
            ("assistant", "Which order?"), ("user", "It is 7."),
            ("assistant", ""), ("tool", "refunded"),
            ("assistant", "Done."), ("user", "Sure?"), ("assistant", "Yes."),
        ]  # fmt: skip
        assert (episode.outcome, episode.score.value) == (Outcome.FINISHED, 1.0)


def test_a_model_plays_the_user_until_it_is_done(desk: str) -> None:
    with opened(config(desk, user={"script": f"{desk}:customer"}), LocalWorld()) as made:
        assert isinstance(made, ToolEnvironments)
        (episode,) = play(made, SAYS)
        said = [message.content for message in episode.messages if message.role == "user"]
        assert said == ["I want my money back.", "It is 7."], "its thinking is its own"
        assert (episode.outcome, episode.score.value) == (Outcome.FINISHED, 1.0)


def test_a_script_begins_after_what_the_task_brings(desk: str) -> None:
    earlier = (Message(role="user", content="Hi."), Message(role="assistant", content="Hello."), *TASK.messages)
    with closing(ToolEnvironments(config(desk))) as made:
        (episode,) = play(made, SAYS[:1] * 3, Task(id="t", messages=earlier, columns=TASK.columns))
        users = [message.content for message in episode.messages if message.role == "user"]
        assert users == ["Hi.", "I want my money back.", "It is 7.", "Sure?"]


class Client:
    """A chat whose first call waits until the others have come."""

    def __init__(self, failure: str = "") -> None:
        self.asked: list[int] = []
        self.failure, self.closed = failure, False

    def users(self) -> SimulatedUsers:
        return SimulatedUsers(lambda asked: aside(lambda: self.chat(asked)), self.close)

    def chat(self, conversations: Sequence[tuple[Message, ...]]) -> list[Reply]:
        assert all(each[1] == GREETING for each in conversations)
        assert len(set(conversations)) == len(conversations), "equal ones are asked once"
        self.asked.append(len(conversations))
        threading.Event().wait(0.3 if len(self.asked) == 1 else 0)
        if self.failure == "raise":
            raise ConfigError("no key")
        answer = None if self.failure else Message(role="assistant", content=f"It is 7. ({len(conversations[0])})")
        return [Reply(message=answer, failure=self.failure)] * len(conversations)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clients() -> dict[str, Client]:
    return {"good": Client(), "lost": Client("503"), "bad": Client("raise")}


def test_equal_conversations_are_asked_once_and_those_that_wait_together(desk: str, clients: dict[str, Client]) -> None:
    client = clients["good"]
    with closing(ToolEnvironments(config(desk), client.users())) as made:
        episodes = play(made, lambda prompt: "Done." if "It is 7" in prompt[-1].content else "Which?", samples=6)
        assert {episode.messages[3].content for episode in episodes} == {"It is 7. (4)"}
        assert {len(episode.turns) for episode in episodes} == {6}
        assert sum(client.asked) < 30, "of 5 turns of 6 plays"
    assert client.closed


def test_who_asks_in_two_event_loops_is_answered_in_both(clients: dict[str, Client]) -> None:
    """Training that plays ahead, and an evaluation beside it."""
    users, began = clients["good"].users(), time.monotonic()

    async def ask(words: str) -> str | None:
        return await asyncio.wait_for(users.says(TASK, [Message(role="assistant", content=words)]), 5.0)

    with ThreadPoolExecutor(2) as threads:
        said = [threads.submit(asyncio.run, ask(words)) for words in ("Which?", "Who?")]
        assert [each.result() for each in said] == ["It is 7. (3)"] * 2
    assert time.monotonic() - began < 3.0


def test_a_user_that_fails_is_the_machinery_s_failure(desk: str, clients: dict[str, Client]) -> None:
    lost, bad = clients["lost"], clients["bad"]
    with closing(ToolEnvironments(config(desk), lost.users())) as made:
        (episode,) = play(made, ["Which?", "Which?"])
        assert (episode.outcome, episode.score.value) == (Outcome.ENVIRONMENT_ERROR, None)
        assert episode.score.note == "the simulated user: 503" and lost.asked == [1, 1], "tried twice"
    with (
        closing(ToolEnvironments(config(desk), bad.users())) as made,
        pytest.raises(ConfigError, match="no key"),
    ):
        play(made, ["Which?"])


def test_a_row_without_a_user_is_named(desk: str) -> None:
    with closing(ToolEnvironments(config(desk))) as made:
        with pytest.raises(DataError, match=r"task t: kind: dialogue needs the column 'script' \(texts\)"):
            made.check(Task(id="t", messages=TASK.messages, columns={"order": "7", "script": [1]}))
        made.check(TASK)
    with pytest.raises(ConfigError, match=r"environment\.system: no\.md: cannot be read"):
        ToolEnvironments(config(desk, system="no.md"))
