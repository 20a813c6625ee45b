"""Recipes: what may be written, who wins, where a value came from, and what a mistake is answered with."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from whet.config import LossConfig, PolicyConfig, Recipe, RLStage, SFTStage
from whet.config.loading import load_recipe, resolved, split_overrides
from whet.config.schema import json_schema
from whet.errors import ConfigError

RECIPE = """\
name: small
model: whet:tiny
train:
  lr: 1e-4
  steps: 10
  lora: {rank: 8}
stages:
  sft:
    kind: sft
    data: {generate: arithmetic, count: 100}
  rl:
    kind: rl
    tasks: {generate: arithmetic}
    rewards:
      - kind: verifier
    algorithm:
      preset: dapo
      clip: {high: 0.3}
    train:
      lr: 2e-6
  eval:
    kind: eval
    tasks: {generate: arithmetic, count: 50}
    rewards: [{kind: verifier, weight: 2}]
    models: {before: "whet:tiny", after: "@rl"}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a recipe and stands in its folder, so that places in messages are short."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str = RECIPE) -> Path:
        Path("r.yaml").write_text(text)
        return Path("r.yaml")

    return write_recipe


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


# ------------------------------------------------------------------------------------------ precedence


def test_stages_inherit_key_by_key_and_their_own_keys_win(write) -> None:
    recipe = load_recipe(write()).recipe
    sft, rl = recipe.stages["sft"], recipe.stages["rl"]
    assert isinstance(sft, SFTStage)
    assert isinstance(rl, RLStage)
    assert (sft.train.lr, sft.train.steps, sft.train.lora.rank) == (1e-4, 10, 8)
    assert (rl.train.lr, rl.train.steps, rl.train.lora.rank) == (2e-6, 10, 8)


@pytest.mark.parametrize(
    "words",
    [["train.steps=3"], ["--train.steps=3"], ["--train.steps", "3"], ["train.steps=9", "train.steps=3"]],
)
def test_the_command_line_wins_in_each_of_its_forms_and_the_last_word_counts(write, words: list[str]) -> None:
    recipe = load_recipe(write(), words).recipe
    assert recipe.stages["sft"].train.steps == recipe.stages["rl"].train.steps == 3


def test_an_override_reaches_every_level(write) -> None:
    words = [
        "seed=7",
        "model=other/model",
        "model.dtype=float32",
        "stages.rl.algorithm=grpo",
        "stages.rl.rewards.0.weight=3",
        "stages.rl.train.lora=null",
        "stages.sft.train.betas=[0.8, 0.9]",
        "stages.sft.eval_data.path=held.jsonl",
        "stages.rl.model=@sft",
    ]
    recipe = load_recipe(write(), words).recipe
    sft, rl = recipe.stages["sft"], recipe.stages["rl"]
    assert (recipe.seed, recipe.model.path, recipe.model.dtype) == (7, "other/model", "float32")
    assert (rl.algorithm.preset, rl.algorithm.clip.high, rl.rewards[0].weight) == ("grpo", 0.3, 3)
    assert rl.train.lora is None
    assert sft.train.lora.rank == 8
    assert (sft.train.betas, sft.eval_data.path, rl.model.path) == ((0.8, 0.9), "held.jsonl", "@sft")


def test_every_value_knows_its_origin(write) -> None:
    loaded = load_recipe(write(), ["train.steps=3", "stages.sft.train.eps=1e-6"])
    origins = {path: str(origin) for path, origin in loaded.origins.items()}
    assert origins["stages.sft.train.lr"] == "r.yaml:4"
    assert origins["stages.rl.train.lr"] == "r.yaml:20"
    assert origins["stages.rl.train.lora.rank"] == "r.yaml:6"
    assert origins["stages.rl.train.steps"] == "command line"
    assert origins["stages.sft.train.eps"] == "command line"
    assert origins["stages.rl.train.eps"] == "default"
    assert origins["stages.rl.algorithm.clip.high"] == "r.yaml:18"
    assert origins["stages.rl.algorithm.clip.low"] == "default"
    assert origins["stages.rl.algorithm.dynamic_sampling.rounds"] == "preset dapo"
    assert origins["stages.rl.algorithm.kl.place"] == "default"
    assert origins["model.path"] == "r.yaml:2"
    assert origins["stages.eval.rewards.0.weight"] == "r.yaml:24"
    assert origins["stages.eval.models.after"] == "r.yaml:25"


def test_rl_keeps_its_own_default_rate_whatever_else_is_set(write) -> None:
    text = RECIPE.replace("  lr: 1e-4\n", "").replace("      lr: 2e-6\n", "      eps: 1e-7\n")
    recipe = load_recipe(write(text)).recipe
    assert recipe.stages["rl"].train.lr == 1e-6
    assert recipe.stages["sft"].train.lr == 1e-5


def test_scalars_are_those_of_yaml_1_2(write) -> None:
    text = RECIPE.replace("{generate: arithmetic, count: 100}", "{path: 2024-01-01, split: no, limit: 1_000}")
    recipe = load_recipe(write(text), ["train.eps=1e-6", "threads=010"]).recipe
    data = recipe.stages["sft"].data
    assert (data.path, data.split, data.limit) == ("2024-01-01", "no", 1000)
    assert (recipe.stages["sft"].train.eps, recipe.threads) == (1e-6, 10)


# ---------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: small", "nmae: small", "r.yaml:1: nmae: unknown key; did you mean 'name'? (and 1 more problem)"),
        ("  lr: 1e-4", "  lrr: 1e-4", "r.yaml:4: train.lrr: unknown key; did you mean 'lr'?"),
        ("      lr: 2e-6", "      lrr: 2e-6", "r.yaml:20: stages.rl.train.lrr: unknown key; did you mean 'lr'?"),
        ("{rank: 8}", "{rnak: 8}", "r.yaml:6: train.lora.rnak: unknown key; did you mean 'rank'?"),
        ("count: 100", "cuont: 1", "r.yaml:10: stages.sft.data.cuont: unknown key; did you mean 'count'?"),
        ("weight: 2", "wieght: 2", "r.yaml:24: stages.eval.rewards.0.wieght: unknown key; did you mean 'weight'?"),
        ("    train:", "    trian:", "r.yaml:19: stages.rl.trian: unknown key; did you mean 'train'?"),
        ("{high: 0.3}", "{hihg: 1}", "r.yaml:18: stages.rl.algorithm.clip.hihg: unknown key; did you mean 'high'?"),
        ("kind: sft", "kind: sfd", "r.yaml:9: stages.sft.kind: must be one of 'sft', "),
        (
            "preset: dapo",
            "preset: dpao",
            "r.yaml:17: stages.rl.algorithm.preset: must be 'grpo', 'grpo_ps', 'gdpo', 'dapo'",
        ),
        ("  steps: 10", "  steps: ten", "r.yaml:5: train.steps: must be a whole number, got 'ten'"),
        ("  steps: 10", "  steps: 0", "r.yaml:5: train.steps: must be at least 1, got 0"),
        ("  lr: 1e-4", "  lr: .nan", "r.yaml:4: train.lr: must be a finite number, got nan"),
        ("      - kind: verifier", "      - kind: vrifier", "r.yaml:15: stages.rl.rewards.0.kind: must be one of"),
        (
            "      - kind: verifier",
            "      - weight: 1",
            "r.yaml:15: stages.rl.rewards.0.kind: missing; one of: verifier",
        ),
        ("{generate: arithmetic}", "[[1]]", "r.yaml:13: stages.rl.tasks: must be a section of keys, got [["),
        ("model: whet:tiny", "seed: 1", "r.yaml:1: model: missing"),
        (
            '"@rl"',
            '"@lr"',
            "r.yaml:25: stages.eval.models.after is @lr, which is no earlier stage that makes a model; there is ",
        ),
        (
            "      - kind: verifier",
            '      - kind: verifier\n      - {kind: judge, model: {path: "@reward"}}',
            "r.yaml:16: stages.rl.rewards.1.model.path is @reward, which is no earlier stage that makes a model",
        ),
        (
            "data: {generate: arithmetic, count: 100}",
            'data: {path: "@sft"}',
            "r.yaml:10: stages.sft.data.path is @sft, which is no earlier stage that makes rows: sft is of kind sft",
        ),
        (
            "      - kind: verifier",
            '      - kind: verifier\n      - {kind: judge, model: {base_url: "https://h/v1", model: m}, votes: 3}',
            "r.yaml:16: stages.rl.rewards.1.votes above 1 at temperature 0 would be the same vote again",
        ),
        ("  lr: 1e-4", "  lr: 1\n  lr: 2", "r.yaml:5: train.lr: given twice, first in line 4; delete one"),
        ("{rank: 8}", "{rank: 8", "r.yaml:7: not valid YAML: "),
        (
            "  steps: 10",
            "\tsteps: 10",
            "r.yaml:5: not valid YAML: found character '\\t' that cannot start any token; indent",
        ),
        ('"@rl"', "@rl", "r.yaml:25: not valid YAML: found character '@' that cannot start any token; put the text"),
        ("name: small", "name: !!python/name:os.system x", "r.yaml:1: name: the YAML tag "),
        ("name: small", "name: &a [*a]", "r.yaml:1: too many values or too deep; does an alias contain itself?"),
        ("name: small", "name: " + "[" * 9000, "r.yaml: nested too deeply for a recipe"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_with_its_place(write, old: str, new: str, expected: str) -> None:
    assert old in RECIPE
    assert message(write(RECIPE.replace(old, new, 1))).startswith(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.lrr=1"], "command line: train.lrr: unknown key; did you mean 'lr'?"),
        (["trian.lr=1"], "command line: trian: unknown key; did you mean 'train'?"),
        (["stages.rll.train.lr=1"], "command line: stages.rll: no such stage; did you mean 'rl'?"),
        (["stages.rl.lr=1"], "command line: stages.rl.lr: unknown key; did you mean 'train.lr'?"),
        (["stages.rl.rewards.1.weight=2"], "command line: stages.rl.rewards.1: stages.rl.rewards has entries 0 to 0"),
        (["name.x=1"], "command line: name.x: name is 'small', which has no keys"),
        (["threads=fast"], "command line: threads: must be a whole number or 'auto', got 'fast'"),
        (["stages.rl.sampling.temperature=0"], "command line: stages.rl.sampling.temperature must be above 0 for RL"),
        (
            ["train.optimizer=muno"],
            "command line: train.optimizer: must be 'adamw', 'adamw8bit' or 'muon', got 'muno'; did you",
        ),
        (["fast"], "command line: 'fast' is not KEY=VALUE; write for example train.lr=2e-5"),
        (["--fast"], "command line: --fast: no such option, and no value for a key of that name"),
        (["train..lr=1"], "command line: 'train..lr=1': a key is names with dots between, such as train.lr"),
        (["train.lr=[1"], "command line: not valid YAML: "),
    ],
)
def test_a_mistake_on_the_command_line_says_so(write, words: list[str], expected: str) -> None:
    assert message(write(), *words).startswith(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rl.train.quantize=nf4", "rl.sampling={engine: vllm}"], "vLLM is handed whole weights"),
        (["rl.sampling.top_p=0.9"], "truncates the distribution"),
    ],
)
def test_sections_that_contradict_one_another_are_refused(write, words: list[str], expected: str) -> None:
    assert expected in message(write(), *(f"stages.{word}" for word in words))


def test_a_default_that_reaches_no_stage_is_refused(write) -> None:
    everywhere = RECIPE.replace("count: 100}", "count: 100}\n    train: {lr: 1e-3}")
    expected = "train.lr: has no effect, every stage sets its own; set stages.sft.train.lr or stages.rl.train.lr"
    assert message(write(everywhere)) == f"r.yaml:4: {expected}"
    without = everywhere.replace("  lr: 1e-4\n", "")
    assert load_recipe(write(without)).recipe.stages["sft"].train.lr == 1e-3
    assert message(write(without), "train.lr=1e-5") == f"command line: {expected}"
    # What the command line gives to every stage does not make the file's default a mistake.
    load_recipe(write(), ["stages.sft.train.lr=1e-5", "stages.rl.train.lr=1e-6"])


def test_a_default_for_no_stage_of_its_kind_is_refused(write) -> None:
    text = "name: x\nmodel: m\nsampling: {top_p: 1}\nstages:\n  s: {kind: sft, data: {path: a.jsonl}}\n"
    assert message(write(text)).startswith(
        "r.yaml:3: sampling: no stage has a sampling section (stages of kind online_preference, rl, distill, eval"
    )


def test_an_alias_bomb_is_refused_before_it_grows(write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "too many values" in message(write("\n".join(lines)))


def test_a_recipe_that_is_not_there_names_its_neighbour(write) -> None:
    write()
    assert message(Path("rr.yaml")) == "rr.yaml: no such recipe; did you mean 'r.yaml'?"
    Path("folder").mkdir()
    assert message(Path("folder")) == "folder: a folder, and no recipe; give a .yaml file"


# -------------------------------------------------------------------------------------------- machine


def test_a_machine_file_goes_over_the_recipe_and_under_the_command_line(write) -> None:
    path = write(RECIPE + "machine: {trainer: {gpus: 4}, samplers: {replicas: 2}}\n")
    Path("machine.yaml").write_text("machine: {trainer: {nodes: 2, gpus: 8}}\n")
    machine = load_recipe(path, ["machine.yaml"]).recipe.machine
    assert (machine.trainer.ranks, machine.samplers.replicas) == (16, 2)
    loaded = load_recipe(path, ["machine.trainer.gpus=3", "machine.yaml"])
    assert loaded.recipe.machine.trainer.ranks == 6
    assert str(loaded.origins["machine.trainer.nodes"]) == "machine.yaml:1"
    assert load_recipe(path, ["--machine.samplers.replicas", "1"]).recipe.machine.samplers.replicas == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("machine: {}\ntrain: {lr: 1}\n", "machine.yaml:2: train: a second file has the section 'machine' alone"),
        ("{}\n", "machine.yaml: a second file has the section 'machine', and this one is empty"),
        ("machine: {trainer: {gpu: 2}}\n", "machine.yaml:1: machine.trainer.gpu: unknown key; did you mean 'gpus'?"),
        ("machine: {sampler: {}}\n", "machine.yaml:1: machine.sampler: unknown key; did you mean 'samplers'?"),
        ("machine: {trainer: {gpus: 0}}\n", "machine.yaml:1: machine.trainer.gpus: must be at least 1, got 0"),
    ],
)
def test_a_machine_file_has_nothing_else(text: str, expected: str, write) -> None:
    path = write()
    Path("machine.yaml").write_text(text)
    assert message(path, "machine.yaml").startswith(expected)


# ------------------------------------------------------------------------------------------- identity


def test_the_mathematics_are_all_keys_but_those_that_say_where_and_how_fast(write) -> None:
    path = write()
    base = load_recipe(path).recipe.mathematics()
    for same in (
        "out=elsewhere",
        "threads=2",
        "machine.trainer.gpus=2",
        "save.every=5",
        "description=again",
        "train.microbatch_tokens=9",
    ):
        assert load_recipe(path, [same]).recipe.mathematics() == base
    for other in ("seed=1", "train.steps=11", "model=m", "stages.rl.algorithm.clip.low=0.1"):
        assert load_recipe(path, [other]).recipe.mathematics() != base


def test_a_resolved_recipe_is_a_recipe(write) -> None:
    recipe = load_recipe(write()).recipe
    assert Recipe.model_validate(resolved(recipe)) == recipe


# -------------------------------------------------------------------------------------------- numbers


def test_the_budget_multiplies_out(write) -> None:
    words = ["stages.rl.algorithm.minibatches=2", "stages.rl.sampling.max_tokens=100", "stages.eval.samples=4"]
    sft, rl, evaluation = load_recipe(write(), words).recipe.budgets()
    assert (sft.steps, sft.sequences, sft.tokens, sft.total(sft.sequences)) == (10, 32, None, 320)
    assert (rl.optimizer_steps, rl.sequences, rl.tokens) == (20, 32 * 8, 32 * 8 * 100)
    assert rl.total(rl.tokens) == 32 * 8 * 100 * 10 * 10  # ten steps, each drawn up to ten times (DAPO)
    assert (evaluation.prompts, evaluation.sequences) == (50, 50 * 4 * 2)


def test_epochs_become_steps_once_the_rows_are_known(write) -> None:
    text = RECIPE.replace("  steps: 10\n", "").replace("      lr: 2e-6", "      steps: 10")
    sft = load_recipe(write(text), ["stages.sft.train.epochs=2"]).recipe.budgets()[0]
    assert sft.steps == 7  # 200 rows in batches of 32


def test_the_schema_has_what_loading_adds() -> None:
    schema = json_schema()
    assert {"train", "sampling", "model", "stages"} <= schema["properties"].keys()
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    assert "Newton-Schulz" in schema["$defs"]["TrainConfig"]["properties"]["optimizer"]["description"]
    for reference in re.findall(r"#/\$defs/(\w+)", str(schema)):
        assert reference in schema["$defs"]


def test_words_are_split_in_order() -> None:
    words = ["a.b=1=2", "--c", "x y", "--d=", "e=@sft"]
    assert split_overrides(words) == [(("a", "b"), "1=2"), (("c",), "x y"), (("d",), ""), (("e",), "@sft")]


@pytest.mark.parametrize("section", [PolicyConfig.model_validate("grpo"), LossConfig.model_validate("rpo")])
def test_a_section_that_is_made_from_formulas_crosses_a_process(section: PolicyConfig | LossConfig) -> None:
    assert pickle.loads(pickle.dumps(section)) == section
