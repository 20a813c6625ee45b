"""Lists of principles: a constitution, one sentence to a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from whet.errors import ConfigError


def read_principles(given: Sequence[str] | Path | None) -> tuple[str, ...]:
    """Principles from a recipe's list, or from a file: a YAML list, or plain text with one a line (# comments).

    Raises `ConfigError` where the file cannot be read or holds none.
    """
    if given is None:
        return ()
    if not isinstance(given, Path):
        return _checked([line.strip() for line in given], "principles")
    try:
        text = given.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if given.suffix in (".yaml", ".yml") else text.splitlines()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"principles: {given}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, list) or not all(isinstance(line, str) for line in found):
        raise ConfigError(f"principles: {given}: must be a list of sentences")
    return _checked([line.strip() for line in found if not line.lstrip().startswith("#")], f"principles: {given}")


def _checked(lines: Sequence[str], place: str) -> tuple[str, ...]:
    kept = tuple(line for line in lines if line)
    if not kept:
        raise ConfigError(f"{place}: there is none; write one sentence a line")
    return kept
