"""Looking at runs that are there: which, what is in one, how two differ, and what of them takes room twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from whet.config.loading import leaves
from whet.config.node import dotted
from whet.errors import RunError
from whet.evals.stats import differences as gains
from whet.evals.stats import paired_interval, sign_flip_p
from whet.files import MANIFEST, digest_file, folder_size, is_sealed, read_json
from whet.pipeline.card import Record, records
from whet.pipeline.identity import differences
from whet.tracking.log import verdicts

SMALL = 65536
"""Bytes below which a file is not worth a link."""


def runs_in(folder: Path) -> dict[str, str]:
    """Every run in a folder, or the one that it is: how far it is, its seed, its size, its last evaluation."""
    found = {}
    for recipe in sorted([*folder.glob("recipe.json"), *folder.glob("*/recipe.json")]):
        said, stages = read_json(recipe), records(recipe.parent).values()
        done = sum(each.state != "unfinished" for each in stages)
        told = [f"{label} {row['accuracy']:.1%}" for each in stages for label, row in each.evaluation.items()]
        parts = [f"{done} of {len(said['stages'])} stages done", f"seed {said['seed']}"]
        parts += [f"{folder_size(recipe.parent):,} bytes", *told[-1:]]
        found[str(recipe.parent)] = ", ".join(parts)
    if not found:
        raise RunError(f"{folder}: no run folder, and there is none in it; give the folder that `out=` named")
    return found


def show(run: Path) -> dict[str, Any]:
    """A run's stages with state, identity, what they read and found, and the data that came from outside."""
    known = _records(run)
    stages = {}
    for each in known.values():
        reads = list(dict.fromkeys(known[folder].name for folder in each.parents.values() if folder in known))
        found = {label: f"{row['accuracy']:.1%}" for label, row in each.evaluation.items()}
        about = {"kind": each.noted["kind"], "state": each.state, "identity": each.identity}
        about |= {"from": each.noted.get("from"), "reads": reads, "accuracy": found}
        stages[each.name] = {key: value for key, value in about.items() if value}
    listed = read_json(run / "recipe.json")["stages"]
    waiting = {name: {"kind": each["kind"], "state": "not begun"} for name, each in listed.items()}
    stages |= {name: about for name, about in waiting.items() if name not in stages}
    return {"stages": stages, "data": {key: what for each in known.values() for key, what in each.data().items()}}


def diff(first: Path, second: Path) -> dict[str, list[str]]:
    """How the second run differs from the first: recipe; data and code by stage; evaluations, paired by task."""
    before, after = ({each.name: each for each in _records(run).values()} for run in (first, second))
    pairs = [(before[name], after[name]) for name in after if name in before]
    return {
        "recipe": list(_recipe_changes(first, second)),
        "stages": [line for pair in pairs for line in _changes(*pair)] + list(_states(before, after)),
        "evaluations": [line for pair in pairs for line in _gains(*pair)],
    }


def gc(folder: Path, *, dry: bool) -> list[str]:
    """Free room and lose nothing: checkpoints of finished stages go, equal files of finished stages become one.

    A file is hashed before it is replaced by a link to its equal. `dry`: it is only said.
    """
    said, firsts, freed = [], dict[str, Path](), 0
    for run in map(Path, runs_in(folder)):
        for stage in (each.folder for each in records(run).values() if is_sealed(each.folder)):
            left = run / "checkpoints" / stage.name
            if left.is_dir():
                said.append(f"{left}: of a finished stage, {folder_size(left):,} bytes")
                freed += folder_size(left)
                if not dry:
                    shutil.rmtree(left)
            for name, known in read_json(stage / MANIFEST)["files"].items():
                file = stage / name
                if known["bytes"] < SMALL or not file.is_file() or digest_file(file).sha256 != known["sha256"]:
                    continue  # a damaged one is left to be seen
                first = firsts.setdefault(known["sha256"], file)
                if not file.samefile(first) and (dry or _linked(file, first)):
                    said.append(f"{file}: the same as {first}, {known['bytes']:,} bytes")
                    freed += known["bytes"]
    return [*said, f"{freed:,} bytes {'can be freed: --yes' if dry else 'freed'}"]


def _records(run: Path) -> dict[str, Record]:
    if not (run / "recipe.json").is_file():
        raise RunError(f"{run}: no run folder (it has no recipe.json); `whet runs` lists those that there are")
    return records(run)


def _states(before: Mapping[str, Record], after: Mapping[str, Record]) -> Iterator[str]:
    """Stages that are finished in one of the two alone."""
    for name in dict.fromkeys([*before, *after]):
        was, now = (each[name].state if name in each else "not begun" for each in (before, after))
        if was != now:
            yield f"{name}: {was} -> {now}"


def _recipe_changes(first: Path, second: Path) -> Iterator[str]:
    was, now = (read_json(run / "recipe.json") for run in (first, second))
    for name in was["stages"].keys() ^ now["stages"].keys():
        was["stages"].pop(name, None)
        now["stages"].pop(name, None)
        yield f"stages.{name}: only in one of them"
    before, after = ({dotted(path): value for path, value in leaves(each)} for each in (was, now))
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key)} -> {after.get(key)}"


def _changes(before: Record, after: Record) -> Iterator[str]:
    """What two stages of one name read that differs, and what made them; their keys are the recipe's."""
    was, now = (each.noted.get("identity") for each in (before, after))
    if was is None or now is None or "code" not in was or "code" not in now:  # of a version without
        return
    if was["code"] != now["code"]:
        yield f"{after.name}: code {was['code']} -> {now['code']}"
    changed = (each for each in differences(was, now) if each.key not in {**was["config"], **now["config"]})
    yield from (f"{after.name}.{each.key}: {each.what}" for each in changed)


def _gains(before: Record, after: Record) -> Iterator[str]:
    """The gain of each label that both evaluations have, on the tasks that both played."""
    for label in (label for label in after.evaluation if label in before.evaluation):
        was, now = (verdicts(each.folder / label) for each in (before, after))
        both = [task for task in was if task in now]
        if not both:
            yield f"{after.name} {label}: no task in common"
            continue
        pair = [was[task] for task in both], [now[task] for task in both]
        gain, p = paired_interval(*pair), sign_flip_p(gains(*pair))
        interval = f"95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}, p = {p:.3g}"
        yield f"{after.name} {label}: {100 * gain.mean:+.1f} points ({interval}, {len(both):,} tasks)"


def _linked(file: Path, first: Path) -> bool:
    """Put a link to the first file in the place of an equal one; False where the file system has none."""
    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(first, part)
    except OSError:  # another file system: both stay
        return False
    os.replace(part, file)
    return True
