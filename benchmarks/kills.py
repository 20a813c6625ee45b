"""Exact resume at scale: `python -m benchmarks.kills [--kills 200] [--seed 0]`.

A whole pipeline of a tiny model (SFT, RL with a reward model, preferences, sampling, selection, SFT on what was
selected, distillation, merging, evaluation) is killed with SIGKILL at random moments, started again, killed again, and
so on to its end; then every file that it left is compared with those of a run that was never stopped, bit for bit
(times of day and durations aside). Each start is killed at a random moment of one of its next stages, so the kills are
spread over all of them. Starts are forks of a process that has everything imported (`tests.laws.nursery`). Ends with
exit code 1 where anything differs; those runs are left in `--folder`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.laws.nursery import Nursery, contents

from whet.files import MANIFEST

NEXT = 4
"""Stages that are not done among which the one is drawn in which a start is killed."""
SLOWER = 1.3
"""The latest moment of a kill, in durations of the stage: a start has to load what the stage needs."""
RECIPE = """
name: kills
model: {path: "whet:tiny", create: {hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 48}}
save: {every: 2}
stages:
  sft:
    kind: sft
    data: {generate: arithmetic, count: 64, digits: 1, bare: 1.0}
    eval_data: {generate: arithmetic, count: 16, digits: 1, split: test}
    eval_every: 4
    best: {metric: eval_loss}
    train: {optimizer: muon, lr: 0.01, batch_size: 16, steps: 24, schedule: cosine, warmup: 2}
  rm:
    kind: reward_model
    data: {generate: arithmetic, count: 24, digits: 1, answers: 3}
    train: {lr: 0.01, batch_size: 4, steps: 6, lora: {rank: 2, dropout: 0.2}}
  rl:
    kind: rl
    tasks: {generate: arithmetic, count: 24, digits: 1}
    rewards: [{kind: verifier}, {kind: model, path: "@rm", weight: 0.1}]
    evaluation: {tasks: {generate: arithmetic, count: 6, digits: 1, split: test}}
    eval_every: 4
    best: {metric: eval_reward}
    prompts_per_step: 4
    rollouts_per_prompt: 4
    sampling: {max_tokens: 12, max_running: 10}
    algorithm: {preset: grpo, minibatches: 2, kl: {coefficient: 0.05}}
    train: {lr: 0.003, steps: 8}
  dpo:
    kind: preference
    data: {generate: arithmetic, count: 24, digits: 1, answers: 3}
    train: {lr: 0.003, batch_size: 4, steps: 8, lora: {rank: 2, dropout: 0.3}}
  sample:
    kind: sample
    model: "@sft"
    tasks: {generate: arithmetic, count: 24, digits: 1}
    samples: 4
    rewards: [{kind: function, path: "length.py:length"}]
    chunk: 6
    sampling: {max_tokens: 12, max_running: 10}
  select: {kind: select, data: "@sample", best: 2}
  again:
    kind: sft
    model: "@dpo"
    data: "@select"
    train: {lr: 0.003, batch_size: 8, steps: 8, neftune: 5, lora: {rank: 2, dropout: 0.3}}
  distill:
    kind: distill
    model: "@sft/best"
    teacher: "@again"
    data: {generate: arithmetic, count: 24, digits: 1}
    tasks: {generate: arithmetic, count: 24, digits: 1}
    prompts_per_step: 4
    sampling: {max_tokens: 12, max_running: 10}
    train: {lr: 0.003, batch_size: 8, steps: 8}
  merge: {kind: merge, inputs: ["@distill", "@again", "@rl/best"]}
  eval:
    kind: eval
    models: {base: "@model", sft: "@sft", rl: "@rl", merged: "@merge"}
    tasks: {generate: arithmetic, count: 12, digits: 1, split: test}
    rewards: [{kind: verifier}, {kind: function, path: "length.py:length"}]
    samples: 2
    sampling: {max_tokens: 12, max_running: 10}
"""
LENGTH = "def length(completions, **kwargs):\n    return [float(len(c[0]['content'])) for c in completions]\n"


def run(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill as often as asked; what was found, as JSON has it."""
    (folder / "kills.yaml").write_text(RECIPE)
    (folder / "length.py").write_text(LENGTH)
    draw, found = random.Random(seed), Found()
    nursery = Nursery(folder)
    try:
        expected, seconds = unbroken(nursery, folder / "whole")
        while found.kills < kills:
            broken = folder / f"broken-{found.runs:03d}"
            survive(nursery, broken, draw, seconds, found, kills)
            found.compare(expected, contents(broken), broken)
            sys.stderr.write(json.dumps(found.about()) + "\n")
            if not any(name.startswith(str(broken)) for name in found.different):
                shutil.rmtree(broken)
    finally:
        nursery.close()
    return {
        **found.about(),
        "files": len(expected),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


class Found:
    """What became of the runs so far."""

    def __init__(self) -> None:
        self.kills = self.runs = self.writing = self.most = 0
        self.stages: Counter[str] = Counter()
        self.different: list[str] = []

    def killed(self, folder: Path) -> None:
        """Note what a kill has hit."""
        self.kills += 1
        stages = sorted(path for path in (folder / "stages").glob("*") if not (path / MANIFEST).exists())
        self.stages[stages[0].name if stages else "between stages"] += 1
        self.writing += any(any(folder.rglob(pattern)) for pattern in ("*.part", ".part-*"))

    def compare(self, expected: dict[str, Any], there: dict[str, Any], folder: Path) -> None:
        """Note the files of a run that came to its end and are not those that they must be."""
        self.runs += 1
        names = sorted(name for name in expected.keys() | there.keys() if expected.get(name) != there.get(name))
        self.different += [f"{folder}: {name}" for name in names]

    def about(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "kills": self.kills,
            "runs": self.runs,
            "most_kills_of_a_run": self.most,
            "kills_amid_a_write": self.writing,
            "kills_by_stage": dict(sorted(self.stages.items())),
            "different": self.different,
        }


def unbroken(nursery: Nursery, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """What a run leaves that is never stopped, and the seconds of its stages; two of them must leave the same."""
    left = []
    for place in (folder, folder.with_name("twice")):
        done = nursery.obey("run", "kills.yaml", f"out={place}", folder=place)
        if done.code != 0:
            raise SystemExit(done.errors)
        left.append(contents(place))
    assert left[0] == left[1], "it is not deterministic to begin with"
    stages = sorted((folder / "stages").glob("*"))
    times = [[(stage / name).stat().st_mtime for name in ("stage.json", MANIFEST)] for stage in stages]
    return left[0], {stage.name: end - start for stage, (start, end) in zip(stages, times, strict=True)}


def survive(
    nursery: Nursery, folder: Path, draw: random.Random, seconds: dict[str, float], found: Found, most: int
) -> None:
    """Start a run until it comes to its end, and kill it on its way until `most` kills are done."""
    before = found.kills
    while True:
        to_do = [name for name in seconds if not (folder / "stages" / name / MANIFEST).exists()]
        how: dict[str, Any] = {}
        if to_do and found.kills < most:
            name = draw.choice(to_do[:NEXT])
            how = {"kill_s": draw.uniform(0, SLOWER * seconds[name]), "kill_in": str(folder / "stages" / name)}
        done = nursery.obey("run", "kills.yaml", f"out={folder}", folder=folder, **how)
        if done.code == 0:
            break
        if done.code != -signal.SIGKILL:
            raise SystemExit(f"{folder}: exit code {done.code} after {found.kills} kills: {done.errors}")
        found.killed(folder)
    found.most = max(found.most, found.kills - before)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are; default: a temporary folder")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="whet-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    found = run(given.kills, given.seed, folder.resolve())
    sys.stdout.write(json.dumps(found) + "\n")
    if given.folder is None and not found["different"]:
        shutil.rmtree(folder)
    raise SystemExit(bool(found["different"]))


if __name__ == "__main__":
    main()
