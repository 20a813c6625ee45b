"""What a recipe would take on clusters of 8 to 4,096 GPUs, and how to divide them: `whet plan --simulate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from whet.config.loading import split_overrides
from whet.config.node import COMMAND_LINE, dotted, parse
from whet.config.problems import nearest
from whet.config.recipe import Recipe
from whet.config.rl import RLStage
from whet.errors import ConfigError, DataError
from whet.launch.simulate import ORDERS, Lengths, Setup, Simulated, simulate
from whet.pipeline.card import records
from whet.tracking.log import read_rollout_table

SIZES = tuple(2**power for power in range(3, 13))
"""GPUs that a forecast is made for."""
SHARES = 8
"""A split is searched among so many parts of the GPUs."""
NOT_ASSUMED = {"trainer_gpus", "sampler_gpus", "beside", "lengths", "seen"}
"""Found by the search, or read."""
MAY_BE_ZERO = {"lag", "row_s", "update_s", "push_s", "failures", "restart_s", "streamed", "beside"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One size of cluster: all GPUs in turns, and the best division of them."""

    gpus: int
    beside: Simulated
    trainer_gpus: int
    sampler_gpus: int
    apart: Simulated


def best_split(setup: Setup, gpus: int) -> tuple[Setup, Simulated]:
    """The quickest division of `gpus` between trainer and samplers, by descent from halves."""
    known: dict[int, tuple[Setup, Simulated]] = {}

    def at(share: int) -> float:
        if share not in known:
            replicas = max(1, gpus * share // SHARES // setup.replica_gpus)
            samplers = min(replicas * setup.replica_gpus, gpus - 1)
            tried = replace(setup, sampler_gpus=samplers, trainer_gpus=gpus - samplers)
            known[share] = tried, simulate(tried)
        return known[share][1].step_s

    best = SHARES // 2
    for stride in (2, 1):
        near = min((share for share in (best - stride, best + stride) if 0 < share < SHARES), key=at)
        while at(near) < at(best):
            best, beyond = near, near + (near - best)
            near = beyond if 0 < beyond < SHARES else best
    return known[best]


def forecasts(setup: Setup, sizes: Sequence[int] = SIZES) -> list[Forecast]:
    """Each size that has room for a sampler and a trainer."""
    found = []
    for gpus in sizes:
        if gpus > setup.replica_gpus:
            split, apart = best_split(setup, gpus)
            together = simulate(replace(setup, sampler_gpus=gpus, trainer_gpus=gpus, beside=True, lag=0))
            found.append(
                Forecast(
                    gpus=gpus, beside=together, apart=apart,
                    trainer_gpus=split.trainer_gpus, sampler_gpus=split.sampler_gpus,
                )
            )  # fmt: skip
    return found


def setup_of(recipe: Recipe, assumed: Sequence[str], run: Path | None = None) -> Setup:
    """What the first stage of RL and the machine of a recipe say, and over it `NAME=VALUE` of `Setup` and `Lengths`.

    Lengths are drawn from the answers of a `run`, where there is one. Raises `ConfigError`, `DataError`.
    """
    stage = next((stage for stage in recipe.stages.values() if isinstance(stage, RLStage)), None)
    if stage is None:
        raise ConfigError("--simulate: the recipe has no stage of kind rl, and nothing else samples beside a trainer")
    ours, of_lengths = ([each.name for each in fields(kind)] for kind in (Setup, Lengths))
    given: dict[str, Any] = {}
    for path, text in split_overrides(assumed):
        if (name := dotted(path)) not in (known := sorted({*ours, *of_lengths} - NOT_ASSUMED)):
            raise ConfigError(f"--assume {name}: no such assumption{nearest(name, known)}")
        given[name] = parse(text, COMMAND_LINE, path).plain()
    most, samplers = stage.sampling.max_tokens, recipe.machine.samplers
    known_of: dict[str, Any] = {
        "most": most,
        "mean": min(Lengths.mean, most / 4),
        "seen": () if run is None else _lengths_in(run),
        "trainer_gpus": recipe.machine.trainer.ranks,
        "sampler_gpus": max(1, samplers.replicas) * samplers.gpus,
        "replica_gpus": samplers.gpus,
        "prompts": stage.prompts_per_step,
        "samples": stage.rollouts_per_prompt,
        "minibatches": stage.algorithm.minibatches,
        "lag": stage.lag.steps,
        "order": stage.lag.order,
        "window": stage.lag.window,
        **given,
    }
    own = {name: known_of.pop(name) for name in of_lengths if name in known_of}
    setup = Setup(lengths=Lengths(**own), **known_of)
    _check(setup)
    return setup


def _check(setup: Setup) -> None:
    """Raise `ConfigError` for what no cluster has."""
    if setup.order not in ORDERS:
        raise ConfigError(f"--assume order={setup.order}: no such order{nearest(str(setup.order), ORDERS)}")
    for name, value in {**asdict(setup), **asdict(setup.lengths)}.items():
        if name not in ("order", "lengths", "seen") and not isinstance(value, int | float):
            raise ConfigError(f"--assume {name}={value}: must be a number")
        if isinstance(value, int | float) and (value < 0 or (value == 0 and name not in MAY_BE_ZERO)):
            raise ConfigError(f"--assume {name}={value:g}: must be {'at least' if name in MAY_BE_ZERO else 'above'} 0")
    if setup.lengths.mean >= setup.lengths.most:
        raise ConfigError(f"--assume mean={setup.lengths.mean:g}: must be below the longest, {setup.lengths.most}")


def _lengths_in(run: Path) -> tuple[int, ...]:
    """Of every answer in the rollout files of a run's stages."""
    tables = [read_rollout_table(each.folder, columns=["completion_tokens"]) for each in records(run).values()]
    counts = [len(row) for table in tables if table is not None for row in table["completion_tokens"].to_pylist()]
    if not any(counts):
        raise DataError(f"--lengths {run}: no answers of a stage of kind rl in it; give a run folder that has such")
    return tuple(count for count in counts if count)
