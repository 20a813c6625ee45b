"""The environment of a stage's tasks: tools, and a class whose methods are tools, with what a play may cost."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from whet.config.strict import PythonFile, Strict


class CalculatorTool(Strict):
    """Exact arithmetic."""

    kind: Literal["calculator"]


class SearchTool(Strict):
    """BM25 over a local corpus (`pip install 'whet[search]'`)."""

    kind: Literal["search"]
    corpus: str
    """A JSONL file; each line has `text` or `contents`, and may have a `title`."""
    top: int = Field(3, ge=1)
    """Passages of a result."""


class FunctionTool(Strict):
    """A function of yours, with type hints and a docstring."""

    kind: Literal["function"]
    path: PythonFile
    """`file.py:function`."""


Tool = Annotated[CalculatorTool | SearchTool | FunctionTool, Field(discriminator="kind")]


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


class EnvironmentBase(Strict):
    """What all environments have."""

    free: ClassVar[frozenset[str]] = frozenset({"processes"})

    limits: LimitsConfig = LimitsConfig()
    processes: int = Field(128, ge=1)
    """Plays at once, each in a process of its own."""


class ClassEnvironment(EnvironmentBase):
    """A class whose public methods are tools."""

    kind: Literal["class"]
    path: PythonFile
    """`file.py:Class`, or `module:Class`."""
    options: dict[str, Any] = {}
    """What its `load` (once), or else its constructor (for each play), is given."""
    system: Literal["docstring"] | None = None
    """docstring: that of the class is the system message of tasks that have none."""
    tools: list[Tool] = []
    """Further tools."""


class ToolsEnvironment(EnvironmentBase):
    """Tools alone: a play ends with the first answer without a call."""

    kind: Literal["tools"]
    tools: list[Tool] = Field(min_length=1)


EnvironmentConfig = Annotated[ClassEnvironment | ToolsEnvironment, Field(discriminator="kind")]
