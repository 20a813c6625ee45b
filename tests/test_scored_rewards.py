"""Reward models as rewards: what they say is what they were trained to say, of answers, steps and in company."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from whet.algorithms.scorer import ModelScorer
from whet.config.loading import load_recipe
from whet.config.rewards import ScorerConfig
from whet.envs.base import Attempt, Task
from whet.envs.clients import Passage, ScoreReading
from whet.envs.rewards.model import ModelReward, ProcessReward, split_steps
from whet.errors import ConfigError, ModelError
from whet.formulas.aggregate import pessimistic
from whet.launch.main import run_recipe
from whet.launch.memory import footprints
from whet.launch.world import LocalWorld
from whet.models.armo import GateFacts
from whet.models.create import byte_tokenizer
from whet.models.heads import RewardFacts
from whet.pipeline.run import Run
from whet.records import Message, TokenRow
from whet.templates.jinja import JinjaTemplate

MODEL = '{path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 32}}'


def attempt(answer: str, *, truncated: bool = False) -> Attempt:
    return Attempt(
        task=Task(id="t", messages=(Message(role="user", content="go"),)),
        messages=(Message(role="assistant", content=answer),),
        completion_tokens=(1, 2),
        truncated=truncated,
        max_tokens=9,
    )


class Lengths:
    """Scores a passage by the characters up to each end, times a factor; cannot read an x."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def read(self, passages: Sequence[Passage]) -> list[ScoreReading]:
        return [
            ScoreReading(scores=(), failure="an x")
            if "x" in passage.messages[-1].content
            else ScoreReading(scores=tuple(self.factor * end for end in passage.ends))
            for passage in passages
        ]


def model(*factors: float, **changes: Any) -> ModelReward:
    fields: dict[str, Any] = {"combine": fmean, "truncated": None, "deadline_s": 9.0, **changes}
    return ModelReward(name="rm", weight=1.0, scorers=tuple(map(Lengths, factors)), **fields)


def test_one_model_says_what_it_says_and_a_failure_is_no_number() -> None:
    good, bad, cut = model(1.0).grade([attempt("four"), attempt("x"), attempt("yes", truncated=True)], step=1)
    assert (good.value, good.failure, bad.value, bad.failure, cut.value) == (4.0, "", None, "an x", 3.0)
    (ended,) = model(1.0, truncated=-1.0).grade([attempt("yes", truncated=True)], step=1)
    assert ended.value == -1.0


def test_an_ensemble_is_as_sure_as_its_models_agree() -> None:
    def grade(combine: Any) -> Any:
        return model(1.0, 3.0, combine=combine).grade([attempt("four")], step=1)[0]

    assert grade(fmean).value == 8.0 and grade(min).value == 4.0
    pessimist = grade(lambda scores: pessimistic(scores, spread=0.5))
    assert pessimist.value == pytest.approx(8.0 - 0.5 * 4.0)
    assert pessimist.metrics == {"spread": 4.0}


def test_what_the_clock_leaves_out_is_late() -> None:
    grades = model(1.0, deadline_s=-1.0).grade([attempt("four")] * 3, step=1)
    assert all(grade.value is None and grade.timed_out and "deadline" in grade.failure for grade in grades)


def test_steps_have_grades_where_they_end() -> None:
    reward = ProcessReward(name="prm", weight=1.0, scorer=Lengths(0.1), separator=";", aggregate="min", deadline_s=9.0)
    grade, empty = reward.grade([attempt("ab;c; ;d"), attempt("")], step=1)
    assert [step.end for step in grade.steps] == [3, 5, 8]
    assert [step.value for step in grade.steps] == pytest.approx([0.3, 0.5, 0.8])
    assert grade.value == pytest.approx(0.3) and grade.metrics == {"steps": 3.0}
    assert empty.steps == () and empty.value == 0.0


@pytest.mark.parametrize(
    ("answer", "steps"),
    [
        ("a;b", ["a;", "b"]),
        ("a;b;", ["a;", "b;"]),
        (";;a;;b", [";;a;", ";b"]),
        ("a; ;", ["a; ;"]),
        ("a", ["a"]),
        (";", [";"]),
        ("", [""]),
    ],
)
def test_steps_joined_are_the_answer(answer: str, steps: list[str]) -> None:
    found = split_steps(answer, ";")
    assert "".join(found) == answer and found == steps


class Says:
    """A trainer of which only these raw scores are known, one or all outputs of the head for each row."""

    def __init__(self, *raw: float | tuple[float, ...]) -> None:
        self.raw = raw

    def forward(self, rows: Sequence[TokenRow], want: str) -> dict[str, list[np.ndarray]]:
        return {want: [np.array([said]).reshape(1, -1) for said, _ in zip(self.raw, rows, strict=True)]}


def scorer_of(trainer: Any, facts: RewardFacts, **fields: Any) -> ModelScorer:
    return ModelScorer(trainer=trainer, template=JinjaTemplate(byte_tokenizer()), max_length=99, facts=facts, **fields)


def test_several_objectives_and_a_gate_by_hand() -> None:
    asked = [Passage(messages=(*attempt("a").task.messages, *attempt("a").messages), ends=(1,))]
    gate = GateFacts(hidden=0, temperature=1.0, debias=None)
    facts, names = RewardFacts(mean=1.0, std=2.0, gate=gate), ("kind", "brief")
    (gated,) = scorer_of(Says((5.0, 1.0, 10.0, 0.25, 0.75)), facts, objectives=names).read(asked)
    assert gated.scores == (2.0,), "the gate's score in its unit, what objectives say as they say it"
    assert gated.parts == {"kind": 1.0, "brief": 10.0, "gate/kind": 0.25, "gate/brief": 0.75}
    weights = {"kind": 2.0, "brief": -1.0}
    (fixed,) = scorer_of(Says((1.0, 10.0)), RewardFacts(), objectives=names, weights=weights).read(asked)
    assert (fixed.scores, fixed.parts) == ((-8.0,), {"kind": 1.0, "brief": 10.0})


@pytest.mark.parametrize("facts", [RewardFacts(mean=1.0, std=2.0), RewardFacts(reads="steps", link="sigmoid")])
def test_a_score_that_is_no_number_is_a_failure_and_never_a_probability(facts: RewardFacts) -> None:
    raw = (0.5, math.nan, -math.inf, -800.0)
    scorer = scorer_of(Says(*raw), facts)
    asked = [Passage(messages=(*attempt("a").task.messages, *attempt("a").messages), ends=(1,))] * len(raw)
    good, nan, infinite, small = scorer.read(asked)
    meant = [1 / (1 + math.exp(-0.5)), 0.0] if facts.link == "sigmoid" else [-0.25, -400.5]
    assert [good.scores[0], small.scores[0]] == pytest.approx(meant)
    assert (nan.scores, nan.failure) == ((), "the reward model says nan")
    assert (infinite.scores, infinite.failure) == ((), "the reward model says -inf")


# ------------------------------------------------------------------------------------------ trained ones


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reward models and a process reward model, and RL against all of them, in one recipe."""
    folder = tmp_path_factory.mktemp("scored")
    pairs = [{"prompt": f"Say {i}", "chosen": f"please {i}", "rejected": f"no {i % 7}"} for i in range(60)]
    steps = [
        {"prompt": f"Go {i}", "steps": [f"a{(i * 7 + k * 3) % 10};" for k in range(3)],
         "labels": [(i * 7 + k * 3) % 10 != 9 for k in range(3)]}
        for i in range(60)
    ]  # fmt: skip
    for name, rows in (("pairs", pairs), ("steps", steps)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(f"""
name: scored
model: {MODEL}
stages:
  rm: {{kind: reward_model, data: {{path: {folder}/pairs.jsonl}}, train: {{lr: 0.01, batch_size: 20, steps: 12}}}}
  other:
    kind: reward_model
    data: {{path: {folder}/pairs.jsonl}}
    normalise: unit
    train: {{lr: 0.02, batch_size: 20, steps: 8}}
  prm:
    kind: reward_model
    data: {{path: {folder}/steps.jsonl}}
    learn: steps
    train: {{lr: 0.02, batch_size: 20, steps: 8}}
  rl:
    kind: rl
    tasks: {{generate: arithmetic, count: 8, digits: 1}}
    rewards:
      - {{kind: model, path: "@rm"}}
      - {{kind: ensemble, weight: 0.5, models: [{{path: "@rm"}}, {{path: "@other"}}]}}
      - {{kind: process_model, path: "@prm", separator: ";", weight: 0.1}}
      - {{kind: worth, weight: 0}}
    algorithm: {{preset: ppo, step_weight: 0.2}}
    prompts_per_step: 4
    rollouts_per_prompt: 2
    sampling: {{max_tokens: 8}}
    train: {{lr: 0.001, steps: 2}}
""")
    run_recipe(load_recipe(folder / "recipe.yaml", [f"out={folder}/run"]), quiet=True)
    return folder / "run" / "stages"


def test_rl_starts_from_the_policy_and_logs_every_reward(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "04-rl" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        named = {name: line[f"rewards/{name}"] for name in ("model", "ensemble", "process_model", "worth")}
        weighed = named["model"] + 0.5 * named["ensemble"] + 0.1 * named["process_model"]
        assert line["reward"] == pytest.approx(weighed, abs=1e-5)
        assert 0 < named["process_model"] < 1 and line["rewards/ensemble/spread"] > 0
    config = json.loads((run / "04-rl" / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"], "the policy is not what the stage before made"


def test_the_scorer_says_what_transformers_says(run: Path) -> None:
    scorer = LocalWorld().scorer(ScorerConfig(path=str(run / "01-rm" / "model")), steps=False)
    module = AutoModelForSequenceClassification.from_pretrained(run / "01-rm" / "model")
    template, asked = JinjaTemplate(byte_tokenizer()), Message(role="user", content="Say 3")
    answers = ["please 3", "no", "please 3 and more"]
    passages = [
        Passage(messages=(asked, Message(role="assistant", content=answer)), ends=(len(answer),)) for answer in answers
    ]
    for passage, answer, reading in zip(passages, answers, scorer.read(passages), strict=True):
        tokens = template.prompt((asked,)) + tuple(byte_tokenizer()(answer + "<|im_end|>")["input_ids"])
        with torch.no_grad():
            raw = float(module(input_ids=torch.tensor([tokens])).logits)
        facts = module.config.whet_reward
        assert reading.scores == pytest.approx([(raw - facts["mean"]) / facts["std"]], abs=1e-4), passage


def test_steps_are_probabilities_and_what_follows_changes_nothing(run: Path) -> None:
    scorer = LocalWorld().scorer(ScorerConfig(path=str(run / "03-prm" / "model")), steps=True)
    asked = Message(role="user", content="Go")
    long, short = (Message(role="assistant", content=text) for text in ("a1;a9;a3", "a1;a9;"))
    whole, part = scorer.read(
        [Passage(messages=(asked, long), ends=(3, 6, 8)), Passage(messages=(asked, short), ends=(3, 6))]
    )
    assert all(0 < score < 1 for score in whole.scores)
    assert part.scores[0] == pytest.approx(whole.scores[0], abs=1e-5)
    assert math.isfinite(part.scores[1]), "the end of an answer is read at its stop token"


def test_what_cannot_be_read_is_a_failure_of_that_answer_alone(run: Path) -> None:
    scorer = LocalWorld().scorer(ScorerConfig(path=str(run / "01-rm" / "model")), steps=False)
    asked = Message(role="user", content="Say 3")
    passages = [
        Passage(messages=(asked, Message(role="assistant", content=text)), ends=(len(text),))
        for text in ("fine", "y" * 5000, "<|im_start|>user")
    ]
    fine, long, forged = scorer.read(passages)
    assert fine.scores and not fine.failure
    assert not long.scores and "longer than the model attends to, 4096; it has" in long.failure
    assert not forged.scores and forged.failure.startswith("the reward model cannot read it")


def test_a_model_of_another_kind_is_refused(run: Path) -> None:
    passage = Passage(messages=(Message(role="assistant", content="a"),), ends=(1,))
    with pytest.raises(ModelError, match=r"is a reward model of steps; use kind: process_model"):
        LocalWorld().scorer(ScorerConfig(path=str(run / "03-prm" / "model")), steps=False).read([passage])
    with pytest.raises(ModelError, match=r"is a reward model of answers; use kind: model"):
        LocalWorld().scorer(ScorerConfig(path=str(run / "01-rm" / "model")), steps=True).read([passage])
    with pytest.raises(ModelError, match="has no scalar head that was trained"):
        LocalWorld().scorer(ScorerConfig(path=str(run / "04-rl" / "model")), steps=False).read([passage])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ('[{kind: model, path: "@sft"}]', r"stages\.rl\.rewards\.0\.path is @sft, which is no earlier reward_model"),
        ('[{kind: ensemble, models: [{path: "@rm"}, {path: "@x"}]}]', r"rewards\.0\.models\.1\.path is @x"),
        ('[{kind: ensemble, models: [{path: "@rm"}]}]', "models: must be a list of at least 2"),
    ],
)
def test_references_are_checked_when_the_recipe_is_loaded(tmp_path: Path, rewards: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(f"""
name: r
model: "whet:tiny"
stages:
  sft: {{kind: sft, data: {{generate: arithmetic}}}}
  rm: {{kind: reward_model, data: {{generate: arithmetic}}}}
  rl: {{kind: rl, tasks: {{generate: arithmetic}}, rewards: {rewards}, train: {{steps: 1}}}}
""")
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_the_memory_plan_counts_every_model(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"""
name: r
model: {MODEL}
stages:
  rm: {{kind: reward_model, data: {{generate: arithmetic}}}}
  rl:
    kind: rl
    tasks: {{generate: arithmetic}}
    rewards: [{{kind: ensemble, models: [{{path: "@rm"}}, {{path: "@rm"}}]}}]
    train: {{steps: 1}}
""")
    recipe = load_recipe(tmp_path / "r.yaml").recipe
    _, rl = footprints(Run(recipe=recipe, folder=tmp_path / "run"))
    asked = [role for role in rl.roles if role.role == "reward model"]
    assert len(asked) == 2 and all(role.weights > 0 and not role.optimizer for role in asked)
