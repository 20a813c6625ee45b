"""A long run with a lag whose samplers are killed at random: is everything trained once, and does memory stay flat?

    python -m benchmarks.soak --steps 500 --seed 0

Prints one line of JSON. The exit code is 1 where a position was lost or trained twice, a token was older than its
bound, or the driver's memory grew by more than a tenth over the second half.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from whet.config.loading import load_recipe
from whet.launch.world import LocalWorld
from whet.pipeline.run import Run, run_recipe
from whet.pipeline.stage import Policy
from whet.records import seed_of
from whet.sampling.process import ReplicaState
from whet.tracking.console import Console
from whet.tracking.log import read_metrics, read_rollouts

PROMPTS, SAMPLES = 4, 4


def recipe(steps: int, seed: int, lag: dict[str, Any], replicas: int) -> dict[str, Any]:
    """A stage of RL on a tiny model, from which it can learn little and that takes some milliseconds a step."""
    shape = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16}
    rl = {
        "kind": "rl",
        "tasks": {"generate": "arithmetic", "count": 1000, "digits": 1},
        "rewards": [{"kind": "verifier"}, {"kind": "length", "above_tokens": 8, "weight": -1}],
        "algorithm": "decoupled_ppo",
        "prompts_per_step": PROMPTS,
        "rollouts_per_prompt": SAMPLES,
        "sampling": {"max_tokens": 12},
        "lag": lag,
        "train": {"steps": steps, "lr": 1e-4},
    }
    machine = {"samplers": {"replicas": replicas}, "restarts": {"sampler": 10 * steps}}
    model = {"path": "whet:tiny", "create": shape}
    return {"name": "soak", "seed": seed, "model": model, "machine": machine, "stages": {"rl": rl}}


class Watched(LocalWorld):
    """Remembers the policy, for those who kill its samplers."""

    made: Policy | None = None

    def policy(self, *given: Any, **named: Any) -> Policy:
        """`World`."""
        type(self).made = super().policy(*given, **named)
        return type(self).made


class Killer(threading.Thread):
    """Kills a healthy sampler now and then, and notes the memory of this process at each step."""

    def __init__(self, metrics: Path, every_s: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.metrics, self.every_s, self.draw = metrics, every_s, random.Random(seed)
        self.kills, self.rss_mb, self.done = 0, list[tuple[int, float]](), threading.Event()

    def run(self) -> None:
        """Until `done` is set."""
        while not self.done.wait(self.every_s * self.draw.uniform(0.5, 1.5)):
            fleet: Any = None if Watched.made is None else Watched.made.apart
            alive = [each for each in fleet.replicas if each.health is ReplicaState.HEALTHY] if fleet else []
            if alive:
                os.kill(self.draw.choice(alive).pid, signal.SIGKILL)
                self.kills += 1
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            steps = self.metrics.read_text().count("\n") if self.metrics.exists() else 0
            self.rss_mb.append((steps, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))


def main() -> int:
    """The run, and its verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--order", default="window")
    parser.add_argument("--lag", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kill-every-s", type=float, default=2.0)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)  # each death is told
    torch.set_num_threads(1)
    lag = {"steps": asked.lag, "order": asked.order}
    loaded = load_recipe(recipe(asked.steps, asked.seed, lag, asked.replicas)).recipe
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe=loaded, folder=Path(folder))
        stage = run.stage_folder("rl")
        killer = Killer(stage / "metrics.jsonl", asked.kill_every_s, asked.seed)
        killer.start()
        began = time.monotonic()
        world = Watched(folder=run.folder, machine=loaded.machine)
        run_recipe(run, world, Console(quiet=True), lambda: False, about={"threads": 1})
        killer.done.set()
        killer.join()
        found = told(run, stage, asked.steps, killer, time.monotonic() - began)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0 if found["right"] else 1


def told(run: Run, stage: Path, steps: int, killer: Killer, seconds: float) -> dict[str, Any]:
    """What came of it."""
    own = seed_of(run.recipe.seed, "rl")
    expected = sorted(seed_of(own, at, sample) for at in range(steps * PROMPTS) for sample in range(SAMPLES))
    rollouts, metrics = read_rollouts(stage), read_metrics(stage)
    bound = run.recipe.stages["rl"].lag.bound(PROMPTS)  # type: ignore[attr-defined]
    oldest = max(int(line["lag/max"] or 0) for line in metrics)
    half = [mb for at, mb in killer.rss_mb if at >= steps / 2] or [0.0]
    found = {
        "steps": len(metrics),
        "kills": killer.kills,
        "every_position_once": sorted(each.seed for each in rollouts) == expected,
        "unscored": sum(each.reward is None for each in rollouts),
        "oldest": oldest,
        "bound": bound,
        "rss_mb_at_half": round(half[0]),
        "rss_mb_at_end": round(half[-1]),
        "seconds": round(seconds),
    }
    right = found["every_position_once"] and oldest <= bound and half[-1] <= 1.1 * half[0] and not found["unscored"]
    return {**found, "right": bool(right)}


if __name__ == "__main__":
    raise SystemExit(main())
