"""Looking at runs that are there: which, what is in one, how two differ, and what of them takes room twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whet.config.loading import leaves
from whet.config.node import dotted
from whet.errors import RunError
from whet.evals.stats import differences as gains
from whet.evals.stats import paired_interval, sign_flip_p
from whet.files import MANIFEST, digest_file, folder_size, read_json
from whet.pipeline.card import Record, data_of, records
from whet.pipeline.identity import differences
from whet.tracking.log import read_rollouts

SMALL = 65536
"""Bytes below which a file is not worth a link."""


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """Every run in a folder, or the one that it is: how far it is, its last evaluation, its size in bytes."""
    found = []
    for recipe in sorted([*folder.glob("recipe.json"), *folder.glob("*/recipe.json")]):
        run, stages = recipe.parent, records(recipe.parent)
        told = [f"{row['label']} {row['accuracy']:.1%}" for each in stages for row in each.evaluation[-1:]]
        found.append(
            {
                "run": str(run),
                "seed": read_json(recipe)["seed"],
                "done": sum(each.done or "left_out" in each.noted for each in stages),
                "stages": len(read_json(recipe)["stages"]),
                "evaluation": told[-1] if told else "",
                "bytes": folder_size(run),
            }
        )
    if not found:
        raise RunError(f"{folder}: no run folder, and there is none in it; give the folder that `out=` named")
    return found


def show(run: Path) -> dict[str, Any]:
    """A run's stages with identity, parents, data and evaluations."""
    stages = _records(run)
    return {
        "run": str(run),
        "stages": [
            {
                "stage": each.name,
                "kind": each.kind,
                "state": each.noted.get("left_out") or ("done" if each.done else "unfinished"),
                "identity": each.identity,
                "from": each.noted.get("from", ""),
                "reads": sorted(parent.partition("-")[2] for parent in each.parents),
                "evaluation": {row["label"]: row["accuracy"] for row in each.evaluation},
            }
            for each in stages
        ],
        "data": [dict(zip(("stage", "key", "source", "known"), row, strict=True)) for row in data_of(stages)],
    }


def diff(first: Path, second: Path) -> dict[str, list[str]]:
    """How the second run differs from the first: recipe, inputs and code of equal stages, and paired evaluations."""
    before, after = ({each.name: each for each in _records(run)} for run in (first, second))
    return {
        "recipe": list(_recipe_changes(first, second)),
        "stages": [line for name in before.keys() & after.keys() for line in _changes(before[name], after[name])],
        "evaluations": [line for name in before.keys() & after.keys() for line in _gains(before[name], after[name])],
    }


def gc(folder: Path, *, dry: bool) -> list[str]:
    """Free room without losing anything: checkpoints of finished stages go, equal files of finished stages are linked.

    Every file that is linked is hashed first; `dry`: it is only said.
    """
    said, firsts, freed = [], dict[str, Path](), 0
    for run in (Path(each["run"]) for each in runs_in(folder)):
        for stage in (each.folder for each in records(run) if each.done):
            left = run / "checkpoints" / stage.name
            if left.is_dir():
                said.append(f"{left}: of a finished stage, {folder_size(left):,} bytes")
                freed += folder_size(left)
                if not dry:
                    shutil.rmtree(left)
            for name, known in read_json(stage / MANIFEST)["files"].items():
                file, first = stage / name, firsts.setdefault(known["sha256"], stage / name)
                if known["bytes"] < SMALL or not file.is_file() or file.samefile(first):
                    continue
                if {digest_file(file).sha256, digest_file(first).sha256} != {known["sha256"]}:
                    said.append(f"{file}: not what its manifest says; left alone")
                    continue
                said.append(f"{file}: the same as {first}, {known['bytes']:,} bytes")
                freed += known["bytes"]
                if not dry:
                    _replace(file, first)
    return [*said, f"{freed:,} bytes {'could be' if dry else 'were'} freed"]


def _records(run: Path) -> list[Record]:
    if not (run / "recipe.json").is_file():
        raise RunError(f"{run}: no run folder (it has no recipe.json); `whet runs` lists those that there are")
    return records(run)


def _recipe_changes(first: Path, second: Path) -> Iterator[str]:
    was, now = (
        {dotted(path): value for path, value in leaves(read_json(run / "recipe.json"))} for run in (first, second)
    )
    for key in dict.fromkeys([*was, *now]):
        if was.get(key) != now.get(key):
            yield f"{key}: {was.get(key)} -> {now.get(key)}"


def _changes(before: Record, after: Record) -> Iterator[str]:
    """What two stages of one name read that differs, and what made them; keys of the recipe are told apart from it."""
    was, now = (each.noted.get("identity") for each in (before, after))
    if was is None or now is None:
        return
    if was["code"] != now["code"]:
        yield f"{after.name}: code {was['code']} -> {now['code']}"
    for each in differences(was, now):
        if each.key in {**was["inputs"], **now["inputs"]}:
            yield f"{after.name}.{each.key}: {each.what}"


def _gains(before: Record, after: Record) -> Iterator[str]:
    """The gain of each label that both evaluations have, paired by task where they played the same ones."""
    there = {row["label"] for row in before.evaluation}
    for row in after.evaluation:
        if row["label"] not in there:
            continue
        scores = [_scores(each.folder / row["label"]) for each in (before, after)]
        both = [task for task in scores[0] if task in scores[1]]
        name = f"{after.name} {row['label']}"
        if not both:
            yield f"{name}: no task in common"
            continue
        pair = [[each[task] for task in both] for each in scores]
        gain, p = paired_interval(*pair), sign_flip_p(gains(*pair))
        interval = f"95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}, p = {p:.3g}"
        yield f"{name}: {100 * gain.mean:+.1f} points ({interval}, {len(both):,} tasks)"


def _scores(folder: Path) -> dict[str, list[float]]:
    """The verdicts on each task's answers."""
    found: dict[str, list[float]] = {}
    for rollout in read_rollouts(folder):
        if rollout.correct is not None:
            found.setdefault(rollout.task, []).append(float(rollout.correct))
    return found


def _replace(file: Path, first: Path) -> None:
    """Put a link to the first file in the place of an equal one, which is there until then."""
    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(first, part)
    except OSError:  # another file system: both stay
        return
    os.replace(part, file)
