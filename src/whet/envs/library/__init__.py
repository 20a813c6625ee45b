"""Task families that make their own problems, endless and reproducible. One file each."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from whet.config import GeneratedConfig
from whet.envs.base import Attempt, Grade, Task
from whet.envs.library.arithmetic import Arithmetic
from whet.envs.library.countdown import Countdown
from whet.envs.library.functions import Functions
from whet.records import Message


class Family(Protocol):
    """Problems by number. What index i is depends on the config and i alone, never on what was asked before."""

    version: ClassVar[int]
    """Raised when the same config gives other problems than before."""

    def task(self, index: int) -> Task:
        """Problem `index`, from 0, for RL and evaluation."""

    def demonstration(self, index: int) -> tuple[Message, ...] | str:
        """Problem `index`, solved: a conversation for SFT, or running text where the config says `plain`."""

    def ranking(self, index: int) -> tuple[str, ...]:
        """`config.answers` answers to problem `index`, each worth less than the one before it."""

    def worth(self, attempt: Attempt) -> float:
        """What an answer is truly worth, from 0 to 1: (2 if right + 1 if it shows its work) / 3."""

    def ratings(self, attempt: Attempt) -> dict[str, float]:
        """The answer by each of `ranking.OBJECTIVES`, from 0 to 1: right, worked (it shows its work), brief."""

    def verify(self, attempt: Attempt) -> Grade:
        """1 for a right answer to one of its tasks, 0 for any other."""


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
