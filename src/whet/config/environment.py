"""The environment of a stage's tasks: tools, and a class whose methods are tools, with what a play may cost."""

from __future__ import annotations

from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from whet.config.judge import ChatConfig
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


class OwnTool(Strict):
    """A function that is a tool, or a class whose public methods are tools; with type hints and docstrings."""

    kind: Literal["own"] = "own"
    path: PythonFile
    """`file.py:function`, `file.py:Class` or `module:function`."""
    options: dict[str, Any] = {}
    """What a class's `load` (once), or else its constructor (for each play), is given."""

    @property
    def part(self) -> tuple[str, dict[str, Any]]:
        """Where its code is, and what that is given."""
        return self.path, self.options


class ShippedTool(Strict):
    """A tool that comes with whet."""

    target: ClassVar[str]

    @property
    def part(self) -> tuple[str, dict[str, Any]]:
        """Where its code is, and what that is given."""
        return self.target, self.model_dump(mode="json", exclude={"kind"})


class CalculatorTool(ShippedTool):
    """Exact arithmetic."""

    target: ClassVar[str] = "whet.envs.tools.calculator:calculator"
    kind: Literal["calculator"]


class SearchTool(ShippedTool):
    """Passages of a corpus, by BM25; or of a retriever over HTTP."""

    target: ClassVar[str] = "whet.envs.tools.search:Search"
    kind: Literal["search"]
    corpus: Path | None = None
    """JSON lines with `text` or `contents`, and maybe a `title`."""
    engine: Literal["bm25", "tantivy"] = "bm25"
    """Of a corpus. bm25: words as they are (`pip install 'whet[search]'`). tantivy: English stems
    (`pip install 'whet[tantivy]'`)."""
    url: str = ""
    """Or the address of a retriever that runs, of Search-R1's form: http://HOST:PORT/retrieve."""
    top: int = Field(3, ge=1)
    """Passages that a search shows."""
    call_s: float = Field(5.0, gt=0)
    """Of a url: seconds until its answer is there; a later one is the machinery's failure."""

    @model_validator(mode="after")
    def _check(self) -> SearchTool:
        if bool(self.corpus) == bool(self.url):
            raise ValueError("a search is over a corpus (a file), or asks a retriever at its url; give one of the two")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} must be a whole address, http://HOST:PORT/retrieve")
        unread = (
            "engine" if self.url and self.engine != "bm25" else "call_s" if self.corpus and self.call_s != 5 else ""
        )
        if unread:
            raise ValueError(f"{unread} is of a {'corpus' if self.url else 'url'}; remove it")
        return self


class PythonTool(ShippedTool):
    """A Python interpreter in the sandbox, which keeps its variables for the play."""

    target: ClassVar[str] = "whet.envs.tools.python:Python"
    kind: Literal["python"]
    call_s: float = Field(5.0, gt=0)
    """Seconds of one call; a later one is killed with the interpreter, and the play goes on with a new one."""
    memory_mb: int = Field(512, ge=64)
    """Of all its processes together."""
    output_characters: int = Field(20_000, ge=100)
    """Of what a call prints, the rest is left out."""
    sandbox: Literal["agentic", "strong", "default", "minimal"] = "agentic"
    """The profile. agentic: with children and files of its own; minimal stops nothing."""


class SQLTool(ShippedTool):
    """SQLite: a database file, or the tables of the row."""

    target: ClassVar[str] = "whet.envs.tools.sql:SQL"
    kind: Literal["sql"]
    database: Path | None = None
    """A file of SQLite; None: the row's column `tables` has them."""
    write: bool = False
    """Whether tables may be changed, in a copy of its own for each play."""
    rows: int = Field(20, ge=1)
    """Rows of a result that are shown."""
    call_s: float = Field(5.0, gt=0)
    """Seconds of one query; a longer one is interrupted."""
    show: bool = True
    """Whether the definitions of the tables follow the task's message."""


class MCPTool(ShippedTool):
    """The tools of an MCP server (`pip install 'whet[mcp]'`)."""

    target: ClassVar[str] = "whet.envs.tools.mcp:MCP"
    kind: Literal["mcp"]
    command: list[str] = []
    """Starts a server that speaks over standard input and output, one for each play."""
    url: str = ""
    """Or the address of one that runs, http://HOST:PORT/mcp, which all plays share."""
    only: list[str] | None = None
    """Names of the tools that are offered; None: all of them."""

    @model_validator(mode="after")
    def _check(self) -> MCPTool:
        if bool(self.command) == bool(self.url):
            raise ValueError("an MCP server is started by its command, or reached at its url; give one of the two")
        return self


def _kind_of(value: Any) -> str:
    kind = value.get("kind", "own") if isinstance(value, dict) else getattr(value, "kind", "own")
    return str(kind)


SHIPPED: dict[str, type[ShippedTool]] = {
    "calculator": CalculatorTool, "search": SearchTool, "python": PythonTool, "sql": SQLTool, "mcp": MCPTool
}  # fmt: skip
if TYPE_CHECKING:
    ToolConfig = OwnTool | ShippedTool
else:
    _TAGGED = (Annotated[tool, Tag(kind)] for kind, tool in {"own": OwnTool, **SHIPPED}.items())
    ToolConfig = Annotated[reduce(or_, _TAGGED), Discriminator(_kind_of)]


ADAPTERS: dict[str, dict[str, Any]] = {
    "openenv": {"kind": "class", "path": "whet.envs.adapters.openenv:OpenEnv"},
    "tau2": {"kind": "dialogue", "path": "whet.envs.adapters.tau2:Domain"},
    "verifiers": {"kind": "endpoint", "path": "whet.envs.adapters.verifiers:Taskset", "columns": ["index"]},
    "harbor": {"kind": "endpoint", "path": "whet.envs.adapters.harbor:Tasks", "columns": ["folder"]},
}
"""What a kind that is another framework's is short for."""
OF_CALLS = ("calls", "calls_per_turn", "call_s", "observation_tokens")
"""Limits of calls that whet runs itself."""


class EnvironmentConfig(Strict):
    """A class whose public methods are tools, or tools alone, or both, and maybe a simulated user; or a program.

    `kind: sql` (or another tool's) with that tool's keys is short for `tools: [{kind: sql, ...}]`; `kind: verifiers`,
    `openenv`, `harbor` and `tau2` for a class of ours that plays the tasks of that framework.
    """

    free: ClassVar[frozenset[str]] = frozenset({"processes"})

    kind: Literal["class", "dialogue", "endpoint"] = "class"
    """dialogue: a simulated user answers what the policy says without a call. endpoint: a program plays each task, and
    asks the policy as any client asks OpenAI's chat completions."""
    command: list[str] = []
    """endpoint: the program and its arguments. A function of Python is given as `path` instead."""
    columns: list[str] = []
    """endpoint: the columns of a task that the program is told, beside its id and messages."""
    path: PythonObject = ""
    """The class: `file.py:Class` or `module:Class`. Empty: tools alone; an answer without a call ends a play. From
    Python also a class of the environment door, whose plays are then in this process."""
    options: dict[str, Any] = {}
    """What its `load` (once), or else its constructor (for each play), is given; endpoint: a class's `load`."""
    python: Path | None = None
    """The interpreter in which plays run: of a virtual environment with what the class needs and the trainer must not
    have. Python 3.11 or later; nothing of whet is installed there. None: this one."""
    system: Literal["docstring"] | Path | None = None
    """The system message of tasks that have none: docstring, that of the class; or a file with a policy."""
    tools: list[ToolConfig] = []
    """Further tools."""
    user: ChatConfig | None = None
    """dialogue: the model, endpoint or script that plays the user, whom the row's `scenario` describes. None: the row's
    `script` has what the user says, turn by turn."""
    user_tokens: int = Field(256, ge=1)
    """Most tokens of what that model says in a turn."""
    limits: LimitsConfig = LimitsConfig()
    processes: int = Field(128, ge=1)
    """Plays at once, each in a process of its own."""

    @model_validator(mode="before")
    @classmethod
    def _one_tool(cls, given: Any) -> Any:
        """A tool's kind and keys as a list of that tool, and a framework's kind as what it is short for."""
        if isinstance(given, dict) and str(given.get("kind")) in ADAPTERS and "path" not in given:
            return {**given, **ADAPTERS[given["kind"]]}
        if not isinstance(given, dict) or str(given.get("kind")) not in SHIPPED:
            return given
        keys = SHIPPED[given["kind"]].model_fields
        tool = {key: value for key, value in given.items() if key in keys}
        others = {key: value for key, value in given.items() if key not in keys}
        return {**others, "tools": [tool, *others.get("tools", [])]}

    @model_validator(mode="after")
    def _check(self) -> EnvironmentConfig:
        if self.kind == "endpoint":
            return self._check_endpoint()
        if self.command or self.columns:
            raise ValueError("command and columns are of programs; add kind: endpoint")
        played = self.tools or self.kind == "dialogue"
        if not self.path and (not played or self.options or self.system == "docstring"):
            raise ValueError("path must name a class (file.py:Class), or tools be given, without options and docstring")
        if self.user is not None and self.kind != "dialogue":
            raise ValueError("user is for kind: dialogue; set that, or remove user")
        for tool in self.tools:
            if isinstance(tool, SearchTool) and tool.corpus:
                continue  # it has no deadline of its own
            if isinstance(tool, PythonTool | SQLTool | SearchTool) and tool.call_s >= self.limits.call_s:
                raise ValueError(
                    f"{tool.kind}: call_s {tool.call_s:g} must be below limits.call_s {self.limits.call_s:g}, at which "
                    "the play is killed"
                )
        return self

    def _check_endpoint(self) -> EnvironmentConfig:
        if bool(self.path) == bool(self.command) or not isinstance(self.path, str):
            raise ValueError("kind: endpoint needs a command, or a function as path (file.py:function)")
        if self.system or self.tools or self.user or (self.command and (self.options or self.python)):
            raise ValueError(
                "kind: endpoint takes no system, tools or user, and of a command no options or python; the program "
                "says what it says"
            )
        usual = LimitsConfig()
        if unread := [name for name in OF_CALLS if getattr(self.limits, name) != getattr(usual, name)]:
            raise ValueError(f"limits.{unread[0]} is not read: the program runs its own calls; remove it")
        return self
