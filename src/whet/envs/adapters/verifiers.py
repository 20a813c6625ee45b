"""Tasksets of verifiers (0.4): its own rollout plays a task, with our endpoint as the model.

The agent is the plain chat loop (`harness: null`) in a subprocess unless `env` says otherwise; every agent of an
environment with several is the policy. Rewards come back by their names, weighed as the taskset weighs them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from whet.errors import EnvironmentFailure
from whet.target import TargetError

PLAIN = {"agent": {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}}
ON_US = ("ProviderError", "HarnessError")
"""What a refusal of ours becomes there, and an agent that failed on an answer; other errors are the machinery's."""


class Taskset:
    """Plays one task when it is called."""

    _env: ClassVar[Any]
    _tasks: ClassVar[list[Any]]

    @classmethod
    def load(cls, taskset: str | Mapping[str, Any], env: Mapping[str, Any] = PLAIN) -> None:
        """`taskset`: its id, or its section `{id, ...}`; `env`: the rest of verifiers' own section of that name."""
        cls._env = _environment(taskset, env)
        cls._tasks = list(cls._env.taskset)

    @classmethod
    def rows(cls, taskset: str | Mapping[str, Any], env: Mapping[str, Any] = PLAIN) -> list[dict[str, Any]]:
        """Its tasks. The prompt is there to be read; what the policy is asked is the rollout's."""
        tasks = [task.data for task in _environment(taskset, env).taskset]
        return [{"id": data.name or str(n), "prompt": data.prompt_text, "index": n} for n, data in enumerate(tasks)]

    def __call__(self, told: Mapping[str, Any]) -> dict[str, float]:
        """Its rewards."""
        import verifiers.v1 as vf

        client = vf.EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")
        asked = vf.ModelContext(client=client, model=os.environ["WHET_MODEL"], sampling=vf.SamplingConfig())
        episode = asyncio.run(self._played(self._tasks[told["index"]], asked))
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        machinery = [error for error in errors if error.type not in ON_US]
        if machinery:
            raise EnvironmentFailure(f"verifiers: {machinery[0].type}: {machinery[0].message}")
        worth: dict[str, float] = {}
        for trace in episode.traces:
            for name, reward in trace.rewards.items():
                if reward is not None:
                    worth[name] = worth.get(name, 0.0) + reward.value
        if errors and not worth:
            raise RuntimeError(f"verifiers: {errors[0].type}: {errors[0].message}")
        return worth

    async def _played(self, task: Any, asked: Any) -> Any:
        async with self._env.serving():
            return await self._env.run_episode(task, asked)


def _environment(taskset: str | Mapping[str, Any], env: Mapping[str, Any]) -> Any:
    try:
        import verifiers.v1 as vf
    except ImportError as error:
        raise TargetError(f"kind: verifiers needs verifiers 0.4 where it runs, as python: says ({error})") from error
    section = {"id": taskset} if isinstance(taskset, str) else dict(taskset)
    return vf.load_environment(vf.resolve_env_config({**env, "taskset": section}))
