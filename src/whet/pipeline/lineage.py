"""Whose folder it is: what a run holds is compared with the recipe before a stage is skipped or gone on with.

A stage that is done, or has begun to train, belongs to the identity that it began with. What differs is refused by
name, unless it is accepted (`--accept STAGE.KEY`) or the stage is started over (`--restart STAGE`). A stage that has
not begun to train belongs to nothing: what an earlier command left of it is removed where it differs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet import __version__
from whet.errors import RunError
from whet.files import MANIFEST, Digests, is_sealed, read_json, unseal, write_json
from whet.pipeline.identity import SHOWN, Difference, describe, differences, identity_of, name_of
from whet.pipeline.stage import LEARNED, Context

DIGESTS = "digests.json"
"""In the run folder: SHA-256 of files that were hashed, so that each is hashed once."""
NOTED = "stage.json"
"""In a stage's folder: its name, its kind and its identity, and what was accepted besides."""
HERE = "/stages/"
"""What the path of an input begins with that a stage of the same run made."""
PROGRESS = (LEARNED, "rows-*", "answers-*")
"""What a stage that has learned, or made rows or answers, has among its checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the person who gives the command has decided about stages that are there already."""

    accept: Sequence[str] = ()
    """Differences that are no reason to refuse: keys or sections, also as `STAGE.KEY`."""
    restart: Sequence[str] = ()
    """Stages that are started over, and with them every stage that reads what they make."""
    reuse: Path | None = None
    """A folder of runs, or one: a stage that one of them has finished, of the same identity, is taken from there."""


UNDECIDED = Choices()


def begun(folder: Path, checkpoints: Path) -> bool:
    """Whether a stage is done or has something to go on from."""
    return is_sealed(folder) or any(any(checkpoints.glob(pattern)) for pattern in PROGRESS)


def refused(context: Context, seed: int, accept: Sequence[str]) -> list[Difference]:
    """What differs from the identity of a stage that has begun, and was not accepted."""
    if not begun(context.folder, context.checkpoints):
        return []
    found = differences(_noted(context).get("identity", {}), _identity(context, seed))
    return [each for each in found if not each.accepted(context.name, accept)]


def refusal(run: Path, found: Sequence[tuple[str, Sequence[Difference]]]) -> RunError:
    """What is wrong with a run folder whose stages differ like this."""
    differing = [(name, changed) for name, changed in found if changed]
    keys = [f"{name}.{each.key}" for name, changed in differing for each in changed]
    accept = " ".join(f"--accept {key}" for key in (keys if len(keys) <= SHOWN else [name for name, _ in differing]))
    stages = "; ".join(describe(name, changed) for name, changed in differing)
    return RunError(
        f"{run}: this is not what it began with: {stages}; put it back, go on all the same ({accept}), start over "
        f"(--restart {differing[0][0]}), or choose another `out=`"
    )


def note(context: Context, seed: int) -> None:
    """Write the identity of a stage that begins or goes on; `refused` must have been asked.

    What an earlier command left of a stage that had not begun to train is removed, unless it is of the same identity.
    Raises `RunError` where it reads a file of another stage of the run that is not what that stage made.
    """
    noted, now = _noted(context), _identity(context, seed)
    _refuse_damaged(context.folder.parent, now)
    changed = differences(noted.get("identity", {}), now)
    if changed and not begun(context.folder, context.checkpoints):
        remove(context.folder, context.checkpoints)
        noted = {}
    elif changed:
        context.console.say(f"{describe(context.name, changed)}: accepted")
        noted["accepted"] = [*noted.get("accepted", []), {each.key: each.what for each in changed}]
    write_json(context.folder / NOTED, {**noted, "name": context.name, "kind": context.config.kind, "identity": now})


def _refuse_damaged(stages: Path, identity: Mapping[str, Any]) -> None:
    for content in filter(None, identity["inputs"].values()):
        folder, _, made = content["path"].removeprefix(HERE).partition("/")
        if not content["path"].startswith(HERE) or not is_sealed(stages / folder):
            continue
        listed = read_json(stages / folder / MANIFEST)["files"]
        for name, known in content["files"].items():
            file = f"{made}/{name}" if name else made
            if file in listed and listed[file]["sha256"] != known["sha256"]:
                maker = read_json(stages / folder / NOTED)["name"]
                raise RunError(
                    f"{stages / folder / file}: damaged; its SHA-256 is not the one in the manifest; put the file "
                    f"back, or make it again: --restart {maker}"
                )


def other_code(context: Context) -> str:
    """` by whet 0.1.0`, where what is there of a stage was made by another version; empty by this one."""
    code = _noted(context).get("identity", {}).get("code", __version__)
    return "" if code == __version__ else f" by whet {code}"


def elsewhere(context: Context, seed: int, choices: Choices) -> Path | None:
    """A finished stage of this name and identity in one of the runs; what another version made is offered."""
    assert choices.reuse is not None
    runs, taken = choices.reuse, Difference(key="code", what="").accepted(context.name, choices.accept)
    now = _identity(context, seed)
    if None in now["inputs"].values():  # what cannot be read may be anything
        return None
    for noted in sorted([*runs.glob(f"stages/*/{NOTED}"), *runs.glob(f"*/stages/*/{NOTED}")]):
        there = read_json(noted)
        if there["name"] != context.name or "accepted" in there or not is_sealed(noted.parent):
            continue
        if name_of(there["identity"]) == name_of(now):
            code = there["identity"]["code"]
            if taken or code == now["code"]:
                return noted.parent
            context.console.say(
                f"{context.name}: {noted.parent} is of the same identity, but by whet {code}; to take it: "
                f"--accept {context.name}.code"
            )
    return None


def take(found: Path, context: Context) -> None:
    """Link (or copy) what is in another run's stage, every file verified; the folder is still to be sealed."""
    unseal(found)
    leave = shutil.ignore_patterns(MANIFEST, NOTED)
    shutil.copytree(found, context.folder, ignore=leave, copy_function=_link, dirs_exist_ok=True)
    write_json(context.folder / NOTED, {**_noted(context), "from": str(found)})
    context.console.say(f"{context.name}: from {found}, of the same identity")


def _link(source: str, to: str) -> None:
    try:
        os.link(source, to)
    except OSError:  # another file system
        shutil.copy2(source, to)


def remove(*folders: Path) -> bool:
    """Remove what is there of a stage; whether there was anything."""
    there = [folder for folder in folders if folder.exists()]
    for folder in there:
        shutil.rmtree(folder)
    return bool(there)


def refuse_others(run: Path, ours: Sequence[str]) -> None:
    """Refuse a folder in which stages of another recipe have begun to train; remove those that never did."""
    for folder in sorted((run / "stages").glob("*")):
        if folder.name not in ours and (folder / NOTED).is_file():  # anything else is not a stage's
            checkpoints = run / "checkpoints" / folder.name
            if begun(folder, checkpoints):
                raise RunError(
                    f"{run}: was made by another recipe, which has the stage {folder.name} (this one has "
                    f"{', '.join(ours)}); choose another `out=`, or remove the folder to start over"
                )
            remove(folder, checkpoints)


def identity_name(context: Context, seed: int) -> str:
    """A short name that changes with the identity."""
    return name_of(_identity(context, seed))[:16]


def _noted(context: Context) -> dict[str, Any]:
    path = context.folder / NOTED
    return read_json(path) if path.is_file() else {}


def _identity(context: Context, seed: int) -> dict[str, Any]:
    with Digests(context.folder.parents[1] / DIGESTS) as digests:
        return identity_of(context, seed, digests)
