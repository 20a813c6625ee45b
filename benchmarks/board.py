"""What the scoreboards have in common: every (preset, seed) is one line of a file, so an interrupted one goes on."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from whet.config.loading import load_recipe
from whet.launch.main import run_recipe

STUDENT_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Two-sided 95 % quantiles of Student's t for that many seeds."""


def parser(description: str | None, presets: Collection[str]) -> argparse.ArgumentParser:
    """The options of every scoreboard."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--presets", nargs="*", default=list(presets))
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--minutes", type=float, default=math.inf, help="begin no further run after so many")
    made.add_argument("--only-report", action="store_true")
    return made


def lines(out: Path) -> list[dict[str, Any]]:
    """The results so far, as they were written."""
    log = out / "results.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def sft_model(out: Path, recipe: Path, *overrides: str) -> Path:
    """The model that all start from: what the recipe's first stage makes, made once."""
    folder = out / "sft"
    if not list(folder.glob("stages/*-sft/model")):
        run_recipe(load_recipe(recipe, [f"out={folder}", *overrides]), quiet=True)
    return next(folder.glob("stages/*-sft/model"))


def fill(options: argparse.Namespace, train: Callable[[str, int], Any], describe: Callable[[Any], str]) -> None:
    """Train what is missing, seed by seed, as far as the minutes reach."""
    began = time.monotonic()
    done = {(line["preset"], line["seed"]) for line in lines(options.out)}
    for seed in range(options.seeds):
        for preset in options.presets:
            if (preset, seed) not in done and time.monotonic() - began < 60 * options.minutes:
                result = train(preset, seed)
                with (options.out / "results.jsonl").open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
                print(f"{preset:24} seed {seed}  {describe(result)}  {result.note}", flush=True)  # noqa: T201


def interval(values: list[float], *, sign: str = "", bounds: tuple[float, float] = (0, 1)) -> str:
    """The 95 % interval of a mean over seeds, within its bounds; one seed says nothing about the others."""
    if len(values) < 2:
        return "one seed"
    half = STUDENT_95[min(len(values), 5)] * stdev(values) / math.sqrt(len(values))
    low, high = max(bounds[0], fmean(values) - half), min(bounds[1], fmean(values) + half)
    return f"{low:{sign}.1%} to {high:{sign}.1%}"
