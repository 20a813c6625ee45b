"""Reward models of several objectives: ratings in, a head with names out, and a verdict for each of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.test_reward_model import run
from whet.config import CreateConfig, ModelConfig, RewardModelStage
from whet.config.loading import load_recipe
from whet.config.rewards import ScorerConfig
from whet.envs.clients import Passage
from whet.errors import ConfigError, DataError, ModelError
from whet.evals.judgement import Rating, correlation, judge_ratings
from whet.evals.stats import explained_variance
from whet.launch.main import run_recipe
from whet.launch.world import LocalWorld
from whet.pipeline.reward_dataset import reward_dataset
from whet.records import Message

NAMES = ("polite", "long")
STAGE = f"learn: ratings\n    objectives: [{', '.join(NAMES)}]\n    hold_out: 0.2\n    "
MODEL = ModelConfig(path="whet:tiny", create=CreateConfig(hidden_size=16, layers=1, heads=2, kv_heads=1))
TRAIN = "train: {lr: 0.02, batch_size: 20, steps: 30}"


def rows(count: int = 200) -> list[dict[str, Any]]:
    """Politeness is rated 0 or 10, length in characters; every fourth answer is not rated for politeness."""
    made = []
    for i in range(count):
        answer = f"{('please', 'no')[i % 2]} {'x' * (i * 7 % 11)}"
        ratings: dict[str, Any] = {"polite": 10 * (i % 2 == 0), "long": len(answer)}
        if i % 4 == 3:
            ratings["polite"] = None
        made.append({"prompt": f"Say {i}", "completion": answer, "ratings": ratings})
    return made


def test_it_learns_each_objective_and_transformers_loads_it_with_their_names(tmp_path: Path) -> None:
    stage = run(tmp_path, STAGE + TRAIN, rows())
    found = json.loads((stage / "reward.json").read_text())
    explained = {each["name"]: each["explained"] for each in found["objectives"]}
    assert found["what"] == "ratings" and list(explained) == list(NAMES)
    assert all(share["mean"] > 0.8 and share["low"] < share["mean"] < share["high"] for share in explained.values())
    (long,) = (each for each in found["objectives"] if each["name"] == "long")
    assert long["length_of_ratings"] > 0.99 and long["length"] > 0.8
    module, loading = AutoModelForSequenceClassification.from_pretrained(stage / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert module.config.num_labels == 2 and module.config.id2label == dict(enumerate(NAMES))
    scales = module.config.whet_reward["ratings"]
    tokenizer = AutoTokenizer.from_pretrained(stage / "model")

    def rate(answer: str) -> dict[str, float]:
        turns = [{"role": "user", "content": "Say 300"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        with torch.no_grad():
            raw = module(**tokenizer(text, return_tensors="pt")).logits[0].tolist()
        return {name: mean + std * x for x, (name, (mean, std)) in zip(raw, scales.items(), strict=True)}

    assert rate("please x")["polite"] > 6 > 4 > rate("no xxxx")["polite"], "in the units of the ratings themselves"
    assert rate("no " + "x" * 9)["long"] > rate("no x")["long"] + 4
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "loss/polite", "loss/long", "eval_loss/polite", "eval_loss"} <= set(lines[-1])
    assert "of the variance explained" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["ratings"].update(polite="9"), r"rows.jsonl:3: ratings.polite: not a finite number"),
        (
            lambda row: row.update(ratings={"rude": 1}),
            r"rows.jsonl:3: ratings: not one rating by the stage's objectives",
        ),
        (lambda row: row.pop("ratings"), r"rows.jsonl:3: ratings: no ratings"),
    ],
)
def test_a_bad_row_stops_the_run_and_is_named(tmp_path: Path, change: Any, message: str) -> None:
    bad = rows(20)
    change(bad[2])
    with pytest.raises(DataError, match=message) as raised:
        run(tmp_path, STAGE + TRAIN, bad)
    assert raised.value.exit_code == 3


def test_a_subset_of_the_ratings_is_enough_and_a_misspelled_one_is_none(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20)))

    def given(*objectives: str) -> str:
        config = RewardModelStage.model_validate(
            {"kind": "reward_model", "data": {"path": str(tmp_path / "rows.jsonl")}, "learn": "ratings",
             "objectives": objectives}
        )  # fmt: skip
        return reward_dataset(LocalWorld(), MODEL, config).described

    assert given("long").startswith("20 answers, 20 ratings, those by polite left unread;")
    assert given("long", "polite").startswith("20 answers, 35 ratings;")
    for objectives in (("long", "polit"), ("polit", "long")):
        with pytest.raises(DataError, match=r"objectives: no row is rated by 'polit'; did you mean 'polite'\?"):
            given(*objectives)
    with pytest.raises(DataError, match=r"not one rating by .* objectives; it is rated by others, .* 'polite'"):
        given("polit")


def test_an_objective_that_says_nothing_is_refused(tmp_path: Path) -> None:
    same = rows(20)
    for row in same:
        row["ratings"]["long"] = 4
    with pytest.raises(DataError, match="every row is rated 4 by long, which teaches nothing"):
        run(tmp_path / "same", STAGE + TRAIN, same)
    for row in same:
        row["ratings"]["long"] = None
    with pytest.raises(DataError, match="no row that is trained on is rated by long"):
        run(tmp_path / "none", STAGE + TRAIN, [row for row in same if row["ratings"]["polite"] is not None])


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("learn: ratings", "learn: ratings needs the names of what is rated"),
        ("objectives: [a, b]", "objectives is for ratings, and learn is comparisons"),
        ("learn: ratings\n    objectives: [a, a]", "one of them is named twice"),
        ("learn: ratings\n    objectives: [a/b]", "objectives"),
        ("learn: ratings\n    objectives: [a]\n    centring: 0.1", "are for comparisons, and learn is ratings"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, stage: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, stage, [])


def test_one_objective_makes_a_plain_reward_model(tmp_path: Path) -> None:
    """Absolute ratings of quality, with no comparison in sight: one output, which any reward reads as it is."""
    polite = [
        {**row, "ratings": {"polite": row["ratings"]["polite"]}}
        for row in rows()
        if row["ratings"]["polite"] is not None
    ]
    stage = run(tmp_path, "learn: ratings\n    objectives: [polite]\n    " + TRAIN, polite)
    turns = [
        (Message(role="user", content="Say 300"), Message(role="assistant", content=text))
        for text in ("please xx", "no xx")
    ]
    scorer = LocalWorld().scorer(ScorerConfig(path=str(stage / "model")), steps=False)
    good, bad = scorer.read([Passage(messages=each, ends=(len(each[1].content),)) for each in turns])
    assert good.scores[0] > bad.scores[0] + 0.5 and not good.parts


def test_generated_answers_have_ratings_of_their_own(tmp_path: Path) -> None:
    text = (
        "name: g\nmodel: {path: whet:tiny, create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1}}\nstages:\n"
        "  rm: {kind: reward_model, learn: ratings, objectives: [right, NAME], train: {batch_size: 4, steps: 2},\n"
        "    data: {generate: arithmetic, count: 40, digits: 1, style_instructions: true, answers: 4}}\n"
    )
    (tmp_path / "r.yaml").write_text(text.replace("NAME", "brief"))
    run_recipe(load_recipe(tmp_path / "r.yaml", [f"out={tmp_path}/run"]), quiet=True)
    (tmp_path / "r.yaml").write_text(text.replace("NAME", "kind"))
    with pytest.raises(DataError, match="not rated by kind; they are by right, worked, brief"):
        run_recipe(load_recipe(tmp_path / "r.yaml", [f"out={tmp_path}/other"]), quiet=True)


def test_a_head_of_several_is_no_critic_and_begins_no_other(tmp_path: Path) -> None:
    stage = run(tmp_path / "first", STAGE + "train: {lr: 0.02, batch_size: 20, steps: 2}", rows(40))
    pairs = [{"prompt": f"Say {i}", "chosen": "please", "rejected": "no"} for i in range(20)]
    with pytest.raises(ModelError, match="rates polite, long, and one number is needed here"):
        run(tmp_path / "second", f"model: {stage}/model\n    train: {{steps: 2}}", pairs)


# --------------------------------------------------------------------------------------------- the verdict


def test_explained_variance_by_hand() -> None:
    # Errors 1 + 1 + 2 of totals 4 + 4 + 8: one quarter is left, from every question, so nothing is uncertain about it.
    exact = explained_variance([1, 1, 2], [4, 4, 8])
    assert exact.mean == pytest.approx(0.75) and exact.questions == 3
    # Residuals of (1, 3) against the ratio 1/2 of totals (4, 4): (-1, 1) / 4; t(1) = 12.706, std 0.3536, / sqrt 2.
    wide = explained_variance([1, 3], [4, 4])
    assert wide.mean == pytest.approx(0.5) and wide.low == pytest.approx(0.5 - 12.706 * 0.25, abs=1e-3)


def test_intervals_of_explained_variance_cover_what_they_should() -> None:
    """The truth is 1 - 0.5 / 1.5 = 2/3; with clusters of two answers that share their error."""
    draw, covered = Random(1), 0
    for _ in range(200):
        errors, totals = [], []
        for _ in range(80):
            common = draw.gauss(0, 0.5)
            pairs = [(draw.gauss(0, 1), common + draw.gauss(0, 0.5)) for _ in range(2)]
            errors.append(sum(e * e for _, e in pairs))
            totals.append(sum((s + e) ** 2 for s, e in pairs))
        found = explained_variance(errors, totals)
        covered += found.low < 2 / 3 < found.high
    assert 180 <= covered <= 198


def test_the_constant_explains_nothing_and_what_does_not_vary_has_no_correlation() -> None:
    given = [Rating(prompt=i, score=0.0, rating=float(i % 2 * 2 - 1), length=i) for i in range(10)]
    nothing = [Rating(prompt=0, score=0.3, rating=0.0, length=3)]
    found = judge_ratings({"quality": given, "unrated": [], "as the mean": nothing})
    (only,) = found.objectives
    assert only.name == "quality" and only.explained.mean == 0 and only.correlation is None and only.length is None
    assert only.length_of_ratings is not None and not math.isnan(only.length_of_ratings)
    assert found.count == 11


def test_each_correlation_is_of_what_it_says() -> None:
    """Scores rise with the ratings and fall with the length; ratings and lengths go their own ways."""
    told = zip((1.0, 2.0, 3.0), (1.0, 2.0, 9.0), (3, 2, 1), strict=True)
    given = [Rating(prompt=score, score=score, rating=rating, length=length) for score, rating, length in told]
    (only,) = judge_ratings({"quality": given}).objectives
    expected = (correlation([1, 2, 3], [1, 2, 9]), -1, correlation([1, 2, 9], [3, 2, 1]))
    assert (only.correlation, only.length, only.length_of_ratings) == pytest.approx(expected)


def test_correlation_by_hand() -> None:
    assert correlation([1, 2, 3], [6, 4, 2]) == pytest.approx(-1)
    assert correlation([0, 0, 1], [0, 1, 1]) == pytest.approx(0.5)  # (1/3) / sqrt(2/3 * 2/3)
