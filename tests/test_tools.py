"""Environments of tools: classes as they are written, each play in its own process, and whose fault a failure is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from benchmarks.chaos import BREAKS, chaos, judged

from whet.config.environment import EnvironmentConfig
from whet.config.rewards import EnvironmentReward, TurnsReward
from whet.envs.base import Task
from whet.envs.rewards.build import build_rubric
from whet.envs.tools.calculator import calculator
from whet.envs.tools.play import ToolEnvironments
from whet.errors import ConfigError, DataError, PolicyFault
from whet.models.create import byte_tokenizer
from whet.models.locate import TEMPLATES
from whet.records import Episode, Message, Outcome, ToolCall
from whet.rollouts.play import Player
from whet.sampling.base import SamplingParams
from whet.sampling.scripted import ScriptedSampler
from whet.templates.jinja import JinjaTemplate

SHOP = '''
import os, sys, threading, time
from dataclasses import dataclass
from typing import Literal

from whet import Broken

SEEN = []


@dataclass
class Place:
    city: str
    floor: int = 0


class Shop:
    """You work at a shop."""

    @classmethod
    def load(cls, **options):
        cls.options = options

    def __init__(self):
        self.paid, self.said = 0.0, ""

    def reset(self, *, item: str, gold: str = "", **row):
        if item == "no reset":
            raise OSError("no board")
        self.item, self.gold = item, gold
        return f" Item: {item}; {self.options.get('note', '')}; {len(SEEN)} seen"

    def find(self, name: str, limit: int = 3) -> list:
        """Find items.

        Args:
            name: Full or partial name.
            limit: Most results.
        """
        SEEN.append(name)
        self.paid += 0.25
        return [{"name": name, "limit": limit}]

    async def wait(self, seconds: float, how: Literal["asleep", "dead", "soon", "lost", "raise"] = "asleep") -> str:
        """Wait for something."""
        if how == "dead":
            os._exit(3)
        if how == "lost":
            raise Broken("the database is gone")
        if how == "raise":
            raise ValueError("no such time")
        if how == "soon":
            threading.Timer(0.1, os._exit, (0,)).start()
        time.sleep(seconds)
        return "waited"

    def put(self, place: Place) -> str:
        """Put the item.

        Parameters
        ----------
        place : Place
            Where it goes.
        """
        return f"in {place.city}, floor {place.floor}"

    def flood(self, kind: str) -> object:
        """Return something large or odd."""
        cycle = []
        cycle.append(cycle)
        odd = {"large": "ab" * 10_000_000, "bytes": b"\\xff\\x00", "cycle": cycle, "half": "\\ud83d", "none": None}
        return odd[kind]

    def turn_reward(self):
        paid, self.paid = self.paid, 0.0
        return paid

    def state(self):
        return (self.item, len(SEEN))

    def user(self, message):
        if message == "rubbish":
            int(message)
        self.said = message
        return "Which one?" if message.endswith("?") else None

    def reward(self):
        return {"right": float(self.said == self.gold), "bonus": 0.5}


class OfRow:
    """It wants the row where it is made."""

    def __init__(self, row):
        self.row = row


class Wordle:
    """As in the documentation of TRL: no argument, text from reset, a number as reward."""

    def __init__(self):
        self.reward = 0.0

    def reset(self, **kwargs) -> str | None:
        self.reward = 0.0
        return " Guess."

    def guess(self, word: str) -> str:
        """
        Make a guess.

        Args:
            word: The guessed word, formatted as 'word'.

        Returns:
            The feedback message.
        """
        self.reward = 1.0 if word == "crane" else 0.1
        return "right" if word == "crane" else "wrong"


class Untyped:
    def look(self, key):
        """Look."""


class Silent:
    def look(self, key: str):
        pass


class Starred:
    def look(self, *keys: str):
        """Look."""


class Odd:
    def look(self, key: Shop) -> str:
        """Look."""


def look(key: str) -> str:
    """Look."""
    return key * 2
'''
TEMPLATE = JinjaTemplate(byte_tokenizer(), chat_template=TEMPLATES["whet:hermes"].read_text())
TASK = Task(id="t", messages=(Message(role="user", content="Go."),), columns={"item": "cup", "gold": "done"})
Say = Callable[[str], str]


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop") / "shop.py"
    path.write_text(SHOP)
    return path


@pytest.fixture(scope="module")
def made(shop: Path) -> Iterator[ToolEnvironments]:
    config = EnvironmentConfig(
        path=f"{shop}:Shop",
        options={"note": "fragile"},
        limits={"turns": 6, "calls": 4, "calls_per_turn": 3, "call_s": 1.0, "observation_tokens": 200},
        system="docstring",
    )
    opened = ToolEnvironments(config)
    yield opened
    opened.close()


def play(made: ToolEnvironments, says: Sequence[str] | Say, *tasks: Task, samples: int = 1) -> list[Episode]:
    """Episodes whose policy says these texts, or what a function makes of its prompt."""
    tokenizer = byte_tokenizer()
    script: Any = says if not callable(says) else lambda conversation: says(conversation[-1].content)
    player = Player(
        sampler=ScriptedSampler(script, encode=TEMPLATE._encoder.one, decode=tokenizer.decode),
        template=TEMPLATE,
        environment=made.make,
        rubric=build_rubric([EnvironmentReward(kind="environment"), TurnsReward(kind="turns")]),
        params=SamplingParams(max_tokens=2000, stop_ids=TEMPLATE.stop_ids),
        max_length=100_000,
        max_turns=made.config.limits.turns,
        observation_tokens=made.config.limits.observation_tokens,
    )
    groups = player.play(list(tasks or [TASK]), samples, step=0, seed=5).groups
    return [episode for group in groups for episode in group.episodes]


def results(episode: Episode) -> list[str]:
    return [message.content for message in episode.messages if message.role == "tool"]


def statuses(episode: Episode) -> list[str]:
    return [each.status for message in episode.messages for each in message.tool_calls]


# ------------------------------------------------------------------------------------------------ a play


def test_schemas_come_from_hints_and_docstrings(made: ToolEnvironments) -> None:
    functions = {tool["function"]["name"]: tool["function"] for tool in made.tools}
    assert list(functions) == ["find", "wait", "put", "flood"]
    assert functions["find"] == {
        "name": "find",
        "description": "Find items.",
        "parameters": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "description": "Full or partial name."},
                "limit": {"type": "integer", "description": "Most results.", "default": 3},
            },
            "required": ["name"],
        },
    }
    assert functions["put"]["parameters"]["properties"]["place"]["description"] == "Where it goes."
    assert functions["wait"]["parameters"]["properties"]["how"]["enum"] == ["asleep", "dead", "soon", "lost", "raise"]
    assert (made.takes, made.needs) == (None, ["item"])
    with pytest.raises(DataError, match="task x: reset needs the column 'item'; the row's columns: gold"):
        made.check(Task(id="x", messages=TASK.messages, columns={"gold": "1"}))


def test_a_play_from_reset_to_reward(made: ToolEnvironments) -> None:
    first = "I look. " + call("find", '{"name": "cup"}') + call("put", '{"place": {"city": "Rome", "floor": 2}}')
    (episode,) = play(made, [first, "this?", "done"])
    roles = "system user assistant tool tool assistant user assistant"
    assert [m.role for m in episode.messages] == roles.split()
    assert [m.content for m in episode.messages[:3]] == [
        "You work at a shop.", "Go. Item: cup; fragile; 0 seen", "I look.",
    ]  # fmt: skip
    assert results(episode) == ['[{"name": "cup", "limit": 3}]', "in Rome, floor 2"]
    assert episode.messages[6].content == "Which one?"
    calls, tools = episode.messages[2].tool_calls, episode.messages[3:5]
    assert [each.id for each in calls] == [message.tool_call_id for message in tools]
    assert len({each.id for each in calls}) == 2 and all(each.id.isalnum() and len(each.id) == 9 for each in calls)
    assert [message.name for message in tools] == ["find", "put"]
    assert episode.outcome is Outcome.FINISHED and episode.score.correct
    assert (episode.score.value, episode.score.turns) == (1.75, (0.25, 0.0, 0.0))
    assert episode.score.parts["environment/bonus"] == 0.5
    assert [turn.state for turn in episode.turns] == ["('cup', 0)", "('cup', 1)", "('cup', 1)"]


def test_a_play_cannot_see_another(made: ToolEnvironments) -> None:
    episodes = play(
        made, lambda prompt: call("find", '{"name": "a"}') if "limit" not in prompt[-200:] else "x", samples=5
    )
    assert all("0 seen" in episode.messages[1].content for episode in episodes)
    assert episodes == play(
        made, lambda prompt: call("find", '{"name": "a"}') if "limit" not in prompt[-200:] else "x", samples=5
    )


def test_trl_s_classes_run_unmodified(shop: Path) -> None:
    opened = ToolEnvironments(EnvironmentConfig(path=f"{shop}:Wordle"))
    try:
        (episode,) = play(opened, [call("guess", '{"word": "crane"}'), "done"])
        assert (episode.messages[0].content, results(episode), episode.score.value) == ("Go. Guess.", ["right"], 1.0)
    finally:
        opened.close()


def test_what_reads_hints_is_loaded_once_and_not_in_every_play(tmp_path: Path) -> None:
    """It takes ten times as long as the rest of a play's start."""
    (tmp_path / "loaded.py").write_text(
        "import sys\n\n\nclass Loaded:\n    def __init__(self):\n"
        '        self.reward = float({"pydantic", "docstring_parser"} <= sys.modules.keys())\n\n'
        "    def user(self, message):\n        pass\n"
    )
    with closing(ToolEnvironments(EnvironmentConfig(path=f"{tmp_path}/loaded.py:Loaded"))) as opened:
        (episode,) = play(opened, ["done"])
    assert episode.score.value == 1.0


def test_functions_and_the_calculator_are_tools(shop: Path) -> None:
    tools = [{"path": "whet.envs.tools.calculator:calculator"}, {"path": f"{shop}:look"}]
    opened = ToolEnvironments(EnvironmentConfig(tools=tools))
    try:
        (episode,) = play(
            opened, [call("calculator", '{"expression": "2^10/3"}') + call("look", '{"key": "ab"}'), "ok"]
        )
        assert results(episode) == ["341.333333333", "abab"]
        assert (episode.outcome, episode.score.value) == (Outcome.FINISHED, 0.0)  # no opinion: the turns' 0 alone
    finally:
        opened.close()


# ------------------------------------------------------------------------------------------ whose fault


@pytest.mark.parametrize(
    ("said", "status", "told"),
    [
        ("<tool_call>{]</tool_call>", "invalid_json", "error: the call is not JSON: Expecting property name"),
        ("<tool_call>3</tool_call>", "invalid_json", "error: a call is an object with name and arguments"),
        ('<tool_call>{"arguments": {}}</tool_call>', "no_name", "error: the call has no name"),
        ('<tool_call>{"name": "find"', "unclosed", "error: the call is not closed"),
        (call("fin"), "unknown_tool", "error: there is no tool 'fin'; did you mean find?"),
        (call("find"), "bad_arguments", "error: find: name: Field required"),
        (
            call("find", '{"name": "a", "limit": "3"}'),
            "bad_arguments",
            "error: find: limit: Input should be a valid int",
        ),
        (call("find", '{"name": "a", "x": 1}'), "bad_arguments", "error: find: x: Extra inputs are not permitted"),
        (call("find", '"{"'), "invalid_json", "error: the arguments are not JSON"),
        (call("find", '{"name": "\\ud83d"}'), "invalid_json", "error: the arguments are not JSON"),
        (call("wait", '{"seconds": 0, "how": "raise"}'), "raised", "error: ValueError: no such time"),
    ],
)
def test_a_wrong_call_is_an_observation(made: ToolEnvironments, said: str, status: str, told: str) -> None:
    (episode,) = play(made, [said + call("find", '{"name": "b"}') if status != "unclosed" else said, "done"])
    assert statuses(episode)[0] == status
    assert results(episode)[0].startswith(told)
    assert (episode.outcome, episode.score.correct) == (Outcome.FINISHED, True)
    assert status == "unclosed" or results(episode)[1].startswith('[{"name": "b"')


def test_limits_have_their_own_words(made: ToolEnvironments) -> None:
    one = call("find", '{"name": "a"}')
    (episode,) = play(made, [one * 5, one, "done"])
    assert statuses(episode) == ["ok"] * 3 + ["over_limit"] * 3
    assert results(episode)[3:] == ["error: at most 3 calls in a turn"] + ["error: no calls left; answer now"] * 2
    assert episode.outcome is Outcome.FINISHED
    (episode,) = play(made, [one * 3, one, one, one, one])  # who goes on calling has had the last turn
    assert len(episode.turns) == 4 and episode.outcome is Outcome.FINISHED


def test_what_a_tool_returns_never_breaks_a_play(made: ToolEnvironments) -> None:
    kinds = ["large", "bytes", "cycle", "half", "none"]
    tasks = [Task(id=kind, messages=TASK.messages, columns={"item": kind}) for kind in kinds]

    def say(prompt: str) -> str:
        kind = prompt.rpartition("Item: ")[2].partition(";")[0]
        return "done" if "tool_response" in prompt.rpartition("Item: ")[2] else call("flood", f'{{"kind": "{kind}"}}')

    shown = [results(episode)[0] for episode in play(made, say, *tasks)]
    assert "tokens left out]" in shown[0] and len(shown[0]) < 300
    assert shown[1:] == ["b'\\xff\\x00'", "[[...]]", "\\ud83d", "null"]


@pytest.mark.parametrize(
    ("said", "note"),
    [
        (call("wait", '{"seconds": 60}'), "wait: did not answer within 1 s and was killed"),
        (call("wait", '{"seconds": 0, "how": "dead"}'), "wait: the worker died"),
        ("rubbish", "turn: ValueError: invalid literal for int()"),
    ],
)
def test_who_breaks_the_environment_is_scored_lowest(made: ToolEnvironments, said: str, note: str) -> None:
    (episode,) = play(made, [said])
    assert (episode.outcome, episode.score.value, episode.score.correct) == (Outcome.POLICY_ERROR, 0.0, False)
    assert episode.score.note.startswith(f"the environment failed: {note}")


def test_a_call_that_kills_its_process_later_is_no_way_to_go_unscored(made: ToolEnvironments) -> None:
    async def leave() -> None:
        game = made.make(TASK)
        await game.start(seed=0)
        soon = ToolCall(id="1", name="wait", arguments={"seconds": 0, "how": "soon"})
        await game.step(Message(role="assistant", content="", tool_calls=(soon,)))
        assert game.session is not None
        while not game.session.gone:
            await asyncio.sleep(0.05)
        with pytest.raises(PolicyFault, match="died after a call"):
            await game.close()

    asyncio.run(asyncio.wait_for(leave(), 60))


def test_what_the_machinery_did_is_tried_again_and_then_unscored(made: ToolEnvironments) -> None:
    lost = call("wait", '{"seconds": 0, "how": "lost"}')
    (episode,) = play(made, [lost, lost])
    assert (episode.outcome, episode.score.value) == (Outcome.ENVIRONMENT_ERROR, None)
    assert episode.score.note == "wait: EnvironmentFailure: the database is gone (shop.py:49)"
    (unset,) = play(made, ["x", "x"], Task(id="u", messages=TASK.messages, columns={"item": "no reset"}))
    assert (unset.outcome, unset.turns) == (Outcome.ENVIRONMENT_ERROR, ())
    assert unset.score.note.startswith("reset: OSError: no board")


def test_whatever_one_play_breaks_the_others_are_what_they_are_alone(tmp_path: Path) -> None:
    """Five of 25 hang, die, flood, fork and kill their parent; `benchmarks.chaos` plays 200, against the clock."""
    together, alone, _ = chaos(tmp_path, 25, call_s=4.0)
    assert judged(together, alone) == ""
    fates = {how: together[5 * place].outcome for place, how in enumerate(BREAKS)}
    assert [fates[how] for how in ("hang", "die", "parent")] == [Outcome.POLICY_ERROR] * 3
    assert fates["fork"] is Outcome.FINISHED


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Untyped", r"shop\.py:\d+: the tool look has no type hint for key; add one"),
        ("Silent", r"shop\.py:\d+: the tool look has no docstring"),
        ("Starred", r"shop\.py:\d+: the tool look takes \*keys: str, which no schema can say"),
        ("Odd", r"shop\.py:\d+: the tool look has a parameter of a type that JSON cannot say"),
        ("Shopp", r"has no function 'Shopp'; did you mean 'Shop'\?"),
        ("OfRow", r"missing 1 required positional argument: 'row'.*the columns of a row are for reset"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_with_its_place(shop: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^environment: .*{message}"):
        ToolEnvironments(EnvironmentConfig(path=f"{shop}:{name}"))


def test_two_tools_of_one_name_are_refused(shop: Path) -> None:
    twice = EnvironmentConfig(tools=[{"path": f"{shop}:look"}] * 2)
    with pytest.raises(ConfigError, match=r"two tools are named look"):
        ToolEnvironments(twice)


def test_a_template_without_tools_says_so() -> None:
    plain = JinjaTemplate(byte_tokenizer())
    with pytest.raises(DataError, match=r"leaves them out; .* whet:hermes, whet:tags"):
        assert plain.dialect


def test_sessions_are_gone_with_their_play(made: ToolEnvironments) -> None:
    async def open_and_close() -> None:
        session = await made.sessions.open()
        await session.ask({"do": "describe", "with": {}}, 30)  # type: ignore[union-attr]
        group = session._group  # type: ignore[union-attr]
        assert Path(f"/proc/{group}").exists()
        session.close()  # type: ignore[union-attr]
        for _ in range(1000):
            stat = Path(f"/proc/{group}/stat")
            if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the process lives on")

    asyncio.run(open_and_close())


# ----------------------------------------------------------------------------------- tools that ship


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("1/3", "0.333333333333"),
        ("0.1+0.2", "0.3"),
        ("2**-2", "0.25"),
        ("7//2", "3"),
        ("-7%3", "2"),
        ("2^10", "1024"),
        ("1e3", "1000"),
        ("4**0.5", "2"),
    ],
)
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "1/0", "__import__('os')", "a+1", "2 +", "(" * 300, "9" * 501, "True", "1e400", "-8**0.5*x", "'a'*9"],
)
def test_the_calculator_refuses_what_is_no_number(expression: str) -> None:
    with pytest.raises((ValueError, ArithmeticError)):
        calculator(expression)
