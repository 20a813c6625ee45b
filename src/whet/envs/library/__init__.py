"""Task families that make their own problems, endless and reproducible. One file each."""

from __future__ import annotations

from whet.config import GeneratedConfig
from whet.envs.library.arithmetic import Arithmetic
from whet.envs.library.base import Family
from whet.envs.library.countdown import Countdown
from whet.envs.library.functions import Functions

__all__ = ["FAMILIES", "Family", "family"]

FAMILIES: dict[str, type[Arithmetic] | type[Countdown] | type[Functions]] = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "functions": Functions,
}


def family(config: GeneratedConfig) -> Family:
    """The task family that a recipe's `generate:` names."""
    return FAMILIES[config.generate](config)
