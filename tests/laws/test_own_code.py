"""A loss or an environment of one's own by `path`, and a reference other than the start: the recipe decides."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.test_held_out import MODEL, lines, run, weights
from whet.config import LossConfig, PolicyConfig
from whet.config.loading import load_recipe, resolved
from whet.errors import ConfigError, RunError, TrainingError
from whet.files import read_json
from whet.tracking.log import read_metrics

MINE = """
import torch
from dataclasses import dataclass
from typing import Annotated
from annotated_types import Gt
from whet.envs.base import Task
from whet.records import Message


def clipped(tokens, *, low: Annotated[float, Gt(0), "As PPO's."] = 0.2, high=0.2):
    ratio = tokens.log_ratio_T.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * tokens.advantage_T, clipped * tokens.advantage_T)


def logistic(pairs, *, beta=0.1):
    return -torch.nn.functional.logsigmoid(beta * pairs.margin_P)


def reduced(given, *, beta=0.1):
    return (given.margin_P if hasattr(given, "margin_P") else given.logp_T).mean()


def failing(tokens):
    raise KeyError("advantage")


def misspelling(tokens):
    return -tokens.advantage * tokens.log_ratio_T


def detached(tokens):
    return tokens.logp_T.detach()


def of_two(tokens, advantages):
    return tokens


def needs(tokens, *, low):
    return tokens


def named(pairs, *, weight=1.0):
    return pairs.margin_P


@dataclass
class Asks:
    task: Task
    said: str = "Again."

    def __init__(self, task, *, said="Again."):
        self.task, self.said, self.turns = task, said, 0

    async def start(self):
        return self.task.messages

    async def step(self, message):
        self.turns += 1
        return (Message(role="user", content=self.said),), self.turns == 2
"""
RL = """
    kind: rl
    tasks: {generate: arithmetic, count: 24, digits: 1}
    rewards: [{kind: language, script: LATIN}]
    prompts_per_step: 3
    rollouts_per_prompt: 4
    train: {steps: 3, lr: 0.02}
"""
SFT = "{kind: sft, data: {generate: arithmetic, count: 12, digits: 1}, train: {steps: 2, lr: 0.1, batch_size: 4}}"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def recipe(stages: str, *overrides: str) -> Any:
    Path("r.yaml").write_text(f"name: own\nmodel: {MODEL}\nstages:\n{stages}")
    return load_recipe("r.yaml", overrides).recipe


def rl(*more: str) -> Any:
    return recipe("  rl:" + "\n    ".join([RL.rstrip(), *more]) + "\n")


def dpo(loss: str, *more: str) -> Any:
    data = "data: {generate: arithmetic, count: 12, digits: 1}"
    rest = ["train: {steps: 3, lr: 0.02, batch_size: 4}", f"loss: {loss}", *more]
    return recipe(f"  sft: {SFT}\n  dpo:\n    kind: preference\n    " + "\n    ".join([data, *rest]) + "\n")


def test_a_policy_loss_from_a_file_is_the_one_that_is_minimised(mine: Path) -> None:
    common = "sampling: {max_tokens: 8}"
    ours = rl(common, "algorithm: {preset: grpo, minibatches: 3, clip: {kind: ppo, low: 0.1, high: 0.3}}")
    theirs = rl(
        common, 'algorithm: {preset: grpo, minibatches: 3, clip: {path: "mine.py:clipped", low: 0.1, high: 0.3}}'
    )
    first, second = run(ours, mine / "ours"), run(theirs, mine / "theirs")
    assert weights(first / "model") == weights(second / "model")
    assert any(line["grad_norm"] for line in read_metrics(second))
    identity = read_json(second / "stage.json")["identity"]
    assert identity["config"]["algorithm.clip.high"] == 0.3 and "algorithm.clip" in identity["inputs"]
    assert resolved(theirs)["stages"]["rl"]["algorithm"]["clip"]["low"] == 0.1


def test_a_changed_file_is_named_where_a_stage_goes_on(mine: Path) -> None:
    asked = dpo('{function: {path: "mine.py:logistic", beta: 0.2}}')
    run(asked, mine / "run")
    run(asked, mine / "run")
    (mine / "mine.py").write_text(MINE + "\n# another idea\n")
    with pytest.raises(RunError, match=r"dpo: loss\.function \(mine\.py has changed\)"):
        run(asked, mine / "run")


def test_a_preference_loss_from_a_file_is_the_one_that_is_minimised(mine: Path) -> None:
    run(dpo("{dpo: {beta: 0.2}}"), mine / "ours")
    run(dpo('{function: {path: "mine.py:logistic", beta: 0.2}}'), mine / "theirs")
    first, second = (mine / name / "stages/02-dpo" for name in ("ours", "theirs"))
    assert weights(first / "model") == weights(second / "model")
    assert lines(first) == lines(second)


def test_constants_are_keys_with_their_ranges(mine: Path) -> None:
    config = PolicyConfig.model_validate({"clip": {"path": "mine.py:clipped", "high": 1}})
    assert config.clip.model_dump() == {"kind": "function", "path": "mine.py:clipped", "low": 0.2, "high": 1.0}
    found = LossConfig.model_validate({"nll": {}, "function": {"path": "mine.py:logistic", "weight": 2}})
    assert found.needs_reference and list(found.terms) == ["nll", "function"]
    assert found.model_dump()["function"]["beta"] == 0.1
    alone = {"path": "mine.py:logistic", "reference": False}
    assert not LossConfig.model_validate({"function": alone}).needs_reference


@pytest.mark.parametrize(
    ("clip", "said"),
    [
        ("path: mine.py:clip", r"clip\.path: mine\.py has no function 'clip'; did you mean 'clipped'"),
        ("path: min.py:clipped", r"clip\.path: min\.py does not exist; did you mean mine\.py"),
        ("path: mine.py", "must be file.py:function"),
        ("path: bad.py:loss", r"clip\.path: SyntaxError"),
        ("path: ends.py:loss", r"clip\.path: SystemExit"),
        ("path: mine.py:of_two", r"needs \(tokens, advantages\); it is given one argument"),
        ("path: mine.py:needs", r"needs \(tokens, low\)"),
        ("path: mine.py:clipped, lwo: 1", r"clip\.lwo: no parameter of mine\.py:clipped; did you mean 'low'"),
        ("path: mine.py:clipped, low: -1", r"clip\.low: must be above 0, got -1"),
        ("kind: function", r"clip\.path: missing"),
    ],
)
def test_what_cannot_be_used_is_said_before_training(mine: Path, clip: str, said: str) -> None:
    (mine / "bad.py").write_text("def loss(:")
    (mine / "ends.py").write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=said):
        rl(f"algorithm: {{clip: {{{clip}}}}}")
    with pytest.raises(ConfigError, match=r"weight, which is a key"):
        dpo('{function: {path: "mine.py:named"}}')


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("reduced", r"returned \(\), and it is given \(\d+,\) log-probabilities"),
        ("failing", r"mine\.py:failing failed: KeyError: 'advantage' \(mine\.py:\d+\)"),
        ("misspelling", r"no attribute 'advantage'; did you mean 'advantage_T'\?"),
        ("detached", "has no gradient"),
    ],
)
def test_a_loss_that_is_none_is_named(mine: Path, name: str, said: str) -> None:
    asked = rl("sampling: {max_tokens: 8}", f"algorithm: {{preset: grpo, clip: {{path: 'mine.py:{name}'}}}}")
    with pytest.raises(TrainingError, match=said):
        run(asked, mine / "run")


@pytest.mark.parametrize("lora", ["", ", lora: {rank: 2}"])
def test_a_kl_is_from_the_reference_that_is_named(mine: Path, lora: str) -> None:
    def stages(reference: str) -> Any:
        kl = f"kl: {{place: loss, coefficient: 0.1{reference}}}"
        more = f"algorithm: {{preset: dr_grpo, {kl}}}\n    sampling: {{max_tokens: 8}}\n    max_gap: 0.1"
        train = RL.replace("lr: 0.02", f"lr: 0.02{lora}")
        return recipe(f"  sft: {SFT}\n  rl:{train}    {more}\n")

    run(stages(""), mine / "start")
    run(stages(', reference: "@model"'), mine / "model")
    run(stages(', reference: "@sft"'), mine / "sft")
    start, model, same = (read_metrics(mine / name / "stages/02-rl") for name in ("start", "model", "sft"))
    assert start[0]["kl"] == pytest.approx(0, abs=1e-6) and (model[0]["kl"] or 0) > 0.01
    assert [line["kl"] for line in same] == pytest.approx([line["kl"] for line in start], abs=1e-6)


def test_a_preference_is_over_the_reference_that_is_named(mine: Path) -> None:
    run(dpo("dpo"), mine / "start")
    run(dpo("dpo", 'reference: "@model"'), mine / "model")
    run(dpo("dpo", 'reference: "@sft"'), mine / "sft")
    start, model, same = (mine / name / "stages/02-dpo" for name in ("start", "model", "sft"))
    assert read_metrics(start)[0]["loss"] == pytest.approx(log(2), abs=1e-6)
    assert abs((read_metrics(model)[0]["loss"] or 0) - log(2)) > 1e-3
    assert weights(same / "model") == weights(start / "model") != weights(model / "model")
    with pytest.raises(ConfigError, match="reference has no effect"):
        dpo("simpo", 'reference: "@model"')
    with pytest.raises(ConfigError, match=r"dpo\.reference\.path is @rl, which is no earlier stage"):
        dpo("dpo", 'reference: "@rl"')
    with pytest.raises(ConfigError, match="place is none"):
        rl("algorithm: {kl: {reference: '@model'}}")
    assert torch.isfinite(torch.tensor(read_metrics(model)[-1]["loss"]))
