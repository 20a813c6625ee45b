"""Domains of tau2-bench: tools over a database, a policy, and a user that is a model (`kind: dialogue`).

A play is worth 1 where the database is what the task's actions leave (an action that raises changes nothing, as in
tau2's own evaluator) and every text that was to be said to the user was; 0 otherwise. What only a model can judge
(`NL_ASSERTION`) and assertions about the environment are not looked at, and domains whose user has tools (telecom) are
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

from whet.envs.tools.schema import RemoteTool
from whet.target import TargetError

GREETING = "Hello!"
"""With which the user begins: tau2's users answer a greeting."""


class Domain:
    """An environment whose process holds the domain's database."""

    _environment: ClassVar[Any]
    _tasks: ClassVar[Mapping[str, Any]]

    @classmethod
    def load(cls, domain: str) -> None:
        """`domain`: airline, retail or another of the package's without tools of the user."""
        found = _domain(domain)
        cls._environment, cls._tasks = found.get_environment(), {task.id: task for task in found.get_tasks()}
        if cls._environment.user_tools is not None:
            raise TargetError(f"tau2 {domain}: its user has tools, which a simulated user of ours has not")

    @classmethod
    def rows(cls, domain: str) -> list[dict[str, Any]]:
        """Its tasks: the policy as system message, and the user's scenario."""
        found = _domain(domain)
        system = {"role": "system", "content": found.get_environment().get_policy()}
        prompt = [system, {"role": "user", "content": GREETING}]
        tasks = {task.id: str(task.user_scenario) for task in found.get_tasks()}
        return [{"id": name, "prompt": prompt, "task": name, "scenario": scenario} for name, scenario in tasks.items()]

    def offered(self) -> list[RemoteTool]:
        """The domain's."""
        described = (tool.openai_schema["function"] for tool in self._environment.get_tools())
        named = [(each["name"], each["description"], each["parameters"]) for each in described]
        return [RemoteTool.of(partial(self._used, name), name, about, schema) for name, about, schema in named]

    def reset(self, task: str) -> None:
        """Put the database into the task's first state."""
        self._task, self._said = self._tasks[task], list[str]()
        began = self._task.initial_state
        if began is not None:
            self._environment.set_state(
                initialization_data=began.initialization_data,
                initialization_actions=began.initialization_actions,
                message_history=began.message_history or [],
            )
        self._gold = copy.deepcopy(self._environment)

    def user(self, message: str) -> None:
        """Notes what the user was told; a model answers it."""
        self._said.append(message.lower().replace(",", ""))

    def reward(self) -> dict[str, float]:
        """1 for the right database and all that was to be said."""
        asked = self._task.evaluation_criteria
        for action in (asked and asked.actions) or []:
            try:
                self._gold.use_tool(action.name, **action.arguments)
            except Exception:  # noqa: BLE001 - as in tau2, where it is a warning
                continue
        right = self._gold.get_db_hash() == self._environment.get_db_hash()
        texts = [text.lower() for text in (asked and asked.communicate_info) or []]
        told = all(any(text in said for said in self._said) for text in texts)
        return {"reward": float(right and told)}

    def _used(self, name: str, /, **arguments: Any) -> str:
        shown: str = self._environment.to_json_str(self._environment.use_tool(name, **arguments))
        return shown


def _domain(name: str) -> Any:
    try:
        return import_module(f"tau2.domains.{name}.environment")
    except ImportError as error:
        raise TargetError(f"tau2 has no domain {name!r}, or cannot be imported here ({error})") from error
