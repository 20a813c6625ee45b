"""Presets: named points of a section, as the keys in which they differ from its defaults (`presets.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_READ = yaml.safe_load((Path(__file__).parent / "presets.yaml").read_text(encoding="utf-8"))
PRESETS: Mapping[str, Mapping[str, Any]] = _READ["policy"]
"""Points of `PolicyConfig`."""
SUMS: Mapping[str, Mapping[str, Any]] = _READ["preference"]
"""Points of `LossConfig` beside the losses that stand alone."""


def kind_of(value: Any) -> Any:
    """The `kind` of a clip as it is written or as it was loaded; with a `path` function, else ppo."""
    if isinstance(value, dict) and "path" in value:
        return "function"
    return value.get("kind", "ppo") if isinstance(value, dict) else getattr(value, "kind", "ppo")


def with_preset(data: Any, presets: Mapping[str, Mapping[str, Any]]) -> Any:
    """A section as it was written, with what its `preset` says filled in; text alone is a preset's name.

    Keys beside the preset replace its own, inside an axis number by number; `null` takes an axis away. Another `kind`
    of an axis begins from that kind's own defaults. What is no section or names no preset is left for pydantic to name.
    """
    if isinstance(data, str):
        data = {"preset": data}
    name = data.get("preset") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in presets:
        return data
    merged = dict(data)
    for axis, value in presets[name].items():
        given = data.get(axis)
        if axis not in data:
            merged[axis] = value
        elif isinstance(value, dict) and isinstance(given, dict):
            same_kind = kind_of({**value, **given}) == kind_of(value)
            merged[axis] = {**value, **given} if same_kind else given
    return merged
