"""A Python interpreter as a tool: a session in the sandbox for each play, which keeps its variables."""

from __future__ import annotations

import inspect
import json
import random
from typing import ClassVar

from whet.envs.tools import console
from whet.errors import EnvironmentFailure, SandboxError
from whet.sandbox.base import Limits, ProgramOutcome, ProgramSession, Status
from whet.sandbox.programs import LocalSandbox
from whet.target import TargetError

START_S = 30.0
"""Until an interpreter answers for the first time."""


class Python:
    """An environment with one tool. What a call does wrong is its observation, and the play goes on."""

    _sandbox: ClassVar[LocalSandbox]
    _limits: ClassVar[Limits]
    _program: ClassVar[str]

    @classmethod
    def load(cls, call_s: float, memory_mb: int, output_characters: int, sandbox: str) -> None:
        """Open the sandbox, from which every play's interpreter is forked. Raises `TargetError` where there is none."""
        try:
            cls._sandbox = LocalSandbox(sandbox)
        except SandboxError as error:
            raise TargetError(f"the python tool needs a sandbox; {error}") from error
        cls._limits = Limits(deadline_s=call_s, memory_mb=memory_mb, output_kb=max(1024, output_characters // 128))
        cls._program = f"{inspect.getsource(console)}\nserve({output_characters})\n"

    def __init__(self) -> None:
        self._session: ProgramSession | None = None
        self._seed = 0

    def reset(self) -> None:
        """Nothing of an earlier play is there; random numbers follow from the play's seed."""
        self._seed = random.getrandbits(32)

    async def python(self, code: str) -> str:
        """Run Python code. Variables stay for the next call; what is printed and the last expression are shown.

        Args:
            code: One or more lines of Python.

        """
        if self._session is None:
            self._session = await self._begun()
        said = await self._session.ask(json.dumps(code))
        if said.status is Status.FINISHED:
            return _text(said) or "(no output)"
        await self._session.close()
        self._session = None
        if said.status is Status.MACHINERY:
            raise EnvironmentFailure(f"the sandbox failed: {said.note}")
        raise RuntimeError(f"{self._ended(said)}; its variables are lost")

    async def _begun(self) -> ProgramSession:
        """An interpreter that answers. The sandbox that all plays share may be gone: then one of this play's own."""
        for _ in range(2):
            session = await self._sandbox.open(self._program, limits=self._limits)
            said = await session.ask(json.dumps(f"import random\nrandom.seed({self._seed})"), deadline_s=START_S)
            if said.status is Status.FINISHED:
                return session
            await session.close()
        raise EnvironmentFailure(f"no interpreter could be started: {said.note or said.status}")

    def _ended(self, said: ProgramOutcome) -> str:
        match said.status:
            case Status.TIMEOUT:
                return f"the interpreter did not answer within {self._limits.deadline_s:g} s and was killed"
            case Status.OUTPUT:
                return "the interpreter wrote too much and was killed"
            case Status.MEMORY:
                return f"the interpreter used more than {self._limits.memory_mb} MB and was killed"
            case _:
                return f"the interpreter ended ({said.status})"


def _text(said: ProgramOutcome) -> str:
    """What a call printed, and what its child processes did; a reply that the code forged is text, too."""
    try:
        printed = json.loads(said.stdout)
    except ValueError:
        printed = said.stdout
    return "\n".join(filter(None, [str(printed).rstrip("\n"), said.stderr.rstrip("\n")]))
