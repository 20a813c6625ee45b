"""Tracking: the files are the truth and survive crashes; the console and the trackers only repeat them."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from whet.config import Recipe
from whet.config.loading import load_recipe
from whet.errors import ConfigError, MissingExtra, RunError
from whet.launch.main import run_recipe
from whet.records import Completion, Ending, Episode, Group, Message, Outcome, Score, ToolCall, Turn
from whet.tracking.console import Console, duration, line
from whet.tracking.log import RunLog, read_metrics, read_rollouts, rollout_steps
from whet.tracking.sinks import SINKS, RunInfo
from whet.training.checkpoint import save_generation


def decode(tokens: tuple[int, ...] | list[int]) -> str:
    return "".join(map(chr, tokens))


def turn(prompt: str, answer: str, *, version: int = 3, ending: Ending = Ending.STOP) -> Turn:
    written = Completion(tokens=tuple(map(ord, answer)), logprobs=(-0.5,) * len(answer), version=version, ending=ending)
    return Turn(prompt=tuple(map(ord, prompt)), completion=written)


def episode(task: str, sample: int, answer: str, reward: float | None, *, turns: tuple[Turn, ...] = ()) -> Episode:
    score = Score(
        value=reward, correct=None if reward is None else reward > 0.5, parts={"verifier": reward, "format": None}
    )
    return Episode(
        task=task,
        sample=sample,
        seed=(1 << 62) + sample,
        messages=(
            Message(role="user", content="Q"),
            Message(role="assistant", content=answer, tool_calls=(ToolCall(name="add", arguments={"a": [1, 2]}),)),
        ),
        turns=turns or (turn("Q:", answer),),
        score=score,
        outcome=Outcome.FINISHED if reward is not None else Outcome.GRADER_TIMEOUT,
    )


def group(task: str, *rewards: float | None) -> Group:
    return Group(task=task, episodes=tuple(episode(task, i, f"answer {r}", r) for i, r in enumerate(rewards)))


# ----------------------------------------------------------------------------------------- the files


def test_metrics_come_back_as_written_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "stage")
    log.write(1, {"loss": 2.5, "kl": math.nan, "a": math.inf})
    log.write(2, {"loss": 2.25})
    (first, second), text = read_metrics(tmp_path / "stage"), (tmp_path / "stage" / "metrics.jsonl").read_text()
    assert first == {"a": None, "kl": None, "loss": 2.5, "step": 1, "time_s": first["time_s"]}
    assert second["loss"] == 2.25 and second["step"] == 2
    assert [list(json.loads(row)) for row in text.splitlines()] == [sorted(first), sorted(second)]
    assert read_metrics(tmp_path / "nowhere") == []


def test_episodes_come_back_token_for_token(tmp_path: Path) -> None:
    log = RunLog(tmp_path, decode)
    first, second = group("a", 1.0, 0.0).episodes
    played = replace(group("a", 1.0, 0.0), episodes=(first, replace(second, advantage=-0.5)))
    log.write(12, {"reward": 0.5}, [played, group("b", None)])
    assert (tmp_path / "rollouts" / "step-000012.parquet").exists()
    good, bad, unscored = read_rollouts(tmp_path, 12)
    assert (good.task, good.sample, good.seed, good.step) == ("a", 0, 1 << 62, 12)
    assert (good.prompt, good.completion) == ("Q:", "answer 1.0")
    assert decode(good.prompt_tokens + good.completion_tokens) == "Q:answer 1.0"
    assert good.logprobs == (-0.5,) * 10 and good.ending == "stop" and good.version == 3
    assert good.messages == episode("a", 0, "answer 1.0", 1.0).messages
    assert good.parts == {"verifier": 1.0, "format": None}
    assert (good.advantage, bad.advantage) == (None, -0.5)
    assert (unscored.reward, unscored.correct, unscored.outcome) == (None, None, "grader_timeout")
    assert read_rollouts(tmp_path) == [good, bad, unscored] and read_rollouts(tmp_path, 11) == []


def test_findings_are_in_a_file_of_their_own_and_forgotten_with_their_steps(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0}, notes=[f"first of {step}", f"second\nof {step}"] if step > 1 else [])
    log.truncate(2)
    notes = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert notes == [{"note": "first of 2", "step": 2}, {"note": "second\nof 2", "step": 2}]


def test_several_turns_are_one_completion_with_observations_unscored(tmp_path: Path) -> None:
    turns = (turn("Q:", "call", version=5), turn("Q:call[42]", "done", version=4, ending=Ending.LENGTH))
    played = Group(task="a", episodes=(episode("a", 0, "done", 1.0, turns=turns),))
    RunLog(tmp_path, decode).write(1, {}, [played])
    (row,) = read_rollouts(tmp_path)
    assert (row.prompt, row.completion) == ("Q:", "call[42]done")
    assert [logprob is None for logprob in row.logprobs] == [False] * 4 + [True] * 4 + [False] * 4
    assert row.version == 4 and row.ending == "length"


def test_an_episode_that_never_reached_the_sampler_is_recorded(tmp_path: Path) -> None:
    lost = Episode(
        task="a", sample=0, seed=0, messages=(), turns=(), score=Score(value=None), outcome=Outcome.ENGINE_ERROR
    )
    RunLog(tmp_path, decode).write(1, {}, [Group(task="a", episodes=(lost,))])
    (row,) = read_rollouts(tmp_path)
    assert (row.completion_tokens, row.version, row.ending, row.outcome) == ((), None, None, "engine_error")


def untimed(folder: Path) -> list[dict[str, float | None]]:
    return [{name: value for name, value in entry.items() if name != "time_s"} for entry in read_metrics(folder)]


@pytest.mark.parametrize("killed_while_writing", [False, True])
def test_a_resumed_log_equals_one_that_never_stopped(tmp_path: Path, killed_while_writing: bool) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for folder, pieces in ((straight, [(1, 8)]), (resumed, [(1, 6), (4, 8)])):
        for first, last in pieces:
            log = RunLog(folder, decode)
            log.truncate(first - 1)
            for step in range(first, last + 1):
                log.write(step, {"loss": 1 / step}, [group(f"t{step}", 1.0, 0.0)])
            if killed_while_writing and last == 6:
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write('{"loss": 0.1, "st')
            log.close()
    assert untimed(resumed) == untimed(straight)
    assert rollout_steps(resumed) == rollout_steps(straight) == list(range(1, 9))
    assert read_rollouts(resumed) == read_rollouts(straight)


def test_truncate_leaves_nothing_of_later_steps(tmp_path: Path) -> None:
    log = RunLog(tmp_path, decode)
    for step in range(1, 6):
        log.write(step, {}, [group("a", 1.0)])
    log.truncate(3)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == rollout_steps(tmp_path) == [1, 2, 3]
    assert sorted(file.name for file in tmp_path.rglob("*.part")) == []
    log.write(4, {})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_half_last_line_is_ignored_and_never_glued_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    RunLog(tmp_path).write(2, {"loss": 1.0})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not a line of JSON"):
        read_metrics(tmp_path)
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step-000001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RunError, match=r"step-000001\.parquet: not a readable rollout file"):
        read_rollouts(tmp_path)


def refuse(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("whet.files.os.fsync", fsync)


def test_a_full_disk_is_said_with_bytes_and_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path, decode)
    log.write(1, {}, [group("a", 1.0)])
    refuse(errno.ENOSPC, monkeypatch)
    with pytest.raises(
        RunError, match=r"step-000002\.parquet: the disk is full: [\d,]+ bytes are needed and [\d,]+ are free"
    ):
        log.write(2, {}, [group("a", 1.0)])
    assert rollout_steps(tmp_path) == [1] and len(read_metrics(tmp_path)) == 1
    assert list(tmp_path.rglob("*.part")) == []


def test_a_first_checkpoint_that_finds_no_room_does_not_say_that_it_needs_none(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(RunError, match=r"the disk is full: more bytes are needed and [\d,]+ are free"):
        save_generation(tmp_path, 1, {}, write, keep=1)


def test_a_short_write_of_a_line_is_a_full_disk_too(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write(1, {})

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            return super().write(bytes(data)[:5])  # type: ignore[call-overload]

    log._file = Full(tmp_path / "metrics.jsonl", "ab")
    with pytest.raises(RunError, match="the disk is full"):
        log.write(2, {"loss": 1.0})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_a_read_only_disk_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(errno.EROFS, monkeypatch)
    with pytest.raises(RunError, match=r"cannot be written .*; choose .*run folder"):
        RunLog(tmp_path, decode).write(1, {}, [group("a", 1.0)])


# ------------------------------------------------------------------------------------------- console


def test_plain_lines_go_to_standard_error_only(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(every=5)
    console.begin("rl", 10)
    for step in range(1, 11):
        console.log("rl", step, {"reward": 0.25, "solved": 0.5, "tokens_per_second": 1234.0}, ())
    console.say("[red]literally[/red]")
    console.close()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [text.split("  ")[1] for text in lines[:-1]] == ["1/10", "5/10", "10/10"]
    assert "reward 0.250  solved 50%  1.2k tok/s" in lines[0] and "done" in lines[2]
    assert lines[-1] == "[red]literally[/red]"


def test_a_run_of_several_stages_is_counted_and_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence of a stage to come is taken to last as long as one did until now."""
    now = [0.0]
    monkeypatch.setattr("whet.tracking.console.time.monotonic", lambda: now[0])
    console = Console(every=1)
    console.plan({"sft": 100, "rl": 300, "select": 0, "eval": 200})
    for stage, total in (("sft", 2), ("rl", 2), ("eval base", 1)):
        console.begin(stage, total)
        for step in range(1, total + 1):
            now[0] += 50
            console.log(stage, step, {}, ())
    console.plan({"sft": 100, "rl": None, "alone": 1})
    console.begin("sft", 4)
    console.log("sft", 1, {}, ())
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == [
        "sft (1 of 4)  1/2  50 s left, about 9:10 of the run",
        "sft (1 of 4)  2/2  done, about 8:20 of the run",
        "rl (2 of 4)  1/2  50 s left, about 2:30 of the run",
        "rl (2 of 4)  2/2  done, about 1:40 of the run",
        "eval base (4 of 4)  1/1  done",
        "sft (1 of 3)  1/4  0 s left",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.begin("rl", 1)
    console.log("rl", 1, {"loss": 1.0}, ())
    console.say("anything")
    console.close()
    assert capsys.readouterr() == ("", "")


def test_the_main_numbers_have_a_fixed_order() -> None:
    assert (
        line({"kl": 0.00312, "reward": 0.5, "unknown": 1.0, "entropy": 0.5}) == "reward 0.500  entropy 0.50  kl 0.0031"
    )
    assert [duration(s) for s in (9, 185, 7385)] == ["9 s", "3:05", "2:03:05"]


# --------------------------------------------------------------------------------------------- sinks


def test_unknown_tracker_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("[wandb, wandb]", "[wandbb]"))
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_tracker_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"pip install 'whet\[track\]'"):
        SINKS["wandb"](RunInfo(name="r", folder=tmp_path, recipe={}))


class FakeRun:
    def __init__(self, **settings: object) -> None:
        print("hello from a tracker")
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_tracker_gets_finite_numbers_stage_by_stage(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[FakeRun] = []
    module = types.ModuleType(kind)
    module.init = lambda **settings: runs.append(FakeRun(**settings)) or runs[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kind, module)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    sink = SINKS[kind](RunInfo(name="demo", folder=tmp_path, recipe={"seed": 1}))
    sink.log("sft", 1, {"loss": 2.0, "bad": math.nan}, ())
    sink.log("rl", 1, {"reward": 0.5}, [group("secret", 1.0)])
    sink.close()
    assert [run.logged for run in runs] == [[(1, {"loss": 2.0})], [(1, {"reward": 0.5})]]
    assert all(run.finished and run.settings["group"] == "demo" for run in runs)
    assert {run.settings["project"] for run in runs} == {"mine" if kind == "wandb" else "whet"}
    assert kind == "wandb" or capsys.readouterr().out == ""  # wandb itself writes to standard error


RECIPE = """
name: told
model: {path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
trackers: [wandb, wandb]
stages:
  sft: {kind: sft, data: {generate: arithmetic, count: 8, digits: 1}, train: {steps: 2, batch_size: 2}}
"""


class Told:
    def __init__(self, breaks_at: int | None) -> None:
        self.runs: list[RunInfo] = []
        self.steps: list[object] = []
        self.breaks_at = breaks_at

    def about(self, run: RunInfo) -> Told:
        self.runs.append(run)
        return self

    def log(self, stage: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        if step == self.breaks_at:
            raise OSError("no route to host")
        self.steps.append((stage, step, metrics["loss"]))

    def close(self) -> None:
        self.steps.append("closed")


@pytest.mark.parametrize("breaks_at", [None, 1])
def test_a_recipe_s_tracker_hears_of_every_step_and_harms_no_run(
    breaks_at: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told(breaks_at)
    monkeypatch.setitem(SINKS, "wandb", told.about)
    (tmp_path / "r.yaml").write_text(RECIPE)
    run_recipe(load_recipe(tmp_path / "r.yaml", [f"out={tmp_path}/run"]))
    lines = read_metrics(tmp_path / "run" / "stages" / "01-sft")
    assert [line["step"] for line in lines] == [1, 2]
    assert [(run.name, run.recipe["seed"]) for run in told.runs] == [("told", 0)]  # opened once
    if breaks_at is None:
        assert told.steps == [("sft", line["step"], line["loss"]) for line in lines] + ["closed"]
    else:
        assert told.steps == []
        assert capsys.readouterr().err.count("wandb: OSError: no route to host; it hears no more of this run") == 1


def test_a_recipe_names_the_trackers_that_there_are() -> None:
    assert set(get_args(get_args(Recipe.model_fields["trackers"].annotation)[0])) == set(SINKS)
