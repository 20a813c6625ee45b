"""Names that are no keys of a recipe, read from `names.yaml`: former keys, and keys and kinds of other tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """What another tool's name is here."""

    keys: tuple[str, ...]
    """Keys below a stage (or, `out`, of the recipe): the first that the stage at hand has is meant."""
    note: str = ""
    """What else must change, or why there is no key."""
    words: tuple[str, ...] = ()
    """Of code of one's own: what a name may have in it that means these keys."""


@dataclass(frozen=True, slots=True)
class Names:
    """The tables of `names.yaml`."""

    renamed: Mapping[str, list[str]]
    """A former key, and the new one in each section that had it."""
    other_kinds: Mapping[str, str]
    other_commands: Mapping[str, str]
    """A command of another tool, and what is typed here."""
    other_tools: Mapping[str, KnownKeys]
    own_code: tuple[KnownKeys, ...]
    """Where a stage takes `FILE.py:NAME`; the note is the form, with PATH in it."""

    def known(self, name: str) -> KnownKeys | None:
        """Another tool's name, however it is spelled: `--learning-rate` is `learning_rate`."""
        return self.other_tools.get(name.replace("-", "_"))


@cache
def names() -> Names:
    """The tables, read when the first name is unknown."""
    found = yaml.safe_load((Path(__file__).parent / "names.yaml").read_text(encoding="utf-8"))
    tools = {
        name: KnownKeys(tuple(each.get("keys", ())), each.get("note", ""))
        for each in found["other_tools"]
        for name in each["names"]
    }
    own = tuple(KnownKeys(tuple(each["keys"]), each["form"], tuple(each["words"])) for each in found["own_code"])
    commands = {name: line for line, others in found["other_commands"].items() for name in others}
    tables = {key: found[key] for key in ("renamed", "other_kinds")}
    return Names(**tables, other_commands=commands, other_tools=tools, own_code=own)
