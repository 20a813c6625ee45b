"""Law 8: resume = never stopped, bit for bit, wherever it was stopped and whatever of it is damaged."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from tests.laws.nursery import Done, Nursery, contents
from whet.files import MANIFEST

MODEL = '{path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}'
RL = """
    kind: rl
    tasks: {generate: arithmetic, count: 24, digits: 1}
    rewards: [{kind: verifier}, {kind: overlong, cache_tokens: 10}, {kind: length, above_tokens: 8, weight: 0}]
    prompts_per_step: 4
    rollouts_per_prompt: 4
    sampling: {max_tokens: 12, max_running: 10}
"""
SFT = """
    kind: sft
    data: {generate: arithmetic, count: 20, digits: 1}
    eval_data: {generate: arithmetic, count: 6, digits: 1, split: test}
    eval_every: 2
"""
RECIPES = {
    "whole": f"""
name: whole
seed: 2
model: {MODEL}
save: {{every: 2}}
stages:
  sft: {SFT}
    train: {{optimizer: muon, lr: 0.01, batch_size: 8, steps: 6, schedule: cosine, warmup: 2}}
  rl: {RL}
    algorithm:
      preset: grpo
      minibatches: 2
      kl: {{coefficient: 0.05, target: 0.02, horizon: 40, update_every: 2, ema_decay: 0.3}}
      entropy: {{target: 5.0, rate: 0.01}}
      token_filter: {{kind: covariance, share: 0.3, low: -9, high: 9}}
    train: {{lr: 0.003, steps: 5}}
  eval:
    kind: eval
    models: {{sft: "@sft", rl: "@rl"}}
    tasks: {{generate: arithmetic, count: 6, digits: 1, split: test}}
    rewards: [{{kind: verifier}}]
    samples: 2
    sampling: {{max_tokens: 12}}
""",
    "adapters": f"""
name: adapters
model: {MODEL}
save: {{every: 1}}
stages:
  sft: {SFT}
    train: {{lr: 0.02, batch_size: 8, steps: 4, neftune: 5, lora: {{rank: 4, dropout: 0.3}}}}
  rl: {RL}
    algorithm: grpo
    max_gap: 0.5  # the dropout is in the trainer alone
    train: {{lr: 0.01, steps: 3, lora: {{rank: 4, dropout: 0.2}}}}
""",
    "preference": f"""
name: preference
model: {MODEL}
save: {{every: 2}}
stages:
  sft: {SFT}
    train: {{lr: 0.02, batch_size: 8, steps: 2}}
  dpo:
    kind: preference
    data: {{generate: arithmetic, count: 12, digits: 1, answers: 3}}
    eval_data: {{generate: arithmetic, count: 4, digits: 1, split: test}}
    eval_every: 2
    loss: rpo
    train: {{lr: 0.01, batch_size: 4, steps: 5, lora: {{rank: 4, dropout: 0.3}}}}
  kto:
    kind: preference
    data: {{generate: arithmetic, count: 12, digits: 1}}
    loss: kto
    train: {{lr: 0.01, batch_size: 4, steps: 4}}
  online:
    kind: online_preference
    tasks: {{generate: arithmetic, count: 24, digits: 1}}
    rewards: [{{kind: verifier}}, {{kind: overlong, cache_tokens: 10}}]
    prompts_per_step: 4
    rollouts_per_prompt: 4
    minibatches: 2
    update_reference_every: 2
    sampling: {{max_tokens: 12, max_running: 10}}
    train: {{lr: 0.003, steps: 5}}
""",
    "critic": f"""
name: critic
model: {MODEL}
save: {{every: 1}}
stages:
  rl: {RL}
    curriculum: {{order_by: difficulty, buckets: 2, skip_below: 0.0, skip_steps: 2, replay: 0.3}}
    algorithm: {{preset: vc_ppo, critic: {{lam_value: 1.0, pretrain_steps: 2}}, minibatches: 2}}
    constraint: {{cost: length, limit: 0.3}}
    train: {{lr: 0.003, steps: 4}}
""",
    "judged": f"""
name: judged
model: {MODEL}
save: {{every: 1}}
stages:
  rl:
    kind: rl
    tasks: {{generate: arithmetic, count: 24, digits: 1}}
    rewards:
      - {{kind: verifier}}
      - {{kind: judge, form: pairs, opponents: 1, model: {{script: "whet.envs.judges.rules:longer"}}}}
      - {{kind: judge, name: self, model: {{path: "@model", temperature: 1.0}}, scale: yes_no, read: probabilities}}
    prompts_per_step: 4
    rollouts_per_prompt: 4
    sampling: {{max_tokens: 12, max_running: 10}}
    algorithm: grpo
    train: {{lr: 0.003, steps: 4}}
""",
    "reward": f"""
name: reward
model: {MODEL}
save: {{every: 2}}
stages:
  rm:
    kind: reward_model
    data: {{generate: arithmetic, count: 24, digits: 1, answers: 3}}
    hold_out: 0.3
    eval_every: 2
    train: {{lr: 0.01, batch_size: 4, steps: 8}}
""",
    "gate": f"""
name: gate
model: {MODEL}
save: {{every: 2}}
stages:
  ratings:
    kind: reward_model
    learn: ratings
    objectives: [right, worked, brief]
    data: {{generate: arithmetic, count: 40, digits: 1, answers: 4, style_instructions: true}}
    hold_out: 0.3
    eval_every: 2
    train: {{lr: 0.01, batch_size: 4, steps: 4}}
  gate:
    kind: reward_model
    gate: {{path: "@ratings", hidden: 8, temperature: 1, debias: length}}
    data: {{generate: arithmetic, count: 24, digits: 1, answers: 3, style_instructions: true}}
    hold_out: 0.3
    eval_every: 2
    train: {{lr: 0.03, batch_size: 4, steps: 6}}
""",
    "feedback": f"""
name: feedback
model: {MODEL}
stages:
  compare:
    kind: compare
    model: whet:demo
    tasks: {{generate: arithmetic, count: 12, digits: 1}}
    samples: 3
    chunk: 4
    judge: {{model: {{script: "whet.envs.judges.rules:longer"}}}}
    sampling: {{max_tokens: 24}}
  revise:
    kind: revise
    model: whet:demo
    tasks: {{generate: arithmetic, count: 8, digits: 1}}
    principles: [Be right., Be brief.]
    writer: {{path: "whet:demo", temperature: 1.0}}
    chunk: 4
    max_tokens: 48
  questions:
    kind: questions
    data: {{path: "@compare"}}
    chunk: 4
  agreement:
    kind: agreement
    data: {{path: "@compare"}}
    judge: {{model: {{script: "whet.envs.judges.rules:longer"}}}}
    chunk: 4
  sft:
    kind: sft
    data: {{path: "@questions"}}
    train: {{lr: 0.02, batch_size: 4, steps: 2}}
""",
    "steps": f"""
name: steps
model: {MODEL}
save: {{every: 2}}
stages:
  labels:
    kind: step_labels
    model: whet:demo
    tasks: {{generate: arithmetic, count: 12, digits: 2}}
    rewards: [{{kind: verifier}}]
    samples: 2
    rollouts: 2
    separator: "+"
    chunk: 3
    sampling: {{max_tokens: 40}}
  prm:
    kind: reward_model
    data: {{path: "@labels"}}
    learn: steps
    train: {{lr: 0.01, batch_size: 4, steps: 4}}
  rl:
    kind: rl
    tasks: {{generate: arithmetic, count: 24, digits: 1}}
    rewards: [{{kind: verifier}}, {{kind: process_model, path: "@prm", separator: "+"}}]
    algorithm: {{preset: ppo, step_weight: 0.3, minibatches: 2}}
    prompts_per_step: 4
    rollouts_per_prompt: 2
    sampling: {{max_tokens: 12, max_running: 10}}
    train: {{lr: 0.003, steps: 2}}
""",
}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("nursery")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    found = Nursery(folder)
    yield found
    found.close()


@pytest.fixture(scope="module")
def unstopped(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], int]]:
    """Of each recipe: what a run leaves that was never stopped, and how often it changed its files."""
    left = {}
    for name in RECIPES:
        folder = tmp_path_factory.mktemp(name) / "run"
        done = run(nursery, name, folder)
        assert done.code == 0, done.errors
        left[name] = (contents(folder), done.changes)
    return left


def run(nursery: Nursery, recipe: str, folder: Path, *words: str, **changes: object) -> Done:
    return nursery.obey("run", f"{recipe}.yaml", f"out={folder}", *words, folder=folder, **changes)


def finish(nursery: Nursery, recipe: str, folder: Path) -> dict[str, Any]:
    done = run(nursery, recipe, folder)
    assert done.code == 0, done.errors
    return contents(folder)


def test_a_run_has_a_signal_that_a_wrong_resume_would_change(unstopped: dict[str, tuple[dict[str, Any], int]]) -> None:
    for left, changes in unstopped.values():
        assert changes > 60
        trained = [path for path in left if path.endswith("metrics.jsonl") and "eval" not in path]
        for lines in (left[path] for path in trained if "grad_norm" in left[path][0]):
            moved = [line["grad_norm"] for line in lines if line["grad_norm"] > 0]
            assert len(set(moved)) == len(moved) >= len(lines) // 2
    gate = load(unstopped["gate"][0]["stages/02-gate/model/gate.safetensors"])
    assert gate["slope_K"].any() and gate["centre"] > 0, "the gate takes off what goes with length"


@pytest.mark.parametrize(
    ("recipe", "last", "apart"),
    [
        ("whole", 2, 31),
        ("adapters", 5, 47),
        ("preference", 7, 89),
        ("critic", 3, 41),
        ("judged", 4, 97),
        ("reward", 1, 23),
        ("gate", 2, 29),
        ("feedback", 6, 89),
        ("steps", 3, 37),
    ],
)
def test_killed_anywhere(
    nursery: Nursery,
    unstopped: dict[str, tuple[dict[str, Any], int]],
    recipe: str,
    last: int,
    apart: int,
    tmp_path: Path,
) -> None:
    """One kill in each stretch of the run, the last of them in its last changes, then to the end.

    One run is killed; for the others it leaves copies of its folder on its way.
    """
    expected, changes = unstopped[recipe]
    latest, *earlier = range(changes - last, 1, -apart)  # before the first one there is no folder
    folder = tmp_path / "run"
    assert run(nursery, recipe, folder, at=latest, copies=earlier).code == -signal.SIGKILL
    assert finish(nursery, recipe, folder) == expected, f"killed before change {latest} of {changes}"
    for at in earlier:
        shutil.rmtree(folder)
        (tmp_path / f"before-{at}").rename(folder)
        assert finish(nursery, recipe, folder) == expected, f"killed before change {at} of {changes}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_again_and_again(
    nursery: Nursery, unstopped: dict[str, tuple[dict[str, Any], int]], recipe: str, tmp_path: Path
) -> None:
    """Each start gets a little further: a checkpoint takes some ten changes."""
    expected, changes = unstopped[recipe]
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        codes.append(run(nursery, recipe, tmp_path / "run", at=max(30, changes // 4) + len(codes)).code)
        assert len(codes) < 20, "it does not get any further"
    assert codes[-1] == 0 and len(codes) > 3
    assert contents(tmp_path / "run") == expected


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 25), (signal.SIGTERM, 70), (signal.SIGINT, 120)])
def test_asked_to_stop(
    nursery: Nursery, unstopped: dict[str, tuple[dict[str, Any], int]], number: int, at: int, tmp_path: Path
) -> None:
    done = run(nursery, "whole", tmp_path / "run", "--json", at=at, signals=(number,))
    assert done.code == 130
    assert json.loads(done.output.splitlines()[-1]) == {"ok": False, "error": "interrupted", "exit_code": 130}
    assert (tmp_path / "run" / "report.html").exists()
    assert finish(nursery, "whole", tmp_path / "run") == unstopped["whole"][0]


def test_asked_twice_stops_at_once(
    nursery: Nursery, unstopped: dict[str, tuple[dict[str, Any], int]], tmp_path: Path
) -> None:
    done = run(nursery, "whole", tmp_path / "run", at=70, signals=(signal.SIGINT, signal.SIGINT))
    assert (done.code, done.errors.splitlines()[-1]) == (130, "whet: interrupted")
    assert (tmp_path / "run" / "report.html").exists()
    assert finish(nursery, "whole", tmp_path / "run") == unstopped["whole"][0]


def test_a_clock_set_back_moves_nothing(
    nursery: Nursery, unstopped: dict[str, tuple[dict[str, Any], int]], tmp_path: Path
) -> None:
    assert run(nursery, "whole", tmp_path / "run", at=75).code == -signal.SIGKILL
    done = run(nursery, "whole", tmp_path / "run", clock_s=-86400.0)
    assert done.code == 0, done.errors
    assert contents(tmp_path / "run") == unstopped["whole"][0]
    stages = sorted((tmp_path / "run" / "stages").glob("*/metrics.jsonl"))
    times = [json.loads(line)["time_s"] for file in stages for line in file.read_text().splitlines()]
    assert max(times) - min(times) > 80000, "the clock was set back"


# --------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def halfway(nursery: Nursery, unstopped: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed in its RL stage, with two checkpoints and a file that was cut off in writing."""
    made, places = tmp_path_factory.mktemp("halfway"), [*range(85, 120, 2)]
    run(nursery, "whole", made / "run", at=120, copies=places)
    saved = {made / f"before-{at}": made / f"before-{at}" / "checkpoints" / "02-rl" for at in places}
    folder = next(each for each, steps in saved.items() if len(list(steps.glob("step-*"))) == 2)
    assert sorted(path.name for path in saved[folder].glob("step-*")) == ["step-00000002", "step-00000004"]
    (folder / "stages" / "02-rl" / "manifest.json.part").write_text("{")
    return folder


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def forge(file: Path) -> None:
    """The position in the tasks, one digit off: still JSON."""
    text = file.read_text()
    assert '"position": 16' in text
    file.write_text(text.replace('"position": 16', '"position": 12'))


DAMAGE = {
    "weights cut": ("weights.safetensors", truncate),
    "optimizer flipped": ("optimizer.safetensors", flip),
    "weights missing": ("weights.safetensors", Path.unlink),
    "manifest cut": (MANIFEST, truncate),
    "manifest forged": (MANIFEST, forge),
    "manifest missing": (MANIFEST, Path.unlink),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_falls_back(
    nursery: Nursery, unstopped: dict[str, tuple[dict[str, Any], int]], halfway: Path, kind: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(halfway, folder)
    with (folder / "stages" / "02-rl" / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 0.12')
    *_, newest = sorted((folder / "checkpoints" / "02-rl").glob("step-*"))
    name, harm = DAMAGE[kind]
    harm(newest / name)
    done = run(nursery, "whole", folder)
    assert done.code == 0
    assert "rl: continues after step 2" in done.errors
    assert f"passed over: {newest}" in done.errors
    assert contents(folder) == unstopped["whole"][0]


def test_without_a_whole_checkpoint_it_says_so(nursery: Nursery, halfway: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(halfway, folder)
    for generation in (folder / "checkpoints" / "02-rl").glob("step-*"):
        flip(generation / "weights.safetensors")
    before = contents(folder)
    done = run(nursery, "whole", folder)
    assert done.code == 6
    (line,) = [line for line in done.errors.splitlines() if line.startswith("whet: ")]
    assert "no checkpoint can be used" in line and "remove the folder to start over" in line
    assert contents(folder) == before


@pytest.mark.parametrize("harm", [flip, truncate])
def test_a_damaged_model_is_not_trained_on(
    nursery: Nursery,
    unstopped: dict[str, tuple[dict[str, Any], int]],
    halfway: Path,
    harm: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    """Of a stage that is done; the next one has not begun."""
    folder = tmp_path / "run"
    shutil.copytree(halfway, folder)
    shutil.rmtree(folder / "checkpoints" / "02-rl")
    weights = folder / "stages" / "01-sft" / "model" / "model.safetensors"
    harm(weights)
    done = run(nursery, "whole", folder)
    assert done.code == 6
    assert f"{weights}: damaged; its SHA-256 is not the one in the manifest" in done.errors
    assert "--restart sft" in done.errors
    done = run(nursery, "whole", folder, "--restart", "sft")
    assert done.code == 0, done.errors
    assert contents(folder) == unstopped["whole"][0]


# ------------------------------------------------------------------------------------- disk and folder


@pytest.mark.parametrize(("every", "size"), [(2, 25_000), (2, 60_000), (100, 25_000)])
def test_a_full_disk_is_one_line_and_no_loss(
    nursery: Nursery, unstopped: dict[str, tuple[dict[str, Any], int]], every: int, size: int, tmp_path: Path
) -> None:
    """No room for a checkpoint's weights, for its optimizer, and for the model at the end."""
    done = run(nursery, "whole", tmp_path / "run", f"save.every={every}", file_bytes=size)
    assert done.code == 6
    (line,) = [line for line in done.errors.splitlines() if line.startswith("whet: ")]
    assert "the disk is full" in line and "give the same command again" in line
    assert finish(nursery, "whole", tmp_path / "run") == unstopped["whole"][0]


def test_a_folder_that_cannot_be_written_is_one_line(nursery: Nursery, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/sys/run"), tmp_path / ("long" * 100)):
        done = run(nursery, "whole", folder, "--json")
        assert done.code == 6, done.errors
        assert "cannot be written" in json.loads(done.output.splitlines()[-1])["error"]
        assert len(done.errors.splitlines()) == 1


def test_one_run_at_a_time(nursery: Nursery, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        lock.write("process 123")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(nursery, "whole", folder)
    assert done.code == 6
    assert done.errors == f"whet: {folder}: another run is at work here (process 123); choose another `out=`\n"
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_another_recipe_is_refused_by_name(nursery: Nursery, halfway: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(halfway, folder)
    before = contents(folder)
    done = run(nursery, "whole", folder, "stages.rl.train.lr=0.5", "seed=3")
    assert done.code == 6 and len(done.errors.splitlines()) == 1
    assert "sft: seed (was 2 and is 3); rl: seed (was 2 and is 3), train.lr (was 0.003 and is 0.5)" in done.errors
    assert contents(folder) == before
    (folder / "stages" / "01-sft" / "stage.json").write_text("{")
    done = run(nursery, "whole", folder)
    assert done.code == 6 and "stage.json: cannot be read" in done.errors


def test_where_and_how_fast_may_change(
    nursery: Nursery, unstopped: dict[str, tuple[dict[str, Any], int]], halfway: Path, tmp_path: Path
) -> None:
    """Another interval of checkpoints, another description, moved to another place, and quiet."""
    folder = tmp_path / "moved" / "run"
    shutil.copytree(halfway, folder)
    done = run(nursery, "whole", folder, "save.every=1", "description=new", "threads=2", "--quiet")
    assert (done.code, done.errors) == (0, "")
    assert contents(folder) == unstopped["whole"][0]
    done = run(nursery, "whole", folder, "--json")
    assert done.code == 0 and json.loads(done.output)["evaluations"]["eval"]["rows"]
    assert contents(folder) == unstopped["whole"][0]
