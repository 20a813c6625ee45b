"""The recipes: each loads, each says what it would cost, and those that read rows run on small local files.

The files are made here from the project's own task families, in the columns of the data sets that they stand for.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from whet.config import DataConfig, GeneratedConfig, Recipe
from whet.config.evaluation import EvalStage
from whet.config.loading import load_recipe, resolved
from whet.data.formats import load_tasks
from whet.envs.families import family
from whet.envs.rewards.agree import NO_ALGEBRA
from whet.envs.rewards.answers import gold_answer
from whet.envs.rewards.reader import read
from whet.envs.rewards.reading import answers, final_words
from whet.errors import ConfigError
from whet.launch.check import check_recipe
from whet.launch.main import run_recipe
from whet.models.locate import TEMPLATES as TEMPLATE_FILES
from whet.models.locate import locate
from whet.pipeline.card import records
from whet.pipeline.lineage import Choices
from whet.tracking.log import read_metrics, read_rollouts

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = [
    "model=whet:tiny",
    "model.create={hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}",
    "train.steps=2",
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_can_be_planned(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert recipe.name == path.stem
    assert Recipe.model_validate(resolved(recipe)) == recipe, "what a run keeps of its recipe loads again"
    assert list(dict.fromkeys(budget.stage for budget in recipe.budgets())) == list(recipe.distinct)
    for stage in recipe.stages.values():
        if isinstance(stage, EvalStage):
            models = list(stage.models.values())
            assert len(models) == len(set(models)), "two labels of one model"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_commands_in_a_recipes_head_load_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    head = path.read_text().partition("\nname:")[0]
    joined = re.sub(r" \\\n# +", " ", head)
    commands = re.findall(r"^# +whet run (.+?)(?: {2,}.*)?$", joined, re.MULTILINE)
    assert commands or path.name == "demo.yaml", "a recipe's head says how to run it"
    for command in commands:
        file, *overrides = shlex.split(command)
        assert (ROOT / file).samefile(path)
        load_recipe(file, overrides)


def test_the_demo_is_the_one_that_ships() -> None:
    demo = ROOT / "recipes" / "demo.yaml"
    assert demo.is_symlink() and demo.resolve() == ROOT / "src" / "whet" / "assets" / "demo.yaml"


def test_the_command_that_everybody_types_first() -> None:
    loaded = load_recipe(ROOT / "recipes" / "gsm8k_grpo.yaml", ["model=Qwen/Qwen3-0.6B", "train.lr=1e-6"])
    assert (loaded.recipe.model.path, loaded.recipe.stages["rl"].train.lr) == ("Qwen/Qwen3-0.6B", 1e-6)  # type: ignore[union-attr]
    assert str(loaded.origins["stages.rl.train.lr"]) == "command line"


# ----------------------------------------------------------------------------------------------- small runs

Row = dict[str, object]


def as_gsm8k(question: str, steps: str, answer: str) -> Row:
    return {"question": question, "answer": f"{steps}\n#### {answer}"}


def as_alpaca(question: str, steps: str, answer: str) -> Row:
    return {"instruction": "Add the numbers.", "input": question, "output": f"{steps}: {answer}"}


def as_sharegpt(question: str, steps: str, answer: str) -> Row:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def as_messages(question: str, steps: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, shape: Callable[[str, str, str], Row], count: int = 12) -> Path:
    """Sums in the columns of another data set."""
    sums = family(GeneratedConfig(generate="arithmetic"))
    rows = []
    for task in (sums.task(index) for index in range(count)):
        question = task.messages[0].content
        rows.append(shape(question, f"We add: {question}", task.columns["answer"]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(recipe: str, folder: Path, overrides: Iterable[str]) -> dict[str, object]:
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", [*SMALL, *overrides, f"out={folder / 'run'}"])
    return run_recipe(loaded, quiet=True)


@pytest.mark.parametrize("shape", [as_alpaca, as_sharegpt, as_messages])
def test_sft_alpaca_takes_any_file(shape: Callable[[str, str, str], Row], tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", shape)
    run("sft_alpaca", tmp_path, ["train.batch_size=4", f"stages.sft.data.path={rows}"])
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "stages" / "01-sft")]
    assert len(losses) == 2
    assert all(5.0 < loss < 6.5 for loss in losses if loss is not None), "log 266 = 5.58 is to know nothing"


def test_gsm8k_sft_on_a_local_file(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", as_gsm8k)
    local = [f"path={rows}", "subset=null"]
    made = run(
        "gsm8k_sft",
        tmp_path,
        [
            "train.batch_size=4",
            "sampling.max_tokens=8",
            *(f"stages.sft.data.{word}" for word in local),
            *(f"stages.eval.tasks.{word}" for word in (*local, "split=train", "limit=3")),
        ],
    )
    table = made["evaluations"]["eval"]["rows"]  # type: ignore[index]
    assert [(row["label"], row["tasks"]) for row in table] == [("base", 3), ("sft", 3)]


def test_gsm8k_grpo_on_a_local_file(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", as_gsm8k)
    local = [f"path={rows}", "subset=null"]
    run(
        "gsm8k_grpo",
        tmp_path,
        [
            "sampling.max_tokens=8",
            "stages.rl.prompts_per_step=2",
            "stages.rl.rollouts_per_prompt=2",
            "stages.eval.samples=1",
            *(f"stages.rl.tasks.{word}" for word in local),
            *(f"stages.eval.tasks.{word}" for word in (*local, "split=train", "limit=2")),
        ],
    )
    stage = tmp_path / "run" / "stages" / "01-rl"
    (first, last) = read_metrics(stage)
    assert first["kl"] == pytest.approx(0, abs=1e-6), "the reference is where the stage begins"
    assert {"rewards/math", "rewards/format"} <= set(last)
    rollout = read_rollouts(stage, 1)[0]
    assert [message.role for message in rollout.messages] == ["system", "user", "assistant"]
    assert "<think>" in rollout.messages[0].content


def test_word_problems_are_learned_as_equations(tmp_path: Path) -> None:
    """`smollm2_words.yaml` on rows of SVAMP's columns: an equation is imitated, its value is verified."""
    rows = tmp_path / "rows.jsonl"
    row = {"Body": "Ann had 8 pens.", "Question": "She lost 3. How many are left?", "Equation": "( 8.0 - 3.0 )"}
    rows.write_text("".join(json.dumps({**row, "Answer": answer}) + "\n" for answer in (5.0, "5.0")))
    small = ["stages.sft.train.steps=1", "stages.sft.train.batch_size=2", "stages.rl.train.steps=1"]
    small += ["stages.rl.prompts_per_step=2", "stages.rl.rollouts_per_prompt=2", "stages.eval.tasks.split=train"]
    small += [f"stages.{name}.path={rows}" for name in ("sft.data", "rl.tasks", "eval.tasks")]
    path = ROOT / "recipes" / "smollm2_words.yaml"
    run_recipe(load_recipe(path, [*SMALL[:2], *small, f"out={tmp_path / 'run'}"]), quiet=True)
    assert (tmp_path / "run" / "stages" / "03-eval" / "manifest.json").exists()
    (task, _) = load_tasks(DataConfig(path=str(rows)))[0]
    given, marked = final_words(row["Equation"])
    for gold, right in ((gold_answer(task.columns["answer"]), True), ("6.0", False)):
        assert answers(read(gold), gold, given, NO_ALGEBRA, None, marked=marked) is right


def test_a_model_of_half_the_layers_learns_from_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`smollm2_distill.yaml` at a small size, and what `fewer_layers.py` leaves of a model: an end, as it was."""
    whole, half = Path(locate("whet:demo")[0]), tmp_path / "half"
    layers = len({name.split(".")[2] for name in load_file(whole / "model.safetensors") if ".layers." in name})
    cut = ["fewer_layers.py", str(whole), str(half), "--first", "0", "--last"]
    for last in (str(layers + 1), "1"):
        monkeypatch.setattr("sys.argv", [*cut, last])
        with pytest.raises(SystemExit) if last != "1" else nullcontext():
            runpy.run_path(str(ROOT / "recipes" / "fewer_layers.py"), run_name="__main__")
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, half))
    named = {name: name.replace(".layers.0.", f".layers.{layers - 1}.") for name in after}
    assert len(named) < len(before) and all(np.array_equal(after[name], before[there]) for name, there in named.items())
    rows = write(tmp_path / "rows.jsonl", as_gsm8k)
    short = [f"data.path={rows}", "data.subset=null", "train.steps=2", "train.batch_size=4"]
    words = [f"stages.{name}.{word}" for name in ("teacher", "distilled", "imitated") for word in short]
    words += [f"stages.{name}.model={half}" for name in ("distilled", "imitated")]
    words += ["model=whet:demo", f"out={tmp_path / 'run'}"]
    run_recipe(load_recipe(ROOT / "recipes" / "smollm2_distill.yaml", words), quiet=True)
    losses = [read_metrics(folder)[-1]["loss"] for folder in sorted((tmp_path / "run" / "stages").iterdir())]
    assert len(losses) == 3 and all(loss is not None and loss > 0 for loss in losses)


@pytest.mark.parametrize("recipe", ["countdown_dapo", "demo_base", "dpo", "functions_dapo", "online_dpo"])
def test_generated_rows_need_no_file(recipe: str, tmp_path: Path) -> None:
    stages = load_recipe(ROOT / "recipes" / f"{recipe}.yaml").recipe.stages
    small = {
        "sft": ["data.count=8", "train.batch_size=4", "train.steps=2", "train.warmup=0"],
        "preference": ["data.count=8", "eval_data.count=4", "train.batch_size=4", "train.steps=2"],
        "online_preference": [
            "prompts_per_step=2",
            "rollouts_per_prompt=2",
            "sampling.max_tokens=24",
            "train.steps=1",
        ],
        "rl": ["prompts_per_step=2", "rollouts_per_prompt=2", "sampling.max_tokens=24", "train.steps=1"],
        "eval": ["tasks.count=2", "samples=1", "sampling.max_tokens=8"],
    }
    overrides = [f"stages.{name}.{word}" for name, stage in stages.items() for word in small[stage.kind]]
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", [SMALL[1], *overrides, f"out={tmp_path / 'run'}"])
    run_recipe(loaded, quiet=True)
    made = {manifest.parent.name for manifest in (tmp_path / "run" / "stages").glob("*/manifest.json")}
    assert made == {f"{number:02d}-{name}" for number, name in enumerate(stages, start=1)}


AI_FEEDBACK = {
    "rlaif": ["sft", "label", "rm", "rl", "eval"],
    "rlaif_direct": ["sft", "rl", "eval"],
    "constitutional": ["sft", "revise", "sl", "label", "rm", "rl", "eval"],
}


@pytest.mark.parametrize("recipe", AI_FEEDBACK)
def test_ai_feedback_needs_no_network(recipe: str, tmp_path: Path) -> None:
    """Every stage at a small size: the judge and the writer are rules that ship with the package."""
    small = {
        "sft": ["data.count=64", "train.batch_size=16", "train.steps=8"],
        "sl": ["train.batch_size=4", "train.steps=1"],
        "revise": ["tasks.count=6", "chunk=3"],
        "label": ["tasks.count=24", "samples=3", "chunk=12"],
        "rm": ["train.batch_size=2", "train.steps=2", "train.warmup=0"],
        "rl": ["prompts_per_step=2", "rollouts_per_prompt=2", "train.steps=1"],
        "eval": ["tasks.count=4", "samples=1"],
    }
    stages = AI_FEEDBACK[recipe]
    overrides = [f"stages.{name}.{word}" for name in stages for word in small[name]]
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", [*overrides, f"out={tmp_path / 'run'}"])
    assert list(loaded.recipe.stages) == stages
    run_recipe(loaded, quiet=True)
    made = {manifest.parent.name for manifest in (tmp_path / "run" / "stages").glob("*/manifest.json")}
    assert made == {f"{number:02d}-{name}" for number, name in enumerate(stages, start=1)}
    if "rl" in stages:
        (line,) = read_metrics(tmp_path / "run" / "stages" / f"{stages.index('rl') + 1:02d}-rl")
        assert {"rewards/worth", "rewards/verifier"} <= set(line) and (line["unscored"] or 0) < 4


SELECTION = {
    "rft": {"select": [], "train": ["train.batch_size=4", "train.steps=1"]},
    "best_of_n": {"rm": ["data.count=16", "train.batch_size=4", "train.steps=2"], "train": ["train.steps=1"]},
    "star": {},
    "rest_em": {},
    "expert_iteration": {},
    "iterative_dpo": {},
    "generate_verify_train": {},
}


@pytest.fixture(scope="module")
def made_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the recipes of `SELECTION`, which begin with the same SFT: the first one trains it for all."""
    return tmp_path_factory.mktemp("selection")


@pytest.mark.parametrize("recipe", SELECTION)
def test_selection_needs_no_file(recipe: str, made_before: Path) -> None:
    """Every stage at a small size, two rounds of every loop; what comes of a round is what the next begins with."""
    source = load_recipe(ROOT / "recipes" / f"{recipe}.yaml")
    tasks = ["tasks.count=24", "tasks.digits=1", "samples=4", "sampling.temperature=1", "chunk=24"]
    small = {
        "sft": ["data.count=1024", "data.digits=1", "data.bare=0.3", "train.batch_size=32", "train.steps=24"],
        "sample": tasks,
        "generate": tasks,
        "train": ["train.batch_size=4", "train.steps=1"],
        "held_out": ["tasks.count=4", "samples=1"],
        "eval": ["tasks.count=2", "samples=1"],
        **SELECTION[recipe],
    }
    loop = source.recipe.loops.get("improve")
    group = [name.rpartition("-")[2] for name in loop.stages[0]] if loop else []
    words = [f"stages.improve.stages.{name}.{word}" for name in group for word in small.get(name, ())]
    words += [f"stages.{name}.{word}" for name in source.recipe.stages for word in small.get(name, ())]
    words += ["stages.improve.repeat=2"] if loop else []
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", [*words, "threads=1", f"out={made_before / recipe}"])
    run_recipe(loaded, quiet=True, choices=Choices(reuse=made_before))
    found = {record.name: record for record in records(made_before / recipe).values()}
    assert list(found) == list(loaded.recipe.stages)
    assert all(record.state == "done" or "ended after" in record.state for record in found.values())
    assert ("from" in found["sft"].noted) == (recipe != "rft")
    rows = {name: (record.folder / "rows.jsonl").is_file() for name, record in found.items() if "sample" in name}
    assert all(rows.values())


def test_process_supervision_needs_nobody_to_label_a_step(tmp_path: Path) -> None:
    """`process.yaml` at a small size: step labels, a reward model of them, and its word on every step in RL."""
    small = {
        "sft": ["data.count=1024", "data.bare=0", "train.batch_size=32", "train.steps=24"],
        "labels": ["tasks.count=16", "samples=2", "rollouts=2", "chunk=8"],
        "prm": ["train.batch_size=4", "train.steps=2", "train.warmup=0"],
        "rl": ["prompts_per_step=2", "rollouts_per_prompt=2", "train.steps=1"],
        "eval": ["tasks.count=4", "samples=1"],
    }
    overrides = [f"stages.{name}.{word}" for name, words in small.items() for word in words]
    overrides += ["stages.rl.algorithm.critic.pretrain_steps=0", "stages.rl.algorithm.minibatches=1"]
    loaded = load_recipe(ROOT / "recipes" / "process.yaml", [*overrides, f"out={tmp_path / 'run'}"])
    assert list(loaded.recipe.stages) == list(small)
    run_recipe(loaded, quiet=True)
    stages = tmp_path / "run" / "stages"
    rows = [json.loads(line) for line in (stages / "02-labels" / "rows.jsonl").read_text().splitlines()]
    assert rows and max(len(row["steps"]) for row in rows) > 1, "the separator is the one that the answers are cut at"
    assert all(1 <= len(row["labels"]) <= len(row["steps"]) for row in rows)
    (line,) = read_metrics(stages / "04-rl")
    assert 0 < (line["rewards/process_model"] or 0) < 1 <= (line["rewards/process_model/steps"] or 0)
    assert "rewards/verifier" in line
    assert (stages / "05-eval" / "manifest.json").exists()


def test_a_gate_over_objectives_needs_no_file(tmp_path: Path) -> None:
    """`multi_objective.yaml` at a small size: ratings, a gate, and two policies that are told every objective."""
    small = {
        "sft": ["data.count=64", "train.batch_size=16", "train.steps=8"],
        "ratings": ["data.count=64", "eval_data.count=16", "train.batch_size=8", "train.steps=4", "train.warmup=0"],
        "gate": ["data.count=16", "eval_data.count=8", "train.batch_size=8", "train.steps=2"],
        "gated": ["prompts_per_step=2", "rollouts_per_prompt=2", "train.steps=1"],
        "fixed": ["prompts_per_step=2", "rollouts_per_prompt=2", "train.steps=1"],
        "eval": ["tasks.count=2", "samples=1"],
    }
    overrides = [f"stages.{name}.{word}" for name, words in small.items() for word in words]
    loaded = load_recipe(ROOT / "recipes" / "multi_objective.yaml", [*overrides, f"out={tmp_path / 'run'}"])
    assert list(loaded.recipe.stages) == list(small)
    run_recipe(loaded, quiet=True)
    stages = tmp_path / "run" / "stages"
    (line,) = read_metrics(stages / "04-gated")
    assert {f"rewards/model/{name}" for name in ("right", "worked", "brief", "gate/brief")} <= set(line)
    prompts = {read_rollouts(stages / "04-gated", 1)[i].messages[0].content.split()[1] for i in range(4)}
    assert prompts <= {"show", "brief"}
    assert (stages / "06-eval" / "manifest.json").exists()


def test_a_judge_in_training_sees_right_and_wrong_answers_in_equal_number(tmp_path: Path) -> None:
    """`genrm.yaml` at a small size: what is asked, what is imitated, and that agreement is what RL pays for."""
    easy = ["tasks.digits=1", "samples=4", "chunk=32"]
    small = {
        "policy": ["data.digits=1", "data.count=256", "train.batch_size=32", "train.steps=20"],
        "label": ["tasks.count=32", *easy],
        "label_test": ["tasks.count=16", *easy],
        "judge": ["train.batch_size=2", "train.steps=1"],
        "rl": ["prompts_per_step=1", "rollouts_per_prompt=2", "sampling.max_tokens=8", "train.steps=1"],
        "eval": ["samples=1", "sampling.max_tokens=8"],
        "student": ["prompts_per_step=2", "rollouts_per_prompt=2", "train.steps=1"],
        "student_eval": ["tasks.count=2", "samples=1"],
    }
    overrides = [f"stages.{name}.{word}" for name, words in small.items() for word in words]
    untaught = "stages.student.rewards.0.model={script: 'whet.envs.judges.rules:checker'}"
    loaded = load_recipe(ROOT / "recipes" / "genrm.yaml", [*overrides, untaught, f"out={tmp_path / 'run'}"])
    run_recipe(loaded, quiet=True)
    stages = tmp_path / "run" / "stages"
    asked = [json.loads(line) for line in (stages / "04-ask" / "rows.jsonl").read_text().splitlines()]
    assert asked and sum(row["verdict"] == "Yes" for row in asked) >= len(asked) // 2 - 1
    assert all(row["completion"].endswith(f"\nVerdict: {row['verdict']}") for row in asked)
    assert all(" or " in row["completion"] for row in asked), "it adds before it decides"
    (line,) = read_metrics(stages / "07-rl")
    assert "rewards/verdict" in line
    assert (stages / "08-eval" / "manifest.json").exists()
    (line,) = read_metrics(stages / "09-student")
    assert (line["reward"] + 1) / 2 == line["rewards/verifier"], "a judge that adds agrees with the verifier"
    assert (stages / "10-student_eval" / "manifest.json").exists()


@pytest.mark.parametrize("recipe", ["knights_grpo", "instructions_grpo"])
def test_recipes_whose_rows_a_program_prints(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for SFT, tasks for RL and held-out ones for the comparison come from one program."""
    monkeypatch.chdir(ROOT)
    steps = [f"stages.{stage}.train.steps=1" for stage in ("sft", "rl")]
    few = ["stages.sft.data.limit=8", "stages.rl.tasks.limit=4", "stages.eval.tasks.limit=2", "stages.eval.samples=1"]
    played = ["stages.rl.prompts_per_step=2", "stages.rl.rollouts_per_prompt=2"]
    short = [f"stages.{stage}.sampling.max_tokens=8" for stage in ("rl", "eval")]
    small = [*SMALL[:2], "stages.sft.train.batch_size=4", *steps, *few, *played, *short, f"out={tmp_path / 'run'}"]
    run_recipe(load_recipe(f"recipes/{recipe}.yaml", small), quiet=True)
    rollouts = read_rollouts(tmp_path / "run" / "stages" / "02-rl")
    assert len(rollouts) == 4 and all("accuracy" in rollout.parts for rollout in rollouts)


FORGETS = "+ (message.content if loop.last else message.content.split('</think>')[-1]) }}"


def test_a_tool_is_called_from_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`agent_hops.yaml` at a small size: rows, demonstrations with calls, two kinds of credit, an evaluation."""
    monkeypatch.chdir(ROOT)
    write_rows = runpy.run_path(str(ROOT / "recipes" / "agent_hops.py"))["write"]
    write_rows(tmp_path, demonstrations=8, tasks=4, held_out=2)
    rl = ["prompts_per_step=2", "rollouts_per_prompt=2", "train.steps=1", f"tasks.path={tmp_path / 'tasks.jsonl'}"]
    small = {
        "sft": ["train.batch_size=4", "train.steps=1", f"data.path={tmp_path / 'demonstrations.jsonl'}"],
        "turns": rl,
        "trajectory": rl,
        "eval": ["samples=1", f"tasks.path={tmp_path / 'held_out.jsonl'}"],
    }
    overrides = [f"stages.{name}.{word}" for name, words in small.items() for word in words]
    overrides += ["model.path=whet:tiny", SMALL[1], f"out={tmp_path / 'run'}"]
    loaded = load_recipe(ROOT / "recipes" / "agent_hops.yaml", overrides)
    assert list(loaded.recipe.stages) == list(small)
    (checked,) = [check.summary for check in check_recipe(loaded) if check.stage == "turns"]
    assert checked == "4 tasks; tools look, calls as tags"
    forgetful = TEMPLATE_FILES["whet:tags"].read_text().replace("+ message.content }}", FORGETS)
    (tmp_path / "forgetful.jinja").write_text(forgetful)
    other = load_recipe(
        ROOT / "recipes" / "agent_hops.yaml", [*overrides, f"model.chat_template={tmp_path / 'forgetful.jinja'}"]
    )
    (checked,) = [check.summary for check in check_recipe(other) if check.stage == "turns"]
    assert checked == (
        "4 tasks; tools look, calls as tags; after a user or a tool turn the chat template leaves out the thinking of "
        "earlier answers: plays keep it as it was sampled, and a deployment that renders its history anew drops it"
    )
    run_recipe(loaded, quiet=True)
    stages = tmp_path / "run" / "stages"
    for stage in ("02-turns", "03-trajectory"):
        (line,) = read_metrics(stages / stage)
        assert {"rewards/environment", "rewards/turns"} <= set(line) and not line["unscored"]
    for rollout in read_rollouts(stages / "02-turns", 1):
        assert rollout.prompt.startswith("<|im_start|>system\n<look>key</look> Next key.<|im_end|>\n<|im_start|>user\n")
        tools = [message for message in rollout.messages if message.role == "tool"]
        assert len(tools) == sum(len(message.tool_calls) for message in rollout.messages)
    assert (stages / "04-eval" / "manifest.json").exists()


def test_questions_are_searched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`search_qa.yaml` at a small size: demonstrations find their passage, and a play without a fault is worth 1."""
    pytest.importorskip("bm25s", reason="needs whet[search]")
    monkeypatch.chdir(ROOT)
    made = runpy.run_path(str(ROOT / "recipes" / "search_qa.py"))
    monkeypatch.setitem(made["write"].__globals__, "HELD_OUT", 2)
    data, folder = tmp_path / "data", tmp_path / "rows"
    data.mkdir()
    lives = [(f"Person{n}", f"City{n}") for n in range(10)]
    passages = [{"id": f"d{n}", "contents": f"{who} was born\nin {place}."} for n, (who, place) in enumerate(lives)]
    (data / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    asked = [
        {"question": f"where was {who} born", "answers": [place], "gold_doc": f"d{n}"}
        for n, (who, place) in enumerate(lives)
    ]
    asked[0]["gold_doc"] = "d1"  # what a search does not find has no demonstration
    (data / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    made["write"](data, folder)
    shown = [json.loads(line)["messages"] for line in (folder / "demonstrations.jsonl").read_text().splitlines()]
    tasks = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    assert len(tasks) == 8 and {said[0]["content"] for said in shown} == {
        task["prompt"] for task in tasks if "Person0" not in task["prompt"]
    }
    library, task = made["Library"](), next(task for task in tasks if "Person0" not in task["prompt"])
    library.reset(task["gold"], task["answers"])
    assert library.reward() == {"called": 0, "found": 0, "f1": 0}
    assert library.search(task["prompt"]) == f"(1) {task['gold']}"
    library.user(f"The {task['answers'][0].upper()}!")
    assert sum(library.reward().values()) == 1

    corpus = f"environment.options.corpus={folder / 'corpus.jsonl'}"
    small = {
        "sft": ["train.batch_size=4", "train.steps=1", f"data={folder / 'demonstrations.jsonl'}"],
        "rl": [
            "prompts_per_step=2",
            "rollouts_per_prompt=2",
            "train.steps=1",
            f"tasks={folder / 'tasks.jsonl'}",
            corpus,
        ],
        "eval": [f"tasks.path={folder / 'held_out.jsonl'}", corpus],
    }
    overrides = [f"stages.{name}.{word}" for name, words in small.items() for word in words]
    overrides += ["model.path=whet:tiny", SMALL[1], f"out={tmp_path / 'run'}"]
    run_recipe(load_recipe(ROOT / "recipes" / "search_qa.yaml", overrides), quiet=True)
    (line,) = read_metrics(tmp_path / "run" / "stages" / "02-rl")
    assert {"rewards/environment", "rewards/environment/found"} <= set(line) and not line["unscored"]


@pytest.mark.parametrize("name", ["agent_ledger", "agent_rooms", "code_agent"])
def test_recipes_with_tools_need_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / "recipes" / f"{name}.yaml"
    overrides, played = ["model.path=whet:tiny", SMALL[1], f"out={tmp_path / 'run'}"], list[str]()
    for number, (stage, section) in enumerate(load_recipe(path).recipe.stages.items(), start=1):
        where = f"stages.{stage}."
        if section.kind == "sft":
            overrides += [f"{where}data.limit=8", f"{where}train.batch_size=4", f"{where}train.steps=1"]
        elif section.kind == "rl":
            overrides += [f"{where}tasks.limit=4", f"{where}prompts_per_step=2", f"{where}rollouts_per_prompt=2"]
            overrides += [f"{where}train.steps=1"]
            played.append(f"{number:02}-{stage}")
        else:
            overrides += [f"{where}tasks.limit=2", f"{where}samples=1"]
    try:
        run_recipe(load_recipe(path, overrides), quiet=True)
    except ConfigError as error:
        if "needs a sandbox" in str(error):
            pytest.skip(str(error))
        raise
    stages = tmp_path / "run" / "stages"
    assert all((stage / "manifest.json").exists() for stage in stages.iterdir())
    for name in played:
        (line,) = read_metrics(stages / name)
        assert not line["unscored"] and "outcomes/environment_error" not in line


@pytest.mark.parametrize("name", ["classic", "on_policy_distill", "r1", "r1_distill", "r1_zero"])
def test_a_whole_pipeline_needs_no_file(name: str, tmp_path: Path) -> None:
    """Every stage of it, at a small size; answers of an untrained model are all wrong, so any will be chosen."""
    few = {"count": 8, "prompts_per_step": 2, "rollouts_per_prompt": 2, "batch_size": 2, "steps": 1, "samples": 1}
    few |= {"max_tokens": 40, "correct": None, "min_reward": None, "warmup": 0, "digits": 1}
    written = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())

    def small(value: Any) -> Any:
        if isinstance(value, list):
            return [small(each) for each in value]
        return {k: few.get(k, small(v)) for k, v in value.items()} if isinstance(value, dict) else value

    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small(written), sort_keys=False))
    run_recipe(load_recipe(tmp_path / "small.yaml", [f"out={tmp_path / 'run'}"]), quiet=True)
    finished = sorted(path.parent.name[3:] for path in (tmp_path / "run" / "stages").glob("*/manifest.json"))
    assert finished == sorted(written["stages"])
