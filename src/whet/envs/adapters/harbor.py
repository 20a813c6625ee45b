"""Task folders of Harbor (0.25): rows from the folders, and its own trial plays one, with our endpoint as the model.

A trial needs what Harbor runs tasks in: a container engine, a service, or a class of one's own (`import_path`).
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from whet.errors import EnvironmentFailure
from whet.target import TargetError

CANARY = re.compile(r"(<!--.*canary.*-->|#.*canary.*)", re.IGNORECASE)
"""A line at the top of an instruction that marks it as a benchmark's, and is not shown."""


class Tasks:
    """Plays one task when it is called."""

    _folder: ClassVar[Path]
    _trial: ClassVar[Mapping[str, Any]]

    @classmethod
    def load(cls, folder: str, **trial: Any) -> None:
        """`folder`: of task folders; `trial`: sections of Harbor's trial: `agent`, `environment`, `verifier`."""
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the web for prices, in every play
        try:
            import harbor.trial.trial  # noqa: F401 - what takes seconds is loaded once
            import litellm  # noqa: F401
        except ImportError as error:
            raise TargetError(f"kind: harbor needs harbor 0.25 where it runs, as python: says ({error})") from error
        cls._folder, cls._trial = Path(folder), trial

    @classmethod
    def rows(cls, folder: str, **_: Any) -> list[dict[str, Any]]:
        """A row for each task folder. Raises `TargetError` for one that is not whole."""
        found = sorted(path.parent for path in Path(folder).glob("*/task.toml"))
        if not found:
            raise TargetError(f"{folder}: holds no task folder (NAME/task.toml)")
        return [{"id": task.name, "prompt": _instruction(task), "folder": task.name} for task in found]

    def __call__(self, told: Mapping[str, Any]) -> dict[str, float]:
        """The rewards that the task's tests write."""
        from harbor.models.trial.config import TrialConfig
        from harbor.trial.trial import Trial

        url = os.environ["OPENAI_BASE_URL"]
        agent = self._trial.get("agent") or {"name": "terminus-2", "kwargs": {"api_base": url}}
        agent = {**agent, "model_name": f"openai/{os.environ['WHET_MODEL']}"}
        task = {"path": self._folder / told["folder"]}
        with tempfile.TemporaryDirectory() as trials:
            config = TrialConfig.model_validate({**self._trial, "task": task, "trials_dir": trials, "agent": agent})

            async def play() -> Any:
                return await (await Trial.create(config)).run()

            result = asyncio.run(play())
        if result.reward_valid:
            return {name: float(value) for name, value in result.verifier_result.rewards.items()}
        why = result.exception_info
        said = "no reward was written" if why is None else f"{why.exception_type}: {why.exception_message}"
        if str(result.failure_cause).startswith("agent_"):
            raise RuntimeError(f"harbor: {said}")
        raise EnvironmentFailure(f"harbor: {said}")


def _instruction(task: Path) -> str:
    """What the agent is told; of a task of several steps, first."""
    try:
        config = tomllib.loads((task / "task.toml").read_text(encoding="utf-8"))
        steps = config.get("steps", [])
        part = task / "steps" / str(steps[0]["name"]) if steps else task
        lines = (part / "instruction.md").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{task}: no task of Harbor ({error})") from error
    if not any((folder / "test.sh").is_file() for folder in (part / "tests", task / "tests")):
        raise TargetError(f"{task}: has no tests/test.sh, which writes the reward")
    while lines and (CANARY.fullmatch(lines[0].strip()) or not lines[0].strip()):
        lines.pop(0)
    return "\n".join(lines).strip()
