"""Talking to a model: what `whet chat` does, apart from reading and printing."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from whet.config import ModelConfig, SamplingConfig, TrainConfig
from whet.config.environment import EnvironmentConfig
from whet.envs.base import Task
from whet.envs.tools.play import Play, ToolEnvironments
from whet.errors import DataError, EnvironmentFailure, PolicyFault, RunError
from whet.files import is_sealed, read_json
from whet.launch.world import LocalWorld
from whet.pipeline.playing import sampling_params
from whet.pipeline.stage import Policy
from whet.records import Message, seed_of
from whet.sampling.base import Request
from whet.sampling.bridge import run

T = TypeVar("T")


@dataclass
class ChatSession:
    """A conversation with one model; every answer is sampled with a seed of its own."""

    policy: Policy
    sampling: SamplingConfig
    seed: int = 0
    messages: list[Message] = field(default_factory=list)

    environment: ToolEnvironments | None = None
    """Runs the tools that the model may call, if any."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The columns of the environment's task."""
    _play: Play | None = None

    def say(self, text: str) -> str:
        """The model's answer to one more user message, with what it called on the way; `DataError` without room."""
        self.messages.append(Message(role="user", content=text))
        if self.environment is not None and self._play is None:
            self._play = self.environment.make(Task(id="chat", messages=tuple(self.messages), columns=self.row))
            self.messages[:] = _from_environment(self._play.start(seed=self.seed)).messages
        shown: list[str] = []
        while True:
            answer = self._answer()
            self.messages.append(answer)
            shown += [answer.content] if answer.content else []
            if self._play is None or not answer.tool_calls:
                return "\n".join(shown)
            observed = _from_environment(self._play.step(answer))
            self.messages += observed.messages
            calls = zip(answer.tool_calls, observed.messages, strict=False)
            shown += [f"[{call.name} {dict(call.arguments)}] {result.content}" for call, result in calls]
            if observed.over:
                return "\n".join(shown)

    def _answer(self) -> Message:
        tools = () if self.environment is None else self.environment.tools
        prompt = self.policy.template.prompt(self.messages, tools, untrusted=bool(tools))
        room = self.policy.max_length - len(prompt)
        if room < 1:
            raise DataError(f"the conversation has {len(prompt)} tokens, the model attends to {self.policy.max_length}")
        params = sampling_params(self.sampling, self.policy.template)
        params = replace(params, max_tokens=min(params.max_tokens, room))
        request = Request(prompt=prompt, seed=seed_of(self.seed, len(self.messages)), params=params)
        completion = run(self.policy.sampler.sample(request))
        return self.policy.template.parse(completion.tokens.tolist(), completion.ending, tools)


def _from_environment(work: Coroutine[Any, Any, T]) -> T:
    try:
        return run(work)
    except (EnvironmentFailure, PolicyFault) as error:
        raise RunError(f"environment: {error}") from error


def open_conversation(
    what: str,
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    environment: EnvironmentConfig | None = None,
    row: Mapping[str, Any] | None = None,
) -> ChatSession:
    """Talk to a run folder (its last model, or `RUN@stage`), a model directory, a hub id or a built-in model."""
    made = None if environment is None else ToolEnvironments(environment)
    policy = LocalWorld().policy(ModelConfig(path=find_model(what)), TrainConfig(), sampling)
    return ChatSession(policy=policy, sampling=sampling, seed=seed, environment=made, row=row or {})


def find_model(what: str) -> str:
    """The path of the model that `what` names; `RunError` for a run that has none yet."""
    name, _, stage = what.partition("@")
    if not (Path(name) / "recipe.json").is_file():
        return what
    done = [folder for folder in sorted((Path(name) / "stages").glob("*")) if is_sealed(folder)]
    made = {folder.name.partition("-")[2]: folder / "model" for folder in done if (folder / "model").is_dir()}
    best = {f"{name}/best": last.parent / "best" for name, last in made.items() if (last.parent / "best").is_dir()}
    if stage and stage not in made | best:
        there = ", ".join(made | best) or "none yet"
        raise RunError(f"{name}: no stage {stage!r} has made a model; there are: {there}")
    if not made:
        stages = ", ".join(read_json(Path(name) / "recipe.json")["stages"])
        raise RunError(f"{name}: none of its stages ({stages}) has made a model yet; run it to the end first")
    return str((made | best)[stage] if stage else list(made.values())[-1])
