"""The environment of a stage's tasks: tools, and a class whose methods are tools, with what a play may cost."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from whet.config.strict import PythonFile, PythonObject, Strict


class LimitsConfig(Strict):
    """What one play may cost."""

    turns: int = Field(8, ge=1)
    """Answers of the policy; a play that is not over by then is truncated."""
    calls: int | None = Field(None, ge=1)
    """Calls in all; then calls are answered by an error, and the next turn that calls ends the play."""
    calls_per_turn: int = Field(8, ge=1)
    call_s: float = Field(10.0, gt=0)
    """Seconds of one call; a later one is killed with its process, and the play scored lowest."""
    episode_s: float = Field(120.0, gt=0)
    """Seconds of all calls of a play."""
    observation_tokens: int = Field(1000, ge=2)
    """Of a longer result the middle is left out."""
    episode_tokens: int | None = Field(None, ge=1)
    """Tokens of prompt, answers and results together; None: as many as the model attends to."""


class FunctionTool(Strict):
    """A function that is a tool; it has type hints and a docstring."""

    path: PythonFile
    """`file.py:function` or `module:function`."""


class EnvironmentConfig(Strict):
    """A class whose public methods are tools, or functions that are tools, or both."""

    free: ClassVar[frozenset[str]] = frozenset({"processes"})

    path: PythonObject = ""
    """The class: `file.py:Class` or `module:Class`. Empty: functions alone; an answer without a call ends a play. From
    Python also a class of the environment door, whose plays are then in this process."""
    options: dict[str, Any] = {}
    """What its `load` (once), or else its constructor (for each play), is given."""
    system: Literal["docstring"] | None = None
    """docstring: that of the class is the system message of tasks that have none."""
    tools: list[FunctionTool] = []
    """Further tools."""
    limits: LimitsConfig = LimitsConfig()
    processes: int = Field(128, ge=1)
    """Plays at once, each in a process of its own."""

    @model_validator(mode="after")
    def _check(self) -> EnvironmentConfig:
        if not self.path and (not self.tools or self.options or self.system):
            raise ValueError("path must name a class (file.py:Class), or tools functions, without options and system")
        return self
