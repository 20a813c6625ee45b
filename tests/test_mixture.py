"""Several data sets in one stage: shares are what was asked for, and no example comes twice before all came once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_bad_input import MODEL
from whet.cli.app import main
from whet.data.mixture import Blend, end_to_end, shuffled
from whet.records import seed_of

BLENDS = [
    Blend((10,)),
    Blend((10, 30)),
    Blend((10, 30), (1.0, 1.0)),
    Blend((7, 100, 3), (5.0, 1.0, 2.5)),
    Blend((1, 1000), (0.999, 0.001)),
]


@pytest.mark.parametrize("blend", BLENDS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_set_has_its_share_and_repeats_nothing_before_all_came(blend: Blend, seed: int) -> None:
    starts = np.cumsum([0, *blend.sizes])
    seen: list[list[int]] = [[] for _ in blend.sizes]
    for epoch in range(4):
        order = blend.order(epoch, seed)
        assert len(order) == blend.total and order == blend.order(epoch, seed)
        for index, start in enumerate(starts[:-1]):
            own = [place - start for place in order if start <= place < starts[index + 1]]
            share = blend.weights[index] / sum(blend.weights) if blend.weights else blend.sizes[index] / blend.total
            assert abs(len(own) - share * blend.total) <= 1
            # The order inside of an epoch is shuffled; what it takes of a set is the next of the set's rounds.
            taken = blend.chosen(index, epoch, seed) if blend.weights else own
            assert Counter(taken) == Counter(own)
            seen[index] += taken
    for size, places in zip(blend.sizes, seen, strict=True):
        for start in range(0, len(places) - size + 1, size):
            assert sorted(places[start : start + size]) == list(range(size)), "a round has every example once"


def test_one_set_is_shuffled_as_it_always_was() -> None:
    assert Blend((9,)).order(3, 7) == shuffled(9, seed_of(7, "epoch", 3))
    assert Blend((4, 5)).order(3, 7) == Blend((9,)).order(3, 7), "and so are sets without weights, end to end"


def test_shares_can_be_recounted() -> None:
    said = Blend((10, 30), (3.0, 1.0)).describe(["a", "b"], [np.full(10, 5), np.full(30, 15)], seed=0)
    assert said == (
        "mixture, in the first epoch: a 75.0% of 40 samples (3 rounds), 50.0% of the tokens; "
        "b 25.0% of 40 samples (0.33 rounds), 50.0% of the tokens"
    )
    plain = Blend((10, 30)).describe(["a", "b"], [np.full(10, 5), np.full(30, 15)], seed=0)
    assert "a 25.0% of 40 samples (1 rounds), 10.0% of the tokens" in plain


def test_parts_are_read_end_to_end() -> None:
    joined = end_to_end([[1, 2], [], [3], [4, 5]])
    assert list(joined) == [1, 2, 3, 4, 5] and joined[-1] == 5 and joined[1:4] == [2, 3, 4]
    with pytest.raises(IndexError):
        joined[5]


# ------------------------------------------------------------------------------------------------ recipes

RECIPE = f"""
name: mixed
model: {MODEL}
stages:
  sft:
    kind: sft
    data:
      - {{path: a.jsonl, weight: 3, on_bad_row: drop}}
      - {{path: b.csv, weight: 1}}
    eval_data: {{path: c.jsonl, on_bad_row: drop}}
    train: {{steps: 4, batch_size: 4}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}", "completion": f"{n}{n}"} for n in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (tmp_path / "b.csv").write_text("prompt,completion\n" + "".join(f"{n},{n + 1}\n" for n in range(20)))
    long = {"prompt": "x", "completion": "y" * 100}
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0], long, {"prompt": "x"}]))
    (tmp_path / "mixed.yaml").write_text(RECIPE)
    return tmp_path


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main([*words])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_stage_trains_on_sets_with_weights_and_says_their_shares(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "mixed.yaml") == 0
    checked = " ".join(capsys.readouterr().out.split())
    shares = "mixture, in the first epoch: a.jsonl 75.0% of 28 samples (2.6 rounds)"
    assert shares in checked and "b.csv 25.0% of 28 samples (0.35 rounds)" in checked
    assert run("run", "mixed.yaml") == 0
    output, errors = capsys.readouterr()
    assert shares in " ".join((output + errors).split())
    metrics = [
        json.loads(line) for line in (folder / "runs/mixed/stages/01-sft/metrics.jsonl").read_text().splitlines()
    ]
    assert len(metrics) == 4 and all(line["eval_loss"] > 0 for line in metrics[-1:])


def test_every_row_that_was_left_out_is_in_a_file(folder: Path) -> None:
    assert run("run", "mixed.yaml", "--quiet") == 0
    dropped = folder / "runs/mixed/stages/01-sft/dropped"
    (broken,) = map(json.loads, (dropped / "data.jsonl").read_text().splitlines())
    assert broken["row"] == "a.jsonl:9" and broken["reason"] == "not valid JSON"
    short, long = map(json.loads, (dropped / "eval_data.jsonl").read_text().splitlines())
    assert short["row"] == "c.jsonl:3" and "no such column" in short["fault"]
    assert long["row"] == "c.jsonl:2" and long["reason"] == "messages: longer than the model attends to, 64"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[]", "data"),
        ("[{path: a.jsonl, weight: 1}, {path: b.csv}]", "data.1 has no weight"),
        ("[{path: a.jsonl, weight: 0}]", "weight"),
        ("{path: a.jsonl, weight: 1}", "weight"),
    ],
)
def test_weights_that_say_nothing_are_refused(
    folder: Path, data: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    head, _, tail = RECIPE.partition("    data:\n")
    (folder / "bad.yaml").write_text(f"{head}    data: {data}\n{tail[tail.index('    eval_data') :]}")
    assert run("check", "bad.yaml") == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_mixture_of_generated_and_read_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets: list[dict[str, Any]] = [{"generate": "arithmetic", "count": 5, "weight": 1}, {"path": "b.csv", "weight": 1}]
    assert run("check", "mixed.yaml", f"stages.sft.data={json.dumps(sets)}") == 0
    assert "arithmetic 48.0% of 25 samples" in " ".join(capsys.readouterr().out.split())
