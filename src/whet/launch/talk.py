"""Talking to a model: what `whet chat` does, apart from reading and printing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from whet.config import ModelConfig, Recipe, SamplingConfig, TrainConfig
from whet.errors import DataError, RunError
from whet.files import is_sealed, read_json
from whet.launch.world import LocalWorld
from whet.models.locate import locate, run_of
from whet.pipeline.playing import sampling_params
from whet.pipeline.run import Run
from whet.pipeline.stage import Policy
from whet.records import Message, seed_of
from whet.sampling.base import Request
from whet.sampling.bridge import run
from whet.training.checkpoint import newest_generation


@dataclass(kw_only=True)
class ChatSession:
    """A conversation with one model; every answer is sampled with a seed of its own."""

    policy: Policy
    sampling: SamplingConfig
    about: str = ""
    """Which model it is."""
    seed: int = 0
    system: str = ""
    """A system message that every conversation begins with; empty: none."""
    messages: list[Message] = field(default_factory=list)

    def say(self, text: str) -> str:
        """The model's answer to one more user message; `DataError` once there is no room for one."""
        if self.system and not self.messages:
            self.messages.append(Message(role="system", content=self.system))
        self.messages.append(Message(role="user", content=text))
        prompt = self.policy.template.prompt(self.messages)
        room = self.policy.max_length - len(prompt)
        if room < 1:
            raise DataError(f"the conversation has {len(prompt)} tokens, the model attends to {self.policy.max_length}")
        params = sampling_params(self.sampling, self.policy.template)
        params = replace(params, max_tokens=min(params.max_tokens, room))
        request = Request(prompt=prompt, seed=seed_of(self.seed, len(self.messages)), params=params)
        completion = run(self.policy.sampler.sample(request))
        answer = self.policy.template.parse(completion.tokens.tolist(), completion.ending)
        self.messages.append(answer)
        return answer.content

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def describe(self) -> list[str]:
        """The model, its template and how it is sampled, a line each."""
        ends = " or ".join(self.policy.template.decode([token]) for token in sorted(self.policy.template.stop_ids))
        how = "greedy" if self.sampling.temperature == 0 else f"temperature {self.sampling.temperature:g}"
        return [
            f"model: {self.about}; {self.policy.precision}, {self.policy.max_length:,} tokens at most",
            f"template: the tokenizer's own; an answer ends with {ends}",
            f"sampling: {how}, at most {self.sampling.max_tokens} tokens, seed {self.seed}",
        ]


def open_conversation(what: str, sampling: SamplingConfig, *, seed: int = 0, system: str = "") -> ChatSession:
    """Talk to a run folder (its last model, or `RUN@stage`), a model directory, a hub id or a built-in model.

    Of a stage that is not finished it is the last checkpoint; of a run whose next stage has none, what came before.
    """
    policy, about = _policy(what, sampling)
    return ChatSession(policy=policy, sampling=sampling, about=about, seed=seed, system=system)


def _policy(what: str, sampling: SamplingConfig) -> tuple[Policy, str]:
    """What is named, at work, and which model it is in words."""
    note = ""
    if found := run_of(what):
        name, asked = found
        run, stage = _next_stage(Path(name), asked)
        generation = None if stage is None else newest_generation(run.checkpoints(stage))
        if stage is not None and generation is not None:
            section: Any = run.recipe.stages[stage]
            needs = run.kind(stage).needs(section)
            critic = needs is not None and needs.critic is not None and needs.critic.share_trunk
            policy = LocalWorld().policy(run.model_of(stage), section.train, sampling, with_value=critic)
            policy.trainer.load(generation.folder)
            return policy, f"{name}@{stage}, not finished: its checkpoint after step {generation.step}"
        note = f", while {stage} has no checkpoint yet" if stage is not None and not asked else ""
    where = locate(what)[0]
    policy = LocalWorld().policy(ModelConfig(path=what), TrainConfig(), sampling)
    return policy, (what if where == what else f"{what} ({where})") + note


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
