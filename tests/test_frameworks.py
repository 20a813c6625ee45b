"""Environments of other frameworks, in an interpreter of their own: stand-ins here, the real ones where they are given.

`WHET_VERIFIERS_PYTHON=VENV/bin/python` (likewise OPENENV, HARBOR, TAU2) plays the same with the package that is there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.test_tools import TEMPLATE, call, play, results
from whet.cli.app import main
from whet.config.environment import EnvironmentConfig
from whet.config.rewards import EnvironmentReward
from whet.envs.adapters.openenv import OpenEnv
from whet.envs.base import Task
from whet.envs.rewards.build import build_rubric
from whet.envs.tools.play import ToolEnvironments
from whet.envs.tools.schema import RemoteTool
from whet.errors import ConfigError, EnvironmentFailure
from whet.launch.environment import try_environment, write_rows
from whet.models.create import byte_tokenizer
from whet.records import Episode, Message, Outcome
from whet.rollouts.play import Player
from whet.sampling.base import SamplingParams
from whet.sampling.scripted import ScriptedSampler

HERE = Path(__file__).parent / "frameworks"


@pytest.fixture(params=["stand-in", "real"])
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The interpreter of a framework by its name."""

    def given(name: str) -> str:
        variable = f"WHET_{name.upper()}_PYTHON"
        real = request.param == "real"
        if real and variable not in os.environ:
            pytest.skip(f"{variable} names no interpreter")
        parts = [HERE] if real else [HERE, HERE / "standins"]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, parts)))
        return os.environ[variable] if real else sys.executable

    return given


def of_program(config: EnvironmentConfig, says: Sequence[str], **columns: Any) -> Episode:
    """The episode of a program whose policy says these texts."""
    pytest.importorskip("starlette", reason="needs whet[serve]")
    from whet.envs.endpoint.play import ProgramEnvironments

    made = ProgramEnvironments(config)
    with closing(made):
        player = Player(
            sampler=ScriptedSampler(says, encode=TEMPLATE._encoder.one, decode=byte_tokenizer().decode),
            template=TEMPLATE,
            environment=made.make,
            rubric=build_rubric([EnvironmentReward(kind="environment")]),
            params=SamplingParams(max_tokens=200, stop_ids=TEMPLATE.stop_ids),
            max_length=4000,
            max_turns=4,
        )
        task = Task(id="1", messages=(Message(role="user", content="Go."),), columns=columns)
        (group,) = player.play([task], 1, step=1, seed=0).groups
    return group.episodes[0]


def rows(section: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    write_rows(json.dumps(section), "", folder / "rows.jsonl")
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------- an interpreter of its own


TALK = """
class Talk:
    def reset(self):
        self.said = []

    def user(self, message):
        self.said.append(message)
        return "And?"

    def over(self):
        return len(self.said) == 2

    def reward(self):
        import sys
        return {"prefix": float(sys.prefix.endswith("bare")), "others": float("pydantic" in sys.modules)}
"""
ONE = """
import urllib.request, json, os

class One:
    @classmethod
    def load(cls, worth):
        cls.worth = worth

    def __call__(self, task):
        asked = {"model": os.environ["WHET_MODEL"], "messages": task["messages"]}
        key = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
        url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(asked).encode(), key)).read()
        return self.worth
"""
LOOK = """
class Look:
    def look(self, key: str) -> str:
        '''Look a key up.'''
        return key
"""


def test_a_class_runs_where_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whet the far side has this package's own files alone; what reads hints must be there for tools of a class."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    for name, text in (("talk.py", TALK), ("look.py", LOOK), ("one.py", ONE)):
        (tmp_path / name).write_text(text)
    with closing(ToolEnvironments(EnvironmentConfig(path=f"{tmp_path}/talk.py:Talk", python=python))) as made:
        (episode,) = play(made, ["One.", "Two."])
    assert episode.outcome is Outcome.FINISHED and len(episode.turns) == 2
    assert dict(episode.score.parts)["environment/prefix"] == 1.0
    assert dict(episode.score.parts)["environment/others"] == 0.0
    program = EnvironmentConfig(kind="endpoint", path=f"{tmp_path}/one.py:One", python=python, options={"worth": 0.5})
    assert of_program(program, ["Yes."]).score.value == 0.5
    with pytest.raises(ConfigError, match="need pydantic and docstring_parser where their"):
        ToolEnvironments(EnvironmentConfig(path=f"{tmp_path}/look.py:Look", python=python))


def test_an_interpreter_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no process could be started.*/none"):
        ToolEnvironments(EnvironmentConfig(kind="openenv", python=tmp_path / "none", options={"url": "http://x"}))


# ------------------------------------------------------------------------------------------------ frameworks


def test_a_taskset_of_verifiers_is_played_by_its_own_rollout(python: Any, tmp_path: Path) -> None:
    section = {"kind": "verifiers", "python": python("verifiers"), "options": {"taskset": "capitals"}}
    assert [(row["id"], row["prompt"], row["index"]) for row in rows(section, tmp_path)] == [
        ("France", "What is the capital of France?", 0),
        ("Italy", "What is the capital of Italy?", 1),
    ]
    config = EnvironmentConfig.model_validate(section)
    right = of_program(config, ["Rome is the capital of Italy."], index=1)
    assert right.messages[0].content == "What is the capital of Italy?"
    assert dict(right.score.parts) == {"environment": 2.0, "environment/right": 2.0, "environment/short": 0.0}
    broken = of_program(config, ["crash", "crash"], index=0)
    assert (broken.outcome, broken.score.value) == (Outcome.ENVIRONMENT_ERROR, None)
    cut = of_program(config, ["long " * 100], index=0)
    assert cut.score.value == 0.0 and cut.score.outcome is Outcome.POLICY_ERROR


@pytest.fixture
def rooms(python: Any) -> Iterator[dict[str, Any]]:
    """The section of a server that runs."""
    interpreter = python("openenv")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    section = {"kind": "openenv", "python": interpreter, "options": {"url": url}}
    if interpreter == sys.executable:
        server = HTTPServer(("127.0.0.1", port), _Schema)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield section
        server.shutdown()
        return
    process = subprocess.Popen([interpreter, "-m", "uvicorn", "rooms:app", "--port", str(port)])
    try:
        for _ in range(600):
            with suppress(OSError), urlopen(f"{url}/schema"):
                break
            time.sleep(0.1)
        yield section
    finally:
        process.kill()
        process.wait()


class _Schema(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        number = {"type": "integer"}
        action = {"description": "Guess the number.", "properties": {"number": number, "metadata": {}}}
        body = json.dumps({"action": {**action, "type": "object", "required": ["number"]}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_of_openenv_is_asked_over_its_socket(rooms: dict[str, Any]) -> None:
    turns = [f'act={{"number": {number}}}' for number in (3, '"x"', 100, 5, 5)]
    looked = try_environment(json.dumps(rooms), "", "{wanted: 5}", turns, "Begin.")
    assert looked.same and looked.tools[0]["function"]["description"] == "Guess the number."
    assert list(looked.tools[0]["function"]["parameters"]["properties"]) == ["number"]
    assert looked.play == (
        "user: Begin.\n\nguess",
        "assistant: act {'number': 3} [ok]",
        "tool: wrong",
        "(reward -0.25, state None)",
        "assistant: act {'number': 'x'} [bad_arguments]",
        "tool: error: act: number: 'x' is not of type 'integer'",
        "(reward None, state None)",
        "assistant: act {'number': 100} [raised]",
        "tool: error: ValueError: too large",
        "(reward None, state None)",
        "assistant: act {'number': 5} [ok]",
        "tool: right",
        "(reward 1.0, state None)",
        "(worth {'reward': 0.75})",
    )


def test_what_the_policy_says_may_be_the_action(rooms: dict[str, Any]) -> None:
    """A server that is told words: without a tool, until it says that it is done."""
    section = {**rooms, "options": {**rooms["options"], "text": "number"}}
    looked = try_environment(json.dumps(section), "", "{wanted: 5}", ["4", "500", "5", "5"], "Begin.")
    assert looked.tools == () and looked.same
    assert [line for line in looked.play if not line.startswith("(")] == [
        "user: Begin.\n\nguess",
        "assistant: 4",
        "user: wrong",
        "assistant: 500",
        "user: error: too large",
        "assistant: 5",
        "user: right",
    ]
    assert looked.play[-1] == "(worth {'reward': 0.75})"


def test_a_silent_server_of_openenv_is_its_own_fault_and_a_step_that_hangs_the_policys(rooms: dict[str, Any]) -> None:
    """A ping tells them apart."""
    task = Task(id="1", messages=(Message(role="user", content="Begin."),))
    with closing(ToolEnvironments(EnvironmentConfig.model_validate({**rooms, "limits": {"call_s": 6}}))) as made:
        (hung,) = play(made, [call("act", '{"number": 60}')], task)
        assert hung.score.outcome is Outcome.POLICY_ERROR and hung.score.value == 0.0
        (stopped,) = play(made, [call("act", '{"number": 61}')] * 2, task)
    assert stopped.score.outcome is Outcome.ENVIRONMENT_ERROR and stopped.score.value is None
    assert "OpenEnv http" in stopped.score.note


def test_task_folders_of_harbor_are_rows_and_are_played_by_its_trial(
    python: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "tasks" / "hello"
    for name in ("environment", "tests"):
        (task / name).mkdir(parents=True)
    (task / "task.toml").write_text('version = "1.0"\n')
    (task / "environment" / "Dockerfile").write_text("FROM debian\n")
    (task / "instruction.md").write_text("<!-- canary GUID -->\n\nWrite hello into hello.txt.\n")
    (task / "tests" / "test.sh").write_text(
        'grep -qx hello hello.txt && says=1 || says=0\necho $says > "${LOGS:-/logs}/verifier/reward.txt"\n'
    )
    options = {
        "folder": str(tmp_path / "tasks"),
        "agent": {"import_path": "folder:Asks"},
        "environment": {"import_path": "folder:Folder"},
    }
    section = {"kind": "harbor", "python": python("harbor"), "options": options}
    made = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit):
        main(("env", json.dumps({**section, "python": sys.executable}), "--rows", str(made), "--json"))
    assert json.loads(capsys.readouterr().out) == {"ok": True, "rows": str(made), "count": 1}
    assert json.loads(made.read_text()) == {"id": "hello", "prompt": "Write hello into hello.txt.", "folder": "hello"}
    config = EnvironmentConfig.model_validate(section)
    worth = [of_program(config, [f"echo {word} > hello.txt"], folder="hello").score.value for word in ("hello", "bye")]
    assert worth == [1.0, 0.0]
    (task / "tests" / "test.sh").unlink()
    with pytest.raises(ConfigError, match=r"hello: has no tests/test\.sh"):
        rows(section, tmp_path)


TAU2: dict[str, Any] = {
    "stand-in": ("toy", [("sell", {"item": "cup"})], "1,000", 1.0),
    "real": ("mock", [("create_task", {"user_id": "user_1", "title": "Important Meeting"})], "", 1.0),
}


def test_a_domain_of_tau2_is_worth_what_its_actions_leave(python: Any, tmp_path: Path) -> None:
    interpreter = python("tau2")
    domain, gold, words, worth = TAU2["stand-in" if interpreter == sys.executable else "real"]
    section = {"kind": "tau2", "python": interpreter, "options": {"domain": domain}}
    (first, *_) = rows(section, tmp_path)
    assert [message["role"] for message in first["prompt"]] == ["system", "user"]
    row = {"task": first["task"], "script": ["Thanks."]}
    says = [f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(given)}}}</tool_call>' for name, given in gold]
    task = Task(id="1", messages=(Message(role="user", content="Hello!"),), columns=row)
    with closing(ToolEnvironments(EnvironmentConfig.model_validate(section))) as made:
        (right,) = play(made, [*says, f"It is {words}.", "Bye."], task)
        (idle,) = play(made, ["No.", "Bye."], task)
    assert (right.score.value, idle.score.value) == (worth, 0.0), results(right)
    assert [message.content for message in right.messages if message.role == "user"] == ["Hello!", "Thanks."]


def test_a_server_of_openenv_that_has_closed_fails_no_play() -> None:
    """Some close when an episode is done; what it was worth is known by then."""

    class Gone:
        def send(self, _: str) -> None:
            raise RuntimeError("closed")

    play = OpenEnv.__new__(OpenEnv)
    play._socket = Gone()
    play.close()


def test_a_tool_whose_schema_is_none_is_the_environments_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.spec_from_file_location("jsonschema", HERE / "standins" / "jsonschema.py")
    assert found is not None and found.loader is not None
    monkeypatch.setitem(sys.modules, "jsonschema", module := importlib.util.module_from_spec(found))
    found.loader.exec_module(module)
    tool = RemoteTool.of(print, "act", "Act.", {"type": 3})
    with pytest.raises(EnvironmentFailure, match="act: its parameters are no JSON schema"):
        tool.arguments({})
