"""What a stage's artifact follows from, in named parts: its configuration, its seed, and the content of what it reads.

It is written to `STAGE/stage.json` when a stage begins, and compared when the stage is skipped and when it is gone on
with. What differs is named, and refused unless it is accepted by that name or the stage is started over.

    config   {train.lr: 0.01, ...}        every key but those that say where and how fast (`Strict.free`)
    inputs   {data: {path, files: ...}}   SHA-256 of all that the stage reads: rows, models, templates, functions
    code     the version of whet          told, and not compared

Inputs are compared by content, so a model or a data set may be moved. What an earlier stage made is an input like any
other: where a stage was redone with another result, the stages that read it differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet import __version__
from whet.config import DataConfig, GeneratedConfig, ModelConfig
from whet.config.environment import EnvironmentConfig, OwnTool
from whet.config.loading import leaves
from whet.config.node import dotted
from whet.config.strict import Strict, children
from whet.data.sources import content_of
from whet.envs.families import FAMILIES
from whet.errors import DataError, ModelError
from whet.files import Digests
from whet.models.load import read_contents
from whet.models.locate import TEMPLATES
from whet.pipeline.stage import Context

Content = Mapping[str, Any]
"""What an input is: `path` (for people to read), and what is compared: `files`, `commit`, `version` or `function`."""
SHOWN = 4
"""Differences that a refusal lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A part of an identity that is not what it was."""

    key: str
    """`train.lr`, `data`, `model`, `rewards.0`: what it is accepted by."""
    what: str
    """`was 0.01 and is 0.02`, `rows.jsonl has changed: 10 rows then, 6 now`."""

    def accepted(self, stage: str, names: Sequence[str]) -> bool:
        """Whether one of these names is its key, a section that has it, or either with the stage's name before it."""
        keys = f"{self.key}.", f"{stage}.{self.key}."
        return any(key.startswith(f"{name}.") for name in names for key in keys)


def identity_of(context: Context, seed: int, digests: Digests) -> dict[str, Any]:
    """The identity of a stage in a run of this seed, as JSON has it."""
    models = {f"models.{label}": model for label, model in context.models.items()}
    if context.config.reads_model and not models:
        models = {"model": context.model}
    stage = context.config.model_copy(update={"model": None, "models": None})
    parts = [section_identity(stage, "", digests), *(section_identity(m, at, digests) for at, m in models.items())]
    config = {"seed": seed} | {key: value for part in parts for key, value in part["config"].items()}
    inputs = {key: content for part in parts for key, content in part["inputs"].items()}
    for content in filter(None, inputs.values()):
        content["path"] = content["path"].removeprefix(str(context.folder.parents[1]))
    return {"code": __version__, "config": config, "inputs": inputs}


def section_identity(section: Strict, at: str, digests: Digests) -> dict[str, Any]:
    """What follows from one section: its keys, dotted, and the content of what it reads.

    An input that cannot be read is None: its reader reports the fault.
    """
    inputs = _inputs(section, at, digests)
    places = {place for key in inputs for place in (key, f"{key}.path", f"{key}.script")}  # content, not place
    keys = ((dotted(path), value) for path, value in leaves(section.mathematics(), (at,) if at else ()))
    return {"config": {k: v for k, v in keys if k not in places and v is not None}, "inputs": inputs}


def name_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 of what is compared."""
    inputs = {key: _compared(content or {}) for key, content in identity["inputs"].items()}
    return hashlib.sha256(json.dumps([identity["config"], inputs], sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What is no longer as it was, in order; an input that cannot be read now is not compared."""
    if not before:
        return [Difference(key="identity", what="the version of whet that made it noted none")]
    was, now_is = before["config"], now["config"]
    changed = [
        Difference(key=key, what=f"was {was.get(key)} and is {now_is.get(key)}")
        for key in sorted(was.keys() | now_is.keys())
        if was.get(key) != now_is.get(key)
    ]
    was, now_is = before["inputs"], now["inputs"]
    for key in sorted(was.keys() | now_is.keys()):
        then, there = was.get(key) or {}, now_is.get(key, {})
        if there is not None and _compared(then) != _compared(there):
            changed.append(Difference(key=key, what=_change(then, there)))
    return changed


def describe(stage: str, found: Sequence[Difference]) -> str:
    """`sft: data (rows.jsonl has changed: 10 rows then, 6 now), train.lr (was 0.01 and is 0.02)`."""
    listed = [f"{each.key} ({each.what})" for each in found[:SHOWN]]
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return f"{stage}: {', '.join(listed + more)}"


# ------------------------------------------------------------------------------------------------ inputs


def rows_content(source: DataConfig, digests: Digests) -> dict[str, Any]:
    """What is in the files of a source. Raises `DataError` or `OSError` where it cannot be read."""
    content = content_of(source, digests.of)
    files = {name: {"sha256": digest} for name, digest in content.parts.items()}
    if len(files) == 1:  # whose name does not matter
        files = {"": files.popitem()[1]}
    return {"path": source.path, "files": files, **({"rows": content.lines} if content.lines else {})}


def _inputs(value: Any, at: str, digests: Digests) -> dict[str, dict[str, Any] | None]:
    """Everything that a section reads, however deep, by the key that names it."""
    found: dict[str, dict[str, Any] | None] = {}
    try:
        if (content := _content(value, digests)) is not None:
            found[at] = content
    except (DataError, ModelError, OSError):
        found[at] = None
    if isinstance(value, EnvironmentConfig | OwnTool):
        found |= _option_files(value, f"{at}.options", digests)
    for key, child in children(value):
        if key not in getattr(value, "free", ()):
            found |= _inputs(child, f"{at}.{key}" if at else key, digests)
    return found


def _option_files(value: EnvironmentConfig | OwnTool, at: str, digests: Digests) -> dict[str, dict[str, Any] | None]:
    """The files that options or a command name, beside these themselves; None where what looks like one is missing."""
    named = {key: Path(said) for key, said in value.options.items() if isinstance(said, str) and Path(said).suffix}
    if isinstance(value, EnvironmentConfig):
        named |= {word: Path(word) for word in value.command if Path(word).is_file()}
    return {f"{at}.{key}.file": _file(path, digests) if path.is_file() else None for key, path in named.items()}


def _content(value: Any, digests: Digests) -> dict[str, Any] | None:
    """What one section, or one key with a file, reads by itself; None: nothing."""
    if isinstance(value, Path):
        return _file(TEMPLATES.get(str(value), value), digests)
    if isinstance(value, DataConfig):
        return rows_content(value, digests)
    if isinstance(value, GeneratedConfig):
        return {"path": value.generate, "version": FAMILIES[value.generate].version}
    if getattr(value, "refers_to", None) is not None:
        model = value if isinstance(value, ModelConfig) else ModelConfig(path=value.path)
        return {"path": model.path, **read_contents(model, digests)}
    for key, field in getattr(type(value), "model_fields", {}).items():
        if "content" in field.metadata:
            named = getattr(value, key)
            file, _, function = named.rpartition(":") if isinstance(named, str) else ("", "", "")
            if file.endswith(".py"):
                return {**_file(Path(file), digests), "function": function}
    return None


def _file(path: Path, digests: Digests) -> dict[str, Any]:
    return {"path": str(path), "files": {"": {"sha256": digests.of(path).sha256}}}


def _compared(content: Content) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "path"}


def _change(then: Content, now: Content) -> str:
    """What has become of an input, in words."""
    path = now.get("path") or then.get("path", "")
    for key in ("commit", "version", "function"):
        if then.get(key) != now.get(key):
            return f"{path}: {key} {then.get(key)} then, {now.get(key)} now"
    before, after = then.get("files", {}), now.get("files", {})
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    which = ", ".join(name or path for name in changed[:SHOWN])
    verb = "has changed" if len(changed) == 1 else "have changed"
    before_rows, rows = then.get("rows"), now.get("rows")
    if before_rows is None or rows is None:
        return f"{which} {verb}"
    counted = f"{before_rows:,} rows then, {rows:,} now" if before_rows != rows else f"{rows:,} other rows"
    return f"{which} {verb}: {counted}"
