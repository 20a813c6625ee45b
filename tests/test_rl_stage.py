"""RL stages that learn nothing or lose answers: what the run ends with, and what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.laws.support import tiny_trainer
from tests.test_policy import FakeFeed, config, episode, group, setting
from whet.algorithms.groups import unscored, why_no_signal
from whet.algorithms.policy import policy_gradient
from whet.config.loading import load_recipe
from whet.errors import TrainingError, UserError
from whet.launch.main import run_recipe
from whet.records import Group
from whet.tracking.log import read_metrics

MODEL = {
    "path": "whet:tiny",
    "create": {
        "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_length": 128,
    },
}  # fmt: skip
TASKS = [{"prompt": "red", "answer": "1"}, {"prompt": "green", "answer": "2"}]
EQUAL = {"rewards": [{"kind": "exact"}, {"kind": "overlong", "cache_tokens": 4}], "algorithm": "dapo"}


def run(
    folder: Path,
    tasks: list[dict[str, str]] = TASKS,
    steps: int = 2,
    model: dict[str, Any] | None = None,
    **stage: Any,
) -> Path:
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    whole = {
        "kind": "rl", "tasks": {"path": str(folder / "tasks.jsonl")}, "prompts_per_step": 2, "rollouts_per_prompt": 4,
        "sampling": {"max_tokens": 8}, "train": {"steps": steps, "lr": 0.01}, **stage,
    }  # fmt: skip
    recipe = {"name": "r", "model": model or MODEL, "out": str(folder / "run"), "stages": {"rl": whole}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(load_recipe(folder / "recipe.yaml"))
    return folder / "run" / "stages" / "01-rl"


def rollouts(stage: Path) -> list[Mapping[str, Any]]:
    return [row for file in sorted(stage.glob("rollouts/*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_a_stage_without_a_single_update_fails_and_is_no_finished_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError, match=r"none of 3 steps made an update; .* 100% were all wrong") as caught:
        run(tmp_path, steps=3, **EQUAL)
    assert caught.value.exit_code == 8
    assert not (tmp_path / "run" / "stages" / "01-rl" / "model").exists()
    assert capsys.readouterr().err.count("no update: of the groups 100% were all wrong") == 3
    with pytest.raises(TrainingError, match="nothing was learned"):  # gone on with, it is no success either
        run_recipe(load_recipe(tmp_path / "recipe.yaml"))
    (tmp_path / "unlike.py").write_text("def unlike(completions):\n    return list(range(len(completions)))\n")
    stage = run(tmp_path, steps=1, rewards=[{"kind": "function", "path": f"{tmp_path}/unlike.py:unlike"}])
    assert (stage / "model").exists(), "nothing was learned in it, so the folder is free for the mended recipe"


def test_a_prompt_that_leaves_less_room_is_said_and_overlong_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """108 of 128 tokens are the second prompt's: its answers are cut off at 20 tokens and not at 64."""
    tasks = [{"prompt": "short", "answer": "1"}, {"prompt": "y" * 100, "answer": "3"}]
    overlong = {"kind": "overlong", "cache_tokens": 10}
    sampling = {"max_tokens": 64}
    stage = run(tmp_path, tasks, 2, rewards=[overlong], algorithm="dr_grpo", sampling=sampling)
    assert "2 tasks; 1 task has room for 20 of 64 tokens" in capsys.readouterr().err
    cut = [row for row in rollouts(stage) if row["outcome"] == "truncated"]
    assert {json.loads(row["parts"])["overlong"] for row in cut} == {-1.0}
    assert {row["task"][-1] for row in cut} == {"1", "2"}


def test_a_step_says_what_went_unscored_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "judge.py").write_text(
        "def judge(completions, answer):\n"
        "    return [float('nan') if a == '2' else float(len(c)) for c, a in zip(completions, answer)]\n"
    )
    stage = run(tmp_path, rewards=[{"kind": "function", "path": f"{tmp_path}/judge.py:judge"}], algorithm="dr_grpo")
    said = capsys.readouterr().err
    assert "step 1: 4 of 8 answers were not scored: 4 grader_error (judge: returned nan)" in said
    notes = [json.loads(line) for line in (stage / "notes.jsonl").read_text().splitlines()]
    assert any("4 of 8 answers were not scored" in str(note) for note in notes)
    assert [line["unscored"] for line in read_metrics(stage)] == [4, 4]


def test_the_reason_for_no_signal_is_the_one_that_holds() -> None:
    right, wrong = group(1, 1), group(0, 0)
    assert "50% were all wrong and 50% all right" in why_no_signal([right, wrong])
    cut = Group(task="t", episodes=(episode((5, 6), 1.0, cut=True), episode((7, 8), 0.0, cut=True)))
    assert "overlong_filter left out 2 of 2 answers" in why_no_signal([cut], overlong_filter=True)
    assert "raise sampling.max_tokens" in why_no_signal([cut], overlong_filter=True)
    unjudged = Group(task="t", episodes=(episode((5, 6), 0.5), episode((7, 8), 0.5)))
    assert why_no_signal([unjudged]).startswith("the answers to each prompt had equal rewards")
    assert why_no_signal([group(None, None)]) == "no answer was scored"
    assert unscored([right]) == []
    assert unscored([group(1, None)])[0].startswith("1 of 2 answers were not scored: 1 finished")


def test_twenty_steps_of_cut_answers_under_the_overlong_filter_blame_the_filter() -> None:
    trainer = tiny_trainer()
    cut = Group(task="t", episodes=(episode((5, 6), 1.0, cut=True), episode((7, 8), 0.0, cut=True)))
    chosen = setting(config(overlong_filter=True), steps=20)
    with pytest.raises(TrainingError, match=r"for 20 steps: .*overlong_filter left out 2 of 2 answers"):
        list(policy_gradient(trainer, FakeFeed(trainer, lambda: (cut,)), chosen))  # type: ignore[arg-type]


TALK = '''
class Talk:
    """Speaks three times, whatever is said."""

    def reset(self, answer=""):
        self.said = []

    def nothing(self):
        """Do nothing."""

    def user(self, message):
        self.said.append(message)
        return str(len(self.said)) if len(self.said) < 3 else None

    def turn_reward(self):
        return float(len(self.said)) / 3

    def reward(self):
        return float(len(set("".join(self.said))))
'''


def talks(folder: Path, **stage: Any) -> Path:
    (folder / "talk.py").write_text(TALK)
    of = {"environment": {"path": f"{folder / 'talk.py'}:Talk", "limits": {"turns": 3}}}
    given = {"rewards": [{"kind": "environment"}, {"kind": "turns", "progress": True}], **of, **stage}
    return run(folder, model={"path": "whet:demo", "chat_template": "whet:tags"}, sampling={"max_tokens": 24}, **given)


def test_plays_that_branch_are_trained_where_they_part(tmp_path: Path) -> None:
    stage = talks(tmp_path, algorithm="spo_tree", branches=[2, 2])
    for step in (1, 2):
        plays = [row for row in rollouts(stage) if row["step"] == step]
        said = [[m["content"] for m in json.loads(p["messages"]) if m["role"] == "assistant"] for p in plays]
        assert [one[0] for one in said[::2]] == [other[0] for other in said[1::2]]
        assert len({one[0] for one in said}) > 1 or step > 1
        assert any(one[1:2] != other[1:2] for one, other in zip(said[::2], said[1::2], strict=True)) or step > 1
    assert [line["skipped"] for line in read_metrics(stage)] == [0.0, 0.0]


def test_the_information_that_turns_gain_is_measured_and_paid(tmp_path: Path) -> None:
    algorithm = {"preset": "turn_rloo", "gain": {"gold": "answer", "weight": 100.0}}
    first, second = read_metrics(talks(tmp_path, algorithm=algorithm))
    for line in (first, second):
        assert 0 < float(line["gain/first"]) < 1 and 0 < float(line["gain/last"]) < 1
    assert first["gain/first"] != second["gain/first"]  # of the policy as it is by then


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        ({"algorithm": "spo_tree"}, "credit: tree and branches go together"),
        ({"algorithm": "grpo", "branches": [2, 2]}, "credit: tree and branches go together"),
        ({"algorithm": "spo_tree", "branches": [2, 3]}, "make 6 plays of a prompt, and rollouts_per_prompt is 4"),
        (
            {"algorithm": "spo_tree", "branches": [2, 2], "environment": None, "rewards": [{"kind": "exact"}]},
            "needs plays of several turns",
        ),
        ({"algorithm": {"preset": "grpo", "gain": {}}}, "gain rewards single turns, and credit: outcome"),
        ({"algorithm": {"preset": "mt_grpo", "turn_gamma": 0.9}}, "turn_gamma discounts later turns"),
        ({"algorithm": {"preset": "turn_rloo", "gain": {"gold": "solution"}}}, r"task .* needs the column 'solution'"),
        ({"rewards": [{"kind": "turns", "smear": 0.5}]}, "set progress: true"),
    ],
)
def test_credit_that_cannot_be_is_refused(tmp_path: Path, stage: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        talks(tmp_path, **stage)
