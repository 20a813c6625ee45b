"""Where a model is: a built-in name, a directory, a run folder or one of its stages, or the hub."""

from __future__ import annotations

import logging
import os
from difflib import get_close_matches
from pathlib import Path

from whet.config.problems import nearest
from whet.errors import ModelError, RunError
from whet.files import is_sealed, read_json

ASSETS = Path(__file__).parent.parent / "assets"
BUILT_IN = {"whet:demo": ASSETS / "demo"}
TEMPLATES = {f"whet:{file.stem}": file for file in sorted((ASSETS / "templates").glob("*.jinja"))}
"""Chat templates that come with whet, for `model.chat_template`."""

FINAL = "final"
"""In `run.json`: the stage whose model the run came to."""


def locate(path: str) -> tuple[str, str | None]:
    """(directory or hub id, revision). Raises `ModelError`, or `RunError` for a run that has not made the model."""
    if path.startswith("whet:"):
        if path not in BUILT_IN:
            raise ModelError(f"no built-in model {path!r}; there are whet:tiny, {', '.join(BUILT_IN)}")
        return str(BUILT_IN[path]), None
    if run := run_of(path):
        return str(made_by(*run)), None
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ModelError(f"{path}: a directory without config.json is not a Hugging Face model; give one, or a run")
        return path, None
    name, _, revision = path.partition("@")
    folder = Path(name).parent if "/" in name else Path("runs")
    places = {folder, Path(name).parent}  # `runs`, and here
    runs = sorted(str(recipe.parent) for place in places for recipe in place.glob("*/recipe.json"))
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or runs or folder.name == "runs":  # a path or a run
        there = [*runs, *(str(config.parent) for config in Path(name).parent.glob("*/config.json"))]
        close = get_close_matches(Path(name).name, [Path(each).name for each in there], n=1)
        meant = next((each for each in there if Path(each).name in close), name)
        raise ModelError(f"{path}: no such directory, and not a hub id (org/name){nearest(meant, there)}")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        logging.getLogger(__name__).info("offline: looking for %s in the local cache", name)
    return name, revision or None


def run_of(path: str) -> tuple[str, str] | None:
    """The run folder and the stage (or "") that `RUN` or `RUN@stage` names; None: it is no run."""
    name, _, stage = (path, "", "") if Path(path).is_dir() else path.partition("@")
    return (name, stage) if (Path(name) / "recipe.json").is_file() else None


def made_by(run: str, stage: str = "") -> Path:
    """The folder of the model that a stage of a run made, or the one that it came to. Raises `RunError`.

    That is the last one, and with a loop that chose among its rounds the chosen one (`run.json` names its stage).
    """
    stages = list(read_json(Path(run) / "recipe.json")["stages"])
    folders = sorted(folder for folder in (Path(run) / "stages").glob("*") if is_sealed(folder))
    made = {
        folder.name.partition("-")[2]: folder / "model"
        for folder in folders
        if (folder / "model" / "config.json").is_file()
    }
    best = {f"{name}/best": last.parent / "best" for name, last in made.items() if (last.parent / "best").is_dir()}
    if not stage and made:
        about = Path(run) / "run.json"
        final = read_json(about).get(FINAL) if about.is_file() else None
        return made[final] if final in made else list(made.values())[-1]
    if stage in made | best:
        return (made | best)[stage]
    if stage and stage not in stages:
        raise RunError(f"{run}: has no stage {stage!r}{nearest(stage, stages)}")
    what = f"its stage {stage} has made no model" if stage else f"none of its stages ({', '.join(stages)}) made a model"
    raise RunError(f"{run}: {what} yet; run it to the end" + (f", or take @{', @'.join(made)}" if made else ""))
