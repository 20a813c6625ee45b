"""Task families that make their own problems, endless and reproducible. One file each."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from whet.config import GeneratedConfig
from whet.envs.base import Attempt, Grade
from whet.envs.library.arithmetic import Arithmetic
from whet.envs.library.base import Family
from whet.envs.library.countdown import Countdown
from whet.envs.library.functions import Functions


@runtime_checkable
class ChecksSteps(Protocol):
    """A family that can grade the written steps of an answer as well."""

    def check_steps(self, attempt: Attempt) -> Grade:
        """A grade without a value, with one step score for each written step."""


FAMILIES: dict[str, type[Arithmetic] | type[Countdown] | type[Functions]] = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "functions": Functions,
}


def family(config: GeneratedConfig) -> Family:
    """The task family that a recipe's `generate:` names."""
    return FAMILIES[config.generate](config)
