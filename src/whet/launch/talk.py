"""Talking to a model: what `whet chat` does, apart from reading and printing."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from whet.config import ModelConfig, Recipe, SamplingConfig, TrainConfig
from whet.config.environment import EnvironmentConfig
from whet.envs.base import Task
from whet.envs.tools.play import Play, ToolEnvironments
from whet.errors import DataError, EnvironmentFailure, PolicyFault, RunError
from whet.files import is_sealed, read_json
from whet.launch.world import LocalWorld
from whet.models.locate import locate, run_of
from whet.models.tokenizer import require_same_template
from whet.pipeline.playing import sampling_params
from whet.pipeline.run import Run
from whet.pipeline.stage import Policy
from whet.records import Message, seed_of
from whet.sampling.base import Request, run
from whet.training.checkpoint import newest_generation

T = TypeVar("T")


@dataclass(kw_only=True)
class ChatSession:
    """A conversation with one model; every answer is sampled with a seed of its own."""

    policy: Policy
    sampling: SamplingConfig
    about: str = ""
    """Which model it is."""
    unfinished: bool = False
    """Whether it is not what was named: a checkpoint, or what an earlier stage made."""
    seed: int = 0
    system: str = ""
    """A system message that every conversation begins with; empty: none."""
    messages: list[Message] = field(default_factory=list)

    environment: ToolEnvironments | None = None
    """Runs the tools that the model may call, if any."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The columns of the environment's task."""
    _play: Play | None = None

    def say(self, text: str) -> str:
        """The model's answer to one more user message, with what it called on the way; `DataError` without room."""
        if self.system and not self.messages:
            self.messages.append(Message(role="system", content=self.system))
        self.messages.append(Message(role="user", content=text))
        if self.environment is not None and self._play is None:
            self._play = self.environment.make(Task(id="chat", messages=tuple(self.messages), columns=self.row))
            self.messages[:] = _from_environment(self._play.start(seed=self.seed)).messages
        shown: list[str] = []
        while True:
            answer = self._answer()
            self.messages.append(replace(answer, content=answer.written, tool_calls=()) if answer.written else answer)
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
        stop = (*params.stop, *self.policy.template.stops(tools))
        params = replace(params, max_tokens=min(params.max_tokens, room), stop=stop)
        request = Request(prompt=prompt, seed=seed_of(self.seed, len(self.messages)), params=params)
        completion = run(self.policy.sampler.sample(request))
        return self.policy.template.parse(completion.tokens.tolist(), completion.ending, tools)

    def reset(self) -> None:
        """Forget the conversation, and end its play."""
        self.messages.clear()
        if self._play is not None:
            _from_environment(self._play.close())
            self._play = None

    def describe(self) -> list[str]:
        """The model, what ends its answers and how it is sampled, a line each."""
        ends = " or ".join(self.policy.template.decode([token]) for token in sorted(self.policy.template.stop_ids))
        how = "greedy" if self.sampling.temperature == 0 else f"temperature {self.sampling.temperature:g}"
        return [
            f"model: {self.about}; {self.policy.precision}, {self.policy.max_length:,} tokens at most",
            f"an answer ends with {ends}",
            f"sampling: {how}, at most {self.sampling.max_tokens} tokens, seed {self.seed}",
        ]


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
    system: str = "",
    environment: EnvironmentConfig | None = None,
    row: Mapping[str, Any] | None = None,
    chat_template: Path | None = None,
) -> ChatSession:
    """Talk to a run folder (its last model, or `RUN@stage`), a model directory, a hub id or a built-in model.

    Of a stage that is not finished it is the last checkpoint; of a run whose next stage has none, what came before.
    `chat_template` replaces a model's own, where it was not trained with one.
    """
    made = None if environment is None else ToolEnvironments(environment)
    policy, about, unfinished = open_policy(what, sampling, chat_template)
    return ChatSession(
        policy=policy,
        sampling=sampling,
        about=about,
        unfinished=unfinished,
        seed=seed,
        system=system,
        environment=made,
        row=row or {},
    )


def open_policy(what: str, sampling: SamplingConfig, chat_template: Path | None = None) -> tuple[Policy, str, bool]:
    """What is named, at work, which model it is in words, and whether it is not finished."""
    note = ""
    if found := run_of(what):
        name, asked = found
        run, stage = _next_stage(Path(name), asked)
        generation = None if stage is None else newest_generation(run.checkpoints(stage))
        if stage is not None and generation is not None:
            section: Any = run.recipe.stages[stage]
            model = run.model_of(stage)
            if chat_template is not None:
                require_same_template(model.model_copy(update={"chat_template": chat_template}), model)
            needs = run.kind(stage).needs(section)
            critic = needs is not None and needs.critic is not None and needs.critic.share_trunk
            policy = LocalWorld().policy(model, section.train, sampling, with_value=critic)
            policy.trainer.load(generation.folder)
            return policy, f"{name}@{stage}, not finished: its checkpoint after step {generation.step}", True
        note = f", while {stage} has no checkpoint yet" if stage is not None and not asked else ""
    where = locate(what)[0]
    policy = LocalWorld().policy(ModelConfig(path=what, chat_template=chat_template), TrainConfig(), sampling)
    return policy, (what if where == what else f"{what} ({where})") + note, bool(note)


def _next_stage(folder: Path, asked: str) -> tuple[Run, str | None]:
    """The run, and the first stage that is to make a model and is not finished; of the one that is asked for, if so."""
    try:
        run = Run(recipe=Recipe.model_validate(read_json(folder / "recipe.json")), folder=folder)
    except ValidationError as error:
        raise RunError(
            f"{folder / 'recipe.json'}: no recipe of this version of whet; name RUN/stages/NN-NAME/model"
        ) from error
    makers = (name for name, stage in run.recipe.stages.items() if stage.makes == "model" and asked in ("", name))
    return run, next((name for name in makers if not is_sealed(run.stage_folder(name))), None)
