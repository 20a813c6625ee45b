"""The sandbox door: values go to another process and come back as results, and a failure is a result too."""

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


class Workers(Protocol):
    """Answers payloads elsewhere. Never raises for what the code over there does."""

    def map(self, payloads: Sequence[JSON]) -> list[Result]:
        """One result for each payload, in order."""

    def close(self) -> None:
        """End everything that was started. May be called twice."""
