"""The sandbox doors: results of trusted code in other processes (`workers`), and untrusted programs (`Sandbox`).

What happens over there comes back as a result; a failure is a result too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""What crosses a process boundary: data only, never code and never a pickle."""


class FailureKind(StrEnum):
    """What went wrong over there."""

    START = "start"
    """The worker could not load its code, or not in time."""
    TIMEOUT = "timeout"
    """No answer before the deadline; the worker was killed."""
    CRASH = "crash"
    """The worker died, or answered something that is no frame."""
    RAISED = "raised"
    """The code raised, or its value is not JSON; the worker lives on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no value, in one printable line."""

    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A value, or a failure where `failure` is set."""

    value: JSON = None
    failure: Failure | None = None


class Status(StrEnum):
    """How a program ended. All but `MACHINERY` are its own doing."""

    FINISHED = "finished"
    """It exited with code 0; of a session: it replied."""
    EXITED = "exited"
    """It raised, or exited with another code."""
    SIGNALLED = "signalled"
    """A signal ended it: a crash in C code, or a limit."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    """It raised MemoryError and ended by it, or its processes together used more than they may."""
    OUTPUT = "output"
    """It wrote more than it may, and was killed."""
    BROKE = "broke"
    """It broke its sandbox twice, the second time alone in one, while another program ran well."""
    MACHINERY = "machinery"
    """The sandbox failed, twice, and for another program too: nothing is known of this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use. Memory is the address space of each process, and in all what the profile's page says."""

    deadline_s: float = 10.0
    memory_mb: int = 512
    output_kb: int = 1024
    """Of standard output, and of standard error."""
    file_mb: int = 32
    """All of its files together, where it may write any."""
    processes: int = 32
    """And threads, together; the profile's page says where."""


USUAL = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramOutcome:
    """What became of a program."""

    status: Status
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    wall_s: float = 0.0
    """Seconds of its own: since it began to run, or was asked; not those in which it waited for its turn."""
    note: str = ""
    """In words, where the status does not say it all."""


class ProgramSession(Protocol):
    """A program that goes on: it reads a line, and writes one."""

    async def ask(self, line: str, *, deadline_s: float | None = None) -> ProgramOutcome:
        """Its reply as `stdout`, and what it wrote to standard error meanwhile; any other status is its end."""

    async def close(self) -> None:
        """Kill it and what it started. May be called twice."""


class Sandbox(Protocol):
    """Runs untrusted Python programs. Never raises for what they do."""

    @property
    def protections(self) -> Mapping[str, bool]:
        """What was tried when it was made, by a program that attacks: whether each held."""

    def describe(self) -> str:
        """What it is and what it stops, in one line."""

    async def run(
        self, program: str, files: Mapping[str, bytes] = {}, stdin: bytes = b"", limits: Limits = USUAL
    ) -> ProgramOutcome:
        """Run it to its end. `files` lie in its working folder; ValueError for a name that leads out of it."""

    async def open(self, program: str, files: Mapping[str, bytes] = {}, limits: Limits = USUAL) -> ProgramSession:
        """Start it, to be asked line by line. Raises `SandboxError` where there are no sessions."""

    def close(self) -> None:
        """End everything that was started. May be called twice."""
