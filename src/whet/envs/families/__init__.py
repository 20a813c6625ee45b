"""Task families that make their own problems, endless and reproducible. A new one is a file of its own."""

from __future__ import annotations

from whet.config import GeneratedConfig
from whet.envs.families.base import Arithmetic, Family
from whet.envs.families.countdown import Countdown
from whet.envs.families.functions import Functions

__all__ = ["FAMILIES", "Family", "family"]

FAMILIES: dict[str, type[Arithmetic] | type[Countdown] | type[Functions]] = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "functions": Functions,
}


def family(config: GeneratedConfig) -> Family:
    """The task family that a recipe's `generate:` names."""
    return FAMILIES[config.generate](config)
