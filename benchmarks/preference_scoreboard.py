"""Trains every preference preset on comparisons of known worth, and writes down what each learned.

    python -m benchmarks.preference_scoreboard --out runs/preferences               everything: half an hour on one core
    python -m benchmarks.preference_scoreboard --out runs/preferences --minutes 8   as much as fits; the next goes on
    python -m benchmarks.preference_scoreboard --out runs/preferences --seeds 1 --presets dpo simpo
    python -m benchmarks.preference_scoreboard --out runs/preferences --only-report the page again, from the results

All start from one SFT model (that of `recipes/dpo.yaml`), with that recipe's optimizer, rate and batch; nothing is
tuned for any of them. Every (preset, seed) is one line of `results.jsonl` in the folder, so an interrupted scoreboard
goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.board import fill, interval, lines, parser, sft_model
from whet.algorithms.groups import to_rows
from whet.algorithms.preference import objective_of, preference, weigh_preferences
from whet.config import EvalStage, GeneratedConfig, ModelConfig, PreferenceStage
from whet.config.loading import load_recipe
from whet.config.preference import PREFERENCE_PRESETS
from whet.envs.base import Attempt, Task
from whet.envs.families import family
from whet.errors import TrainingError
from whet.launch.world import LocalWorld
from whet.pipeline.load_data import rubric, tasks
from whet.pipeline.playing import player
from whet.pipeline.stage import Policy
from whet.pipeline.stages.preference import gate_preferences
from whet.records import Atom, Episode, TokenRow, seed_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "algorithms" / "preference-scoreboard.md"
RECIPE = ROOT / "recipes" / "dpo.yaml"
COMPARISONS, PROBLEMS, SAMPLES = 2000, 256, 2
INTRODUCTION = """\
# Preference scoreboard

Every preset of `kind: preference` on comparisons whose truth is known: sums, of whose answers each is worth (2 if it is
right + 1 if it shows its work) / 3. All start from one SFT model, whose answers are worth {before:.3f}, and see
{pairs:,} pairs once (KTO: as many single answers as those have) with the same optimizer, rate ({lr:g}) and batch
({batch}); none of them is tuned. Seeds of each: {seeds}. Written by `python -m benchmarks.preference_scoreboard`.

On {problems} held-out problems x {samples} samples: *win rate* is how often an answer is worth more than one of the SFT
model to the same problem, ties counting half, with Student's t over the seeds; *worth* their mean. *Pairs* is the
share of held-out comparisons in the right order by implicit reward, and *margin* the implicit reward's difference (in
units of each loss, so it compares seeds and not losses). *KL* is that from the SFT model, in nats for an answer sampled
by the policy; *length* the change of the mean answer, in tokens.

It is one easy task, one model of 0.4 M parameters and one rate, at which some losses have hardly begun and others have
gone far (see KL). It says what they do here as they are, not which is better.

| preset | seeds | win rate | 95 % interval | worth | pairs | margin | KL | length | seconds |
|---|--:|--:|:-:|--:|--:|--:|--:|--:|--:|"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One preset trained with one seed."""

    preset: str
    seed: int
    lr: float
    batch: int
    before: float
    """Mean worth of the SFT model's answers."""
    worth: float
    win_rate: float
    accuracy: float
    """Share of held-out comparisons in the right order; NaN for losses of single answers."""
    margin: float
    kl: float
    """Nats for an answer."""
    length: float
    """Mean tokens, after minus before."""
    seconds: float
    """CPU seconds of training, on one thread."""
    note: str = ""


def main() -> None:
    """Train what is missing, then write the page."""
    options = parser(__doc__, PREFERENCE_PRESETS).parse_args()
    if not options.only_report:
        bench = Bench(sft_model(options.out, RECIPE, "stages.dpo.train.steps=1"))
        fill(options, bench.train, lambda result: f"wins {result.win_rate:.3f}  kl {result.kl:.2f}")
    write_page([Result(**line) for line in lines(options.out)])


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a policy answered, and what that is worth."""

    episodes: list[Episode]
    worths: list[float]

    @property
    def length(self) -> float:
        """Mean tokens of an answer."""
        return fmean(episode.sampled_tokens for episode in self.episodes)

    @property
    def rows(self) -> list[TokenRow]:
        """The answers as rows."""
        return [row for episode in self.episodes for row in to_rows(episode)]


class Bench:
    """The SFT model, which everything is measured against."""

    def __init__(self, model: Path) -> None:
        self.world, self.start = LocalWorld(), ModelConfig(path=str(model))
        recipe = load_recipe(RECIPE, [f"stages.eval.tasks.count={PROBLEMS}"]).recipe
        config, test = recipe.stages["dpo"], recipe.stages["eval"]
        assert isinstance(config, PreferenceStage) and isinstance(test, EvalStage)
        assert isinstance(test.tasks, GeneratedConfig)
        self.config, self.test, self.judge = config, test, family(test.tasks)
        self.problems = tasks(test.tasks)[0]
        self.reference = self.world.policy(self.start, config.train, test.sampling)
        self.answers: dict[int, Sampled] = {}

    def train(self, preset: str, seed: int) -> Result:
        """Train one preset on its seed's comparisons, and measure it on held-out problems."""
        count = COMPARISONS if preset != "kto" else 2 * COMPARISONS
        source = {"generate": "arithmetic", "count": count, "seed": 10 + seed}
        held_out = {"generate": "arithmetic", "count": 200, "split": "test", "seed": 1}
        config = PreferenceStage.model_validate(
            {**self.config.model_dump(exclude={"loss"}), "loss": preset, "data": source, "eval_data": held_out}
        )
        loss, before = config.loss, self._before(seed)
        self.world.reseed(seed)
        policy = self.world.policy(self.start, config.train, self.test.sampling)
        began, note, trainer = time.process_time(), "", policy.trainer
        examples = self._examples(config, policy, eval_=False)
        try:
            for _ in preference(trainer, examples, loss, config.train, seed=seed, max_gap=config.max_reference_gap):
                pass
        except TrainingError as error:
            note = str(error)
        seconds = time.process_time() - began
        unseen = self._examples(config, policy, eval_=True)
        metrics = trainer.evaluate(weigh_preferences(unseen, loss=loss, trainer=trainer), objective_of(loss))
        after = self._sample(policy, seed)
        wins = [(a > b) + (a == b) / 2 for a, b in zip(after.worths, before.worths, strict=True)]
        now, then = (
            [float(x.sum(dtype=float)) for x in of.trainer.forward(after.rows, "logp")["logp"]]
            for of in (policy, self.reference)
        )
        nothing = math.nan
        return Result(
            preset=preset,
            seed=seed,
            lr=config.train.lr,
            batch=config.train.batch_size,
            before=fmean(before.worths),
            worth=fmean(after.worths),
            win_rate=fmean(wins),
            accuracy=metrics["rewards/accuracies"].mean if "rewards/accuracies" in metrics else nothing,
            margin=metrics["rewards/margins"].mean if "rewards/margins" in metrics else nothing,
            kl=fmean(a - b for a, b in zip(now, then, strict=True)),
            length=after.length - before.length,
            seconds=seconds,
            note=note,
        )

    def _examples(self, config: PreferenceStage, policy: Policy, *, eval_: bool) -> Sequence[Atom]:
        """The atoms, with the SFT model's log-probabilities where the loss wants a reference."""
        source = config.eval_data if eval_ else config.data
        assert source is not None
        atoms = gate_preferences(self.world, self.start, config, source).atoms
        if not config.loss.needs_reference:
            return atoms
        rows = [row for atom in atoms for row in atom.rows]
        logps = iter(self.reference.trainer.forward(rows, "logp")["logp"])
        return [Atom(rows=tuple(row.with_columns(ref_logp=next(logps)) for row in atom.rows)) for atom in atoms]

    def _before(self, seed: int) -> Sampled:
        if seed not in self.answers:
            self.answers[seed] = self._sample(self.reference, seed)
        return self.answers[seed]

    def _sample(self, policy: Policy, seed: int) -> Sampled:
        grading = rubric(self.test.tasks, self.test.rewards, self.world)
        policy.hand_over(1)
        play = player(policy, grading, self.test.sampling)
        groups = play.play(self.problems, SAMPLES, step=0, seed=seed_of(seed, "held out")).groups
        grading.close()
        pairs = [(task, e) for task, group in zip(self.problems, groups, strict=True) for e in group.episodes]
        return Sampled([episode for _, episode in pairs], [self._worth(task, episode) for task, episode in pairs])

    def _worth(self, task: Task, episode: Episode) -> float:
        attempt = Attempt(
            task=task, messages=episode.messages[-1:], completion_tokens=(), truncated=False, max_tokens=1
        )
        return self.judge.worth(attempt)


def write_page(results: list[Result]) -> None:
    """The table, best first."""
    if not results:
        raise SystemExit("no results yet")
    by_preset: dict[str, list[Result]] = {}
    for result in results:
        by_preset.setdefault(result.preset, []).append(result)
    seeds = sorted({len(given) for given in by_preset.values()})
    page = [
        INTRODUCTION.format(
            before=fmean(r.before for r in results),
            pairs=COMPARISONS,
            lr=results[0].lr,
            batch=results[0].batch,
            problems=PROBLEMS,
            samples=SAMPLES,
            seeds=" to ".join(map(str, sorted({seeds[0], seeds[-1]}))),
        )
    ]
    for name in sorted(by_preset, key=lambda name: -fmean(r.win_rate for r in by_preset[name])):
        given = by_preset[name]
        mean = {field: fmean(getattr(r, field) for r in given) for field in MEANS}
        pairs = "" if math.isnan(mean["accuracy"]) else f"{mean['accuracy']:.0%}"
        margin = "" if math.isnan(mean["margin"]) else f"{mean['margin']:.3g}"
        page.append(
            f"| `{name}` | {len(given)} | {mean['win_rate']:.1%} | {interval([r.win_rate for r in given])} | "
            f"{mean['worth']:.3f} | {pairs} | {margin} | {mean['kl']:.2f} | {mean['length']:+.1f} | "
            f"{mean['seconds']:.0f} |"
        )
    failed = [f"- `{r.preset}`, seed {r.seed}: {r.note}" for r in results if r.note]
    page += ["", "## Runs that stopped", "", *failed] if failed else []
    PAGE.write_text("\n".join(page) + "\n")


MEANS = ("win_rate", "worth", "accuracy", "margin", "kl", "length", "seconds")

if __name__ == "__main__":
    main()
