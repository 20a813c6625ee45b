"""Talking to a model: what `whet chat` does, apart from reading and printing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from whet.config import ModelConfig, SamplingConfig, TrainConfig
from whet.errors import DataError, RunError
from whet.files import is_sealed, read_json
from whet.launch.world import LocalWorld
from whet.pipeline.playing import sampling_params
from whet.pipeline.stage import Policy
from whet.records import Message, seed_of
from whet.sampling.base import Request
from whet.sampling.bridge import run


@dataclass
class ChatSession:
    """A conversation with one model; every answer is sampled with a seed of its own."""

    policy: Policy
    sampling: SamplingConfig
    seed: int = 0
    messages: list[Message] = field(default_factory=list)

    def say(self, text: str) -> str:
        """The model's answer to one more user message; `DataError` once there is no room for one."""
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


def open_conversation(what: str, sampling: SamplingConfig, *, seed: int = 0) -> ChatSession:
    """Talk to a run folder (its last model, or `RUN@stage`), a model directory, a hub id or a built-in model."""
    policy = LocalWorld().policy(ModelConfig(path=find_model(what)), TrainConfig(), sampling)
    return ChatSession(policy=policy, sampling=sampling, seed=seed)


def find_model(what: str) -> str:
    """The path of the model that `what` names; `RunError` for a run that has none yet."""
    name, _, stage = what.partition("@")
    if not (Path(name) / "recipe.json").is_file():
        return what
    done = [folder for folder in sorted((Path(name) / "stages").glob("*")) if is_sealed(folder)]
    made = {
        folder.name.partition("-")[2]: folder / "model"
        for folder in done
        if (folder / "model" / "config.json").is_file()
    }
    if stage and stage not in made:
        raise RunError(f"{name}: no stage {stage!r} has made a model; there are: {', '.join(made) or 'none yet'}")
    if not made:
        stages = ", ".join(read_json(Path(name) / "recipe.json")["stages"])
        raise RunError(f"{name}: none of its stages ({stages}) has made a model yet; run it to the end first")
    return str(made[stage] if stage else list(made.values())[-1])
