"""Environments of a recipe: who answers the policy between its turns."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from whet.config.strict import PythonObject, Strict


class EnvironmentConfig(Strict):
    """A Python class of environments (`docs/doors/environment.md`), one object for each play of a task."""

    path: PythonObject
    """`file.py:Class` or `module:Class`, called with the task (and `args`) in this process; from Python also the class
    itself."""
    args: dict[str, Any] = {}
    """Keyword arguments beside the task."""
    max_turns: int = Field(8, ge=1)
    """Answers of an episode; one that is not over by then is truncated."""
