"""Trains every preset on the demo's task for the same number of sampled tokens, and writes down what each learned.

    python -m benchmarks.scoreboard --out runs/scoreboard                    everything: an hour on one core
    python -m benchmarks.scoreboard --out runs/scoreboard --minutes 8        as much as fits; the next call goes on
    python -m benchmarks.scoreboard --out runs/scoreboard --seeds 1 --presets grpo rloo
    python -m benchmarks.scoreboard --out runs/scoreboard --only-report      the page again, from the results so far

All start from one SFT model (the demo's), with the demo's optimizer and rate and half its batch; nothing is tuned for
any of them. Every (preset, seed) is one line of `results.jsonl` in the folder, so an interrupted scoreboard goes on.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.board import fill, interval, lines, parser, sft_model
from whet.algorithms.critic import Critic
from whet.algorithms.policy import MAX_GAP, policy_gradient
from whet.algorithms.state import Setting
from whet.cli.run import RECIPE
from whet.config import PRESETS, EvalStage, ModelConfig, PolicyConfig, RLStage
from whet.config.loading import load_recipe
from whet.config.rewards import weights
from whet.errors import TrainingError
from whet.launch.world import LocalWorld
from whet.pipeline.load_data import rubric
from whet.pipeline.playing import find_tasks, player
from whet.records import seed_of
from whet.rollouts.feed import Feed

PAGE = Path(__file__).parent.parent / "docs" / "algorithms" / "scoreboard.md"
INTRODUCTION = """\
# Scoreboard

Every preset on the demo's task (sums of two numbers), from one SFT model that solves {before:.1%} of held-out problems:
the same optimizer, rate and batch (32 prompts, 8 answers) for all, none of them tuned, until {budget:,} tokens were
sampled. Seeds of each: {seeds}. Written by `python -m benchmarks.scoreboard`.

Held out: 256 problems, 2 samples each. Seeds are paired: each draws its tasks, its held-out samples and its rollouts'
seeds for all presets alike, so the column *over grpo* (points) is the mean of differences seed by seed. Intervals are
Student's t over the seeds (95 %), so they have all of the noise in them; with three seeds they are wide. *Entropy* and
*answer length* are those of the last step. *Tokens to 80 %*: sampled until the solved share of fresh training tasks
(mean of three steps) was above {goal:.1%}, four fifths of the way from the start to the best preset's end: the mean
over the seeds that got there, and how many. *CPU s*: of one run, on one thread of a shared machine.

It is one easy task, one model of 0.4 M parameters and one rate. It says which presets work here as they are, not which
is better: that needs a tuned rate for each. *Updates* are optimizer steps for each batch of rollouts, as the preset has
them: more of them at the same rate go further for the same tokens, which is most of what separates the rows.

![Final held-out accuracy](../images/scoreboard.svg)

| preset | updates | held-out accuracy | 95 % interval | over grpo | tokens to 80 % | entropy | answer length | CPU s |
|---|--:|--:|:-:|:-:|--:|--:|--:|--:|"""
REASONS = """
## What does worse, and why

Checked by changing one key at a time, over the same three seeds, with an earlier version that rounded differently
(there `vapo` had 66.5 %, `r1` 72.1 % and `grpo` 79.9 %):

| preset, changed | held-out accuracy of the three seeds |
|---|---|
| `vapo`, `critic: {length_alpha: null}` | 87.7 %, 89.6 %, 85.5 % |
| `r1`, `minibatches: 4` | 91.2 %, 93.4 %, 92.4 % |
| `r1`, `clip: {low: 0.2, high: 0.2}` | 82.8 %, 77.9 %, 77.7 % |
| `grpo`, `minibatches: 4` | 84.4 %, 86.3 %, 88.1 % |

- `vapo`: its lambda is 1 - 1 / (0.05 x length), made for answers of thousands of tokens. An answer here has 25, so
  lambda is 0.2: a token is credited with little more than what a critic says that is as new as the policy. Without it
  VAPO does as VC-PPO does.
- `r1`: ratios of whole answers, bounds of 10 (no ratio here is stopped) and 16 updates from each batch, which are 2
  prompts an update. The setting was made for 8,192 answers a step and a small rate. With 4 updates it does as well as
  the best.
- One update for each batch (`grpo`, `dapo`, `rloo` ...): no worse methods, but fewer steps.
- `vc_ppo` and `vapo` spend their first 2 batches (in place of the papers' 50 steps) on the critic alone.
"""
CRITIC = {"lr": 2e-3, "muon_lr": 0.02, "minibatches": 4}
PRETRAIN_STEPS = 2
"""Of VC-PPO and VAPO, in place of the papers' 50: the whole run has about fifteen steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One preset trained with one seed."""

    preset: str
    seed: int
    budget: int
    before: float
    """Held-out accuracy of the SFT model (sampled, mean over problems and samples)."""
    after: float
    entropy: float
    """Nats per token in the last step."""
    length: float
    """Mean tokens of a sampled answer in the last step."""
    seconds: float
    """CPU seconds, on one thread."""
    curve: tuple[tuple[float, float], ...]
    """(sampled tokens so far, solved share of the step's fresh training tasks)."""
    note: str = ""


def main() -> None:
    """Train what is missing, then write the page."""
    asked = parser(__doc__, PRESETS)
    asked.add_argument("--tokens", type=int, default=64_000, help="sampled tokens of each run")
    options = asked.parse_args()
    if not options.only_report:
        model = sft_model(options.out, RECIPE, "stages.rl.train.steps=1")
        before = {result.seed: result.before for result in read(options.out)}

        def run(preset: str, seed: int) -> Result:
            result = train(preset, seed, model, options.tokens, before[seed] if seed in before else None)
            before[seed] = result.before
            return result

        fill(options, run, lambda result: f"{result.before:.3f} -> {result.after:.3f}")
    write_page(read(options.out))


def train(preset: str, seed: int, model: Path, budget: int, before: float | None) -> Result:
    """Train one preset until it has sampled `budget` tokens, and measure it on held-out problems.

    `before` is what the SFT model solves with this seed, where another preset has measured it already.
    """
    recipe = load_recipe(RECIPE, [f"seed={seed}", *overrides(preset)]).recipe
    config, test = recipe.stages["rl"], recipe.stages["eval"]
    assert isinstance(config, RLStage) and isinstance(test, EvalStage)
    world, start = LocalWorld(), ModelConfig(path=str(model))
    began = time.process_time()
    grading, exam = (rubric(part.tasks, part.rewards, world) for part in (config, test))
    try:
        world.reseed(seed)
        policy = world.policy(start, config.train, config.sampling, reference=config.algorithm.kl.place != "none")
        asked = config.algorithm.critic
        critic = None if asked is None else Critic(trainer=world.scalar_model(start, config.train), config=asked)
        held_out = player(policy, exam, test.sampling)
        problems = find_tasks(test, start, world, exam).tasks

        def accuracy(version: int) -> float:
            policy.hand_over(version)
            played = held_out.play(problems, test.samples, step=0, seed=seed_of(seed, "held out"))
            return fmean(float(e.score.correct is True) for group in played.groups for e in group.episodes)

        before = accuracy(0) if before is None else before
        greedy = player(policy, grading, config.sampling.model_copy(update={"temperature": 0.0}))
        feed = Feed(
            player=player(policy, grading, config.sampling),
            tasks=find_tasks(config, start, world, grading).tasks,
            samples=config.rollouts_per_prompt,
            steps=10_000,
            seed=seed,
            hand_over=policy.hand_over,
            greedy=greedy if config.algorithm.baseline == "greedy" else None,
        )
        setting = Setting(
            config=config.algorithm, train=config.train, steps=10_000, prompts_per_step=config.prompts_per_step,
            temperature=config.sampling.temperature, max_tokens=config.sampling.max_tokens,
            max_gap=config.max_gap or MAX_GAP[policy.precision],
            weights=weights(config.rewards), seed=seed,
        )  # fmt: skip
        curve: list[tuple[float, float]] = []
        last, spent, note, version = {"entropy": math.nan, "completions/mean_length": math.nan}, 0.0, "", 0
        try:
            for step in policy_gradient(policy.trainer, feed, setting, critic=critic):
                spent += step.metrics["sampled_tokens"]
                curve.append((spent, step.metrics["solved"]))
                last, version = {**last, **step.metrics}, step.index
                if spent >= budget:
                    break
        except TrainingError as error:
            note = str(error)
        after = accuracy(version + 1)
    finally:
        grading.close()
        exam.close()
    return Result(
        preset=preset, seed=seed, budget=budget, before=before, after=after, entropy=last["entropy"],
        length=last["completions/mean_length"], seconds=time.process_time() - began, curve=tuple(curve), note=note,
    )  # fmt: skip


def overrides(preset: str) -> list[str]:
    """What is changed in the demo's recipe: the preset, a smaller batch, and the rates of a critic of this size."""
    algorithm: dict[str, object] = {"preset": preset}
    if PolicyConfig.model_validate(preset).critic is not None:
        algorithm["critic"] = CRITIC | ({} if preset == "ppo" else {"pretrain_steps": PRETRAIN_STEPS})
    rewards = "[{kind: verifier, name: accuracy}, {kind: format, weight: 0.1}, {kind: steps}]"
    return [
        f"stages.rl.algorithm={json.dumps(algorithm)}",
        "stages.rl.prompts_per_step=32",
        "stages.eval.tasks.count=256",
        "stages.eval.samples=2",
        *([f"stages.rl.rewards={rewards}"] if preset == "grpo_ps" else []),
    ]


def read(out: Path) -> list[Result]:
    """The results so far."""
    return [Result(**{**line, "curve": tuple(map(tuple, line["curve"]))}) for line in lines(out)]


# ------------------------------------------------------------------------------------------------ the page


def write_page(results: list[Result]) -> None:
    """The table and the plot, best first."""
    if not results:
        raise SystemExit("no results yet")
    by_preset: dict[str, list[Result]] = {}
    for result in results:
        by_preset.setdefault(result.preset, []).append(result)
    order = sorted(by_preset, key=lambda name: -fmean(r.after for r in by_preset[name]))
    before = fmean(r.before for r in results)
    best = max(fmean(r.after for r in by_preset[name]) for name in order)
    goal = before + 0.8 * (best - before)
    seeds = sorted({len(given) for given in by_preset.values()})
    grpo = {result.seed: result.after for result in by_preset["grpo"]}
    page = [INTRODUCTION.format(
        before=before, budget=results[0].budget, seeds=" to ".join(map(str, sorted({seeds[0], seeds[-1]}))), goal=goal
    )]  # fmt: skip
    for name in order:
        given = by_preset[name]
        after = fmean(r.after for r in given)
        reached = [at for r in given if (at := tokens_to(r, goal)) is not None]
        to_goal = f"{fmean(reached) / 1000:.0f}k ({len(reached)} of {len(given)})" if reached else "never"
        paired = [r.after - grpo[r.seed] for r in given if r.seed in grpo]
        over = "" if name == "grpo" else f"{fmean(paired):+.1%} ({interval(paired, sign='+', bounds=(-1, 1))})"
        page.append(
            f"| [{name}]({name}.md) | {PolicyConfig.model_validate(name).minibatches} | {after:.1%} | "
            f"{interval([r.after for r in given])} | {over} | {to_goal} | {fmean(r.entropy for r in given):.3f} | "
            f"{fmean(r.length for r in given):.1f} | {fmean(r.seconds for r in given):.0f} |"
        )
    page.append(REASONS.rstrip())
    failed = [f"- `{r.preset}`, seed {r.seed}: {r.note}" for r in results if r.note]
    page += ["", "## Runs that stopped", "", *failed] if failed else []
    PAGE.write_text("\n".join(page) + "\n")
    image = PAGE.parent.parent / "images" / "scoreboard.svg"
    image.parent.mkdir(exist_ok=True)
    image.write_text(plot([(name, [r.after for r in by_preset[name]]) for name in order], before))


def tokens_to(result: Result, goal: float) -> float | None:
    """Sampled tokens until three steps together solved more than `goal`."""
    for i in range(2, len(result.curve)):
        if fmean(solved for _, solved in result.curve[i - 2 : i + 1]) > goal:
            return result.curve[i][0]
    return None


def plot(rows: list[tuple[str, list[float]]], before: float) -> str:
    """A row for each preset: a dot for each seed, a bar at their mean; the dashed line is the SFT model."""
    width, row, left, top = 640, 20, 170, 30
    height = top + row * len(rows) + 30

    def x(share: float) -> float:
        return left + share * (width - left - 20)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text font-size="12" x="{left}" y="16" fill="#333">held-out accuracy; dashed: before RL</text>',
    ]
    for tick in range(0, 101, 20):
        at = x(tick / 100)
        parts.append(f'<line x1="{at}" x2="{at}" y1="{top}" y2="{height - 24}" stroke="#ddd"/>')
        parts.append(f'<text font-size="12" x="{at}" y="{height - 8}" text-anchor="middle" fill="#555">{tick} %</text>')
    parts.append(
        f'<line x1="{x(before)}" x2="{x(before)}" y1="{top}" y2="{height - 24}" stroke="#888" stroke-dasharray="4 3"/>'
    )
    for place, (name, values) in enumerate(rows):
        y = top + row * place + row / 2
        parts.append(f'<text font-size="12" x="{left - 10}" y="{y + 4}" text-anchor="end" fill="#222">{name}</text>')
        mean = x(fmean(values))
        parts.append(f'<line x1="{mean}" x2="{mean}" y1="{y - 7}" y2="{y + 7}" stroke="#1f5fa8" stroke-width="3"/>')
        parts += [f'<circle cx="{x(v)}" cy="{y}" r="3.5" fill="#1f5fa8" fill-opacity="0.5"/>' for v in values]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
