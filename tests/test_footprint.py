"""The plan's memory: what is rehearsed without content is what a real step takes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from whet.cli.plan import memory_table, rank_lines
from whet.config import CreateConfig, LoraConfig, ModelConfig, SamplingConfig, TrainConfig
from whet.config.loading import load_recipe
from whet.config.machine import TrainerRanks
from whet.config.policy_terms import CriticConfig
from whet.config.train import MarksConfig
from whet.errors import DataError
from whet.launch.check import check_recipe, seen_at_hand
from whet.launch.main import run_recipe
from whet.launch.memory import footprint, footprints, frugal, settle, trainings
from whet.launch.memory_report import FULL_TOKENS, ROOM, Footprint, Role, fitting_tokens, on_each_rank, with_samplers
from whet.models.load import load_model
from whet.pipeline.run import Run
from whet.records import Atom
from whet.sampling.engine import Engine
from whet.tracking.log import read_metrics
from whet.training import engine
from whet.training.engine import CACHED_TOKENS, TokenBudget

ROOT = Path(__file__).parent.parent
SHAPE = CreateConfig(hidden_size=256, layers=2, heads=4, kv_heads=2, intermediate_size=768)
MODEL = ModelConfig(path="whet:tiny", create=SHAPE)
LARGER = ModelConfig(path="whet:tiny", create=SHAPE.model_copy(update={"layers": 4}))
"""For the comparison with a real step: the process must not be most of what is compared."""
FRUGAL: tuple[dict[str, object], ...] = ({"gradient_checkpointing": True}, {"lora": {"rank": 4}})
MEASURE = """
import json, os, re, sys
from pathlib import Path
from whet.config import ModelConfig, TrainConfig
from whet.launch.memory import _full_microbatch, footprint
from whet.models.load import load_model
from whet.models.device import give_memory_back
from whet.training.optim import Optimizers

def measure(model, train):
    planned = footprint("", model, train, None)
    language = load_model(model, lora=train.lora, checkpointing=train.gradient_checkpointing)
    language.module.train()
    optimizers = Optimizers(language.parameters, train)
    for tokens in (256, train.microbatch_tokens):  # the first makes the optimizer's state
        _full_microbatch(tokens, with_entropy=False).run(language)
        optimizers.step(1.0)
    # Not getrusage: its maximum is the larger of ours and that of the process that started us.
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    print(planned.peak, 1024 * int(peak), flush=True)

give_memory_back()
model, *trains = sys.argv[1:]
for train in trains:  # each in a process of its own, since a peak never falls
    if os.fork() == 0:
        measure(ModelConfig.model_validate(json.loads(model)), TrainConfig.model_validate(json.loads(train)))
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_the_plan_is_within_ten_percent_of_a_real_step() -> None:
    trains = [TrainConfig.model_validate({"microbatch_tokens": 6144, **change}) for change in FRUGAL]
    words = [sys.executable, "-c", MEASURE, LARGER.model_dump_json(), *(train.model_dump_json() for train in trains)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    for change, line in zip(FRUGAL, done.stdout.splitlines(), strict=True):
        planned, real = map(int, line.split())
        assert abs(planned / real - 1) < 0.1, (change, planned, real)


def test_each_setting_saves_where_it_should() -> None:
    plain = footprint("sft", MODEL, TrainConfig(microbatch_tokens=2048), None)
    shorter = footprint("sft", MODEL, TrainConfig(microbatch_tokens=1024), None)
    lean = footprint("sft", MODEL, TrainConfig(microbatch_tokens=2048, gradient_checkpointing=True), None)
    lora = footprint("sft", MODEL, TrainConfig(microbatch_tokens=2048, lora=LoraConfig(rank=4)), None)
    muon = footprint("sft", MODEL, TrainConfig(microbatch_tokens=2048, optimizer="muon"), None)
    assert 0.4 < shorter.work / plain.work < 0.65
    assert lean.work < 0.6 * plain.work
    assert lora.optimizer < 0.1 * plain.optimizer
    assert muon.optimizer < 0.8 * plain.optimizer
    with_reference = footprint("rl", MODEL, TrainConfig(microbatch_tokens=2048), None, reference=True)
    assert with_reference.weights == pytest.approx(2 * plain.weights, rel=0.01)


def test_the_cache_grows_with_what_runs_side_by_side() -> None:
    few, more, many = (footprint("eval", MODEL, None, SamplingConfig(max_running=n)) for n in (8, 16, 64))
    half = footprint("eval", MODEL.model_copy(update={"dtype": "bfloat16"}), None, SamplingConfig(max_running=8))
    assert 0 < half.cache < 0.6 * few.cache
    each = (more.cache - few.cache) / 8
    assert many.cache - few.cache == pytest.approx(56 * each, rel=1e-6)
    copied = few.cache - 8 * each  # of the weights, less the embedding
    assert 0.3 * few.weights < copied < 1.3 * few.weights
    assert few.optimizer == few.work == 0


def test_every_model_has_a_row_and_says_what_sharing_saves() -> None:
    train, sampling = TrainConfig(microbatch_tokens=512), SamplingConfig(max_running=8, max_tokens=32)
    apart = footprint("rl", MODEL, train, sampling, reference=True, critic=CriticConfig())
    assert [role.role for role in apart.roles] == ["policy", "reference", "critic"]
    policy, reference, critic = apart.roles
    assert reference.weights == policy.weights and reference.optimizer == 0
    # A trunk and one row of numbers instead of the vocabulary, which is tied: nearly the same size.
    assert critic.weights == pytest.approx(policy.weights, rel=0.01)
    assert critic.optimizer == pytest.approx(policy.optimizer, rel=0.01)
    assert 0.5 * policy.work < critic.work < policy.work
    assert apart.weights == policy.weights + reference.weights + critic.weights
    assert apart.work == policy.work
    shared = footprint(
        "rl", MODEL, train.model_copy(update={"lora": LoraConfig(rank=4)}), sampling, reference=True,
        critic=CriticConfig(share_trunk=True),
    )  # fmt: skip
    assert shared.weights == shared.roles[0].weights
    assert [role.note.partition(":")[2][:6] for role in shared.roles] == ["", " saves", " saves"]


def test_vllm_holds_a_copy_and_a_cache_of_its_own() -> None:
    train = TrainConfig(microbatch_tokens=512)
    embedded, vllm = (
        footprint("rl", MODEL, train, SamplingConfig.model_validate({"engine": engine, "cache_gib": 2}))
        for engine in ("embedded", "vllm")
    )
    assert embedded.cache > 0 and vllm.cache == 0
    assert vllm.weights > embedded.weights + 2 * 2**30
    served = SamplingConfig(engine="vllm", server="http://127.0.0.1:8000")
    assert footprint("rl", MODEL, train, served).weights == embedded.weights


def test_a_gpus_micro_batches_fill_the_room_that_there_is() -> None:
    """Fixed: 10 + 20 of weights and optimizer and 4 of work that no token owns; each token takes 2."""

    def at(tokens: int, available: int = 0) -> Footprint:
        role = Role(role="policy", weights=10, optimizer=20, work=4 + 2 * tokens)
        return Footprint(stage="", microbatch_tokens=tokens, process=0, roles=(role,), available=available)

    for available in (10_000, 40_000):
        chosen = fitting_tokens(at(100, available), at(200))
        assert at(chosen).peak <= ROOM * available < at(chosen + 256).peak
    assert fitting_tokens(at(100, 10**9), at(200)) == FULL_TOKENS
    assert fitting_tokens(at(100, 10), at(200)) == 256


def test_micro_batches_of_a_gpu_are_planned_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("whet.launch.memory", "whet.models.footprint"):
        monkeypatch.setattr(f"{room}.pick_device", lambda wanted: torch.device("cuda"))
    gpu = MODEL.model_copy(update={"dtype": "bfloat16"})
    chosen = {}
    for free in (2**28, 2**30):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda free=free: (free, 2**34))
        chosen[free] = settle(TrainConfig(), gpu, SamplingConfig(max_running=8), reference=True)
        planned = footprint("", gpu, TrainConfig(microbatch_tokens=chosen[free]), None, reference=True)
        assert planned.process == 0
        assert 0.4 * free < planned.peak < 0.52 * free
    assert chosen[2**30] > 4 * chosen[2**28]


def test_a_number_stays_and_auto_on_a_cpu_is_what_stays_in_its_cache() -> None:
    given, auto = (
        settle(TrainConfig.model_validate(train), MODEL, SamplingConfig(), reference=False)
        for train in ({"microbatch_tokens": 77}, {})
    )
    assert (given, auto) == (77, 2048)


def test_a_stage_that_does_not_fit_says_what_to_change() -> None:
    role = Role(role="policy", weights=1, optimizer=2, work=9)
    roomy = Footprint(stage="sft", microbatch_tokens=16384, process=1, roles=(role,), available=20)
    assert roomy.advice == ""
    assert replace(roomy, available=5).advice.startswith("does not fit; try train.microbatch_tokens=4096")


def test_whoever_trains_says_how_whatever_the_kind_of_stage(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "rlhf.yaml", ["train.lora.rank=4"]).recipe
    found = trainings(Run(recipe=recipe, folder=tmp_path))
    assert {recipe.stages[name].kind for name in found} == {"sft", "reward_model", "rl"}
    assert all(frugal(train) for train in found.values())


def test_a_terminal_of_80_columns_shows_every_role_whole() -> None:
    role = partial(Role, weights=9 * 2**30, optimizer=99 * 2**30, work=9 * 2**30, cache=9 * 2**30)
    roles = tuple(role(role=name) for name in ("policy", "reference", "critic", "reward model"))
    need = Footprint(stage="ppo", microbatch_tokens=1, process=2**30, roles=roles, available=999 * 2**30)
    console = Console(file=io.StringIO(), width=80)
    console.print(memory_table([need]))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said and all(f" {each.role} " in said for each in roles)


def test_a_critic_that_begins_as_a_stages_reward_model_is_planned_before_that_is_made() -> None:
    train, sampling = TrainConfig(), SamplingConfig()
    begun = footprint("rl", MODEL, train, sampling, critic=CriticConfig.model_validate({"model": "@rm"}))
    assert begun.roles == footprint("rl", MODEL, train, sampling, critic=CriticConfig()).roles


def test_a_local_model_that_judges_has_a_row_and_an_endpoint_has_none(tmp_path: Path) -> None:
    """Every place in which a judge or a writer may stand; whoever answers elsewhere takes no memory here."""
    (tmp_path / "r.yaml").write_text("""
name: r
model: whet:demo
sampling: {max_running: 8, max_tokens: 8}
stages:
  sft: {kind: sft, data: {generate: arithmetic}}
  label: {kind: compare, tasks: {generate: arithmetic}, judge: {model: {path: "@sft"}}}
  revise: {kind: revise, tasks: {generate: arithmetic}, principles: [Be right.], writer: {path: "@model"}}
  rl:
    kind: rl
    tasks: {generate: arithmetic}
    rewards:
      - {kind: judge, name: here, model: {path: "whet:tiny", create: {layers: 1}, max_running: 4}, max_tokens: 16}
      - {kind: judge, name: there, model: {base_url: "http://127.0.0.1:1/v1", model: m}}
    train: {steps: 1, microbatch_tokens: 256}
""")
    recipe = load_recipe(tmp_path / "r.yaml").recipe
    plan = {need.stage: need for need in footprints(Run(recipe=recipe, folder=tmp_path / "run"))}
    roles = {stage: [role.role for role in need.roles if role.role != "reference"] for stage, need in plan.items()}
    assert roles == {
        "sft": ["policy"], "label": ["policy", "judge"], "revise": ["policy", "writer"], "rl": ["policy", "judge"],
    }  # fmt: skip
    judge, small = plan["rl"].roles[-1], ModelConfig(path="whet:tiny", create=CreateConfig(layers=1))
    assert judge.weights == footprint("", small, None, None).weights and judge.cache > 0 and not judge.optimizer


def test_the_plan_holds_the_longest_row_and_not_the_whole_group(tmp_path: Path) -> None:
    """Rollouts more or less change nothing, groups are cut; a longer answer is never cut, and needs more."""

    def peak(rollouts: int, max_tokens: int) -> int:
        model = {"path": "whet:tiny", "create": {"max_length": 8192, "hidden_size": 64, "intermediate_size": 128}}
        stage = {
            "kind": "rl", "tasks": {"generate": "arithmetic"}, "rewards": [{"kind": "verifier"}],
            "rollouts_per_prompt": rollouts, "sampling": {"max_tokens": max_tokens, "cache_gib": 0.001},
            "train": {"steps": 1, "microbatch_tokens": 1024},
        }  # fmt: skip
        (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "model": model, "stages": {"rl": stage}}))
        (found,) = footprints(Run(recipe=load_recipe(tmp_path / "r.yaml").recipe, folder=tmp_path / "run"))
        return found.roles[0].work

    assert peak(2, 256) == peak(64, 256)
    assert peak(8, 4000) > 3 * peak(8, 256)


def test_ranks_share_what_learns_and_the_driver_keeps_what_is_asked() -> None:
    policy = Role(role="policy", weights=1000, optimizer=3000, work=500, cache=400, gathered=200)
    judge = Role(role="judge", weights=700)
    need = Footprint(stage="rl", microbatch_tokens=1, process=100, roles=(policy, judge), available=10_000)
    each = on_each_rank(need, TrainerRanks(gpus=3))
    (role,) = each.roles
    assert (role.weights, role.optimizer, role.work, role.cache) == (334, 1000, 700, 0)
    assert each.driver == 700 + 400 + 1000  # the judge, the cache, and a copy of the weights to sample from
    assert each.everything == 3 * each.peak + 100 + each.driver and not each.advice
    assert replace(each, process=0).everything == replace(each, process=0).peak  # each has a GPU of its own
    apart = with_samplers(need, 2)
    assert (apart.cache, apart.samplers) == (0, 100 + 3 * 1000 + 2 * 400)
    assert apart.everything == apart.peak + apart.samplers
    assert on_each_rank(apart, TrainerRanks(gpus=3)).driver == 700 + 1000
    (role,) = on_each_rank(need, TrainerRanks(gpus=4, context=2)).roles
    assert (role.weights, role.work) == (250, 500 // 2 + 200)


def test_auto_is_planned_for_each_rank_of_a_context(tmp_path: Path) -> None:
    recipe = {"name": "r", "model": "whet:demo", "stages": {"sft": {"kind": "sft", "data": {"generate": "arithmetic"}}}}
    for words, tokens in (((), 2048), (("machine.trainer={gpus: 4, context: 2}",), 4096)):
        (found,) = footprints(Run(recipe=load_recipe(recipe, words).recipe, folder=tmp_path))
        assert found.microbatch_tokens == tokens


def test_a_plan_says_how_ranks_share_a_step() -> None:
    loaded = load_recipe(ROOT / "recipes" / "rlhf.yaml", ["machine.trainer={nodes: 2, gpus: 2, replicate: 2}"])
    lines = rank_lines(loaded)
    assert lines[0] == "Trainer: 4 ranks (2 x 2), 1/2 of the model on each, 2 copies"
    assert "  ppo: 256 sequences a step as on one process, about 64 on a rank, cut by tokens" in lines
    loaded = load_recipe(ROOT / "recipes" / "rlhf.yaml", ["machine.trainer={gpus: 4, context: 2}"])
    assert rank_lines(loaded)[0] == "Trainer: 4 ranks (1 x 4), 1/4 of the model on each, each micro-batch on 2 together"
    assert "  ppo: 256 sequences a step as on one process, about 128 on those, cut by tokens" in rank_lines(loaded)
    assert rank_lines(load_recipe(ROOT / "recipes" / "rlhf.yaml")) == []


def test_the_plan_draws_the_steps_that_a_run_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows at hand the micro-batch is the largest step, to the token; of answers it is no less than a step."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}?", "completion": "x" * (n * n % 47 + 1)} for n in range(24)]
    pairs = [{"prompt": f"{n}?", "chosen": "y" * (n % 9 + 1), "rejected": "n" * (n % 5 + 1)} for n in range(24)]
    judged = [{**row, "label": n % 2 == 0} for n, row in enumerate(rows)]
    for name, given in {"rows": rows, "pairs": pairs, "judged": judged}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    learns = {"batch_size": 5, "steps": 7, "lr": 0}
    tasks = {"generate": "arithmetic", "count": 64}
    small = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16}
    stages = {
        "sft": {"kind": "sft", "data": "rows.jsonl", "train": learns},
        "mix": {"kind": "sft", "data": [{"path": "rows.jsonl"}, tasks], "train": learns},
        "rm": {"kind": "reward_model", "data": "pairs.jsonl", "train": {"batch_size": 5, "epochs": 1, "lr": 0}},
        "dpo": {"kind": "preference", "data": "pairs.jsonl", "train": learns},
        "kto": {"kind": "preference", "data": "judged.jsonl", "loss": {"kto": {}}, "train": learns},
        "rl": {
            "kind": "rl", "tasks": tasks, "rewards": [{"kind": "verifier"}], "prompts_per_step": 3,
            "rollouts_per_prompt": 2, "sampling": {"max_tokens": 9}, "train": {"steps": 2},
        },
    }  # fmt: skip
    recipe = {"name": "r", "model": {"path": "whet:tiny", "create": small}, "out": "run", "stages": stages}
    loaded = load_recipe(recipe)
    run = Run(recipe=loaded.recipe, folder=Path("run"))
    plan = {need.stage: need for need in footprints(run, partial(seen_at_hand, run))}
    run_recipe(loaded, quiet=True)
    for place, name in enumerate(stages, start=1):
        lines = read_metrics(Path(f"run/stages/{place:02d}-{name}"))
        if name == "rl":  # the prompts come on top
            assert max(line["sampled_tokens"] or 0 for line in lines) < plan[name].microbatch_tokens <= 3 * (64 + 2 * 9)
            continue
        largest = max(end - start for start, end in pairwise([0.0, *(line["num_tokens"] or 0.0 for line in lines)]))
        assert plan[name].microbatch_tokens == largest, name
    unread = {need.stage: need.microbatch_tokens for need in footprints(run)}
    assert set(unread.values()) == {CACHED_TOKENS} and all(n.microbatch_tokens < CACHED_TOKENS for n in plan.values())
    assert plan["rl"].cache < footprints(run)[-1].cache, "prompts are as long as they are"
    monkeypatch.setattr("whet.launch.check.AT_HAND_BYTES", 10)
    assert [name for name in stages if seen_at_hand(run, name) is None] == ["sft", "mix", "rm", "dpo", "kto"]


def test_the_plan_holds_what_no_micro_batch_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row however long it is, and rows that are compared; with a budget that is smaller than each of them."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}?", "completion": "x" * (9 * n)} for n in range(1, 8)]
    pairs = [{"prompt": f"{n}?", "chosen": "y" * (5 * n), "rejected": "n" * (9 * n)} for n in range(1, 8)]
    judged = [{"prompt": f"{n}?", "completion": "x" * (9 * n), "label": n % 2 == 0} for n in range(1, 8)]
    for name, given in {"rows": rows, "pairs": pairs, "judged": judged}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    learns = {"batch_size": 7, "epochs": 1, "lr": 0, "microbatch_tokens": 8}
    small = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16}
    stages = {
        "sft": {"kind": "sft", "data": "rows.jsonl", "train": {**learns, "max_length": 4096}},
        "rm": {"kind": "reward_model", "data": "pairs.jsonl", "hold_out": 0, "train": learns},
        "dpo": {"kind": "preference", "data": "pairs.jsonl", "train": learns},
        "kto": {"kind": "preference", "data": "judged.jsonl", "loss": {"kto": {}}, "train": learns},
        "online": {
            "kind": "online_preference", "tasks": {"generate": "arithmetic", "count": 8}, "pairs": "all",
            "rewards": [{"kind": "language", "script": "LATIN"}], "prompts_per_step": 2, "rollouts_per_prompt": 4,
            "sampling": {"max_tokens": 9}, "train": {"steps": 2, "lr": 0, "microbatch_tokens": 8},
        },
    }  # fmt: skip
    loaded = load_recipe({"name": "r", "model": {"path": "whet:tiny", "create": small}, "out": "run", "stages": stages})
    run, largest = Run(recipe=loaded.recipe, folder=Path("run")), dict.fromkeys(stages, 0)
    cut = engine.microbatches

    def noted(atoms: Sequence[Atom], budget: TokenBudget, *, together: bool) -> Iterator[list[Atom]]:
        for micro in cut(atoms, budget, together=together):
            at_work = next(name for name in stages if not list(Path("run/stages").glob(f"*-{name}/manifest.json")))
            largest[at_work] = max(largest[at_work], sum(atom.cost for atom in micro))
            yield micro

    monkeypatch.setattr(engine, "microbatches", noted)
    plan = {need.stage: need.microbatch_tokens for need in footprints(run, partial(seen_at_hand, run))}
    run_recipe(loaded, quiet=True)
    assert 15 + 2 * 9 < largest.pop("online") <= plan.pop("online"), "a prompt of 15 tokens, and several answers"
    assert plan == largest


def test_a_plan_asks_no_model_begins_no_environment_and_grades_no_gold_answer(tmp_path: Path) -> None:
    """A check does; whoever may be slow is not looked at for a plan, or not there yet."""
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"prompt": "6 x 7?", "answer": "\\frac{"}) + "\n")
    tasks = {"generate": "arithmetic", "count": 8}
    judge = {"kind": "judge", "name": "j", "model": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}}
    rl = {"kind": "rl", "tasks": tasks, "rewards": [{"kind": "verifier"}], "train": {"steps": 1}}
    stages = {
        "plain": rl,
        "graded": {**rl, "tasks": {"path": str(tmp_path / "tasks.jsonl")}, "rewards": [{"kind": "math"}]},
        "judged": {**rl, "rewards": [judge]},
        "played": {**rl, "environment": {"tools": [{"kind": "calculator"}]}},
    }
    loaded = load_recipe({"name": "r", "model": "whet:demo", "stages": stages})
    run = Run(recipe=loaded.recipe, folder=tmp_path / "run")
    found = {name: seen_at_hand(run, name) for name in stages}
    assert [name for name, seen in found.items() if seen is None] == ["judged", "played"]
    assert all(seen.prompt_tokens for seen in found.values() if seen is not None)
    with pytest.raises(DataError, match="frac"):
        check_recipe(loaded)


def test_a_model_with_routed_adapters_goes_on_training_them_alone(tmp_path: Path) -> None:
    demo, lora = ModelConfig(path="whet:demo"), LoraConfig(rank=3, routed=MarksConfig())
    load_model(demo, lora=lora).export(tmp_path / "routed")
    train = TrainConfig(microbatch_tokens=256)
    begun = footprint("", demo, train.model_copy(update={"lora": lora}), None)
    (goes_on,), (first,) = footprint("", demo.at(str(tmp_path / "routed")), train, None).roles, begun.roles
    assert goes_on.optimizer == pytest.approx(1.14 * first.optimizer, rel=1e-3)
    assert 0 < first.optimizer < footprint("", demo, train, None).optimizer / 5


def test_kept_prompts_are_in_the_plan_while_sampling_and_while_training(tmp_path: Path) -> None:
    """As many bytes as the engine may keep; what runs side by side has that much less of the cache."""
    train, sampling = TrainConfig(microbatch_tokens=256), SamplingConfig(max_running=8, max_tokens=32, cache_gib=0.25)
    once, turns = (footprint("rl", MODEL, train, sampling, goes_on=goes_on) for goes_on in (False, True))
    engine = Engine(load_model(MODEL), max_running=8, cache_bytes=2**28)
    kept = engine._prefixes.most_tokens * engine.plan.token_bytes
    assert kept > 0
    assert turns.work - once.work == pytest.approx(1.14 * kept, rel=1e-3)
    assert turns.cache - once.cache == pytest.approx(1.14 * kept, rel=1e-3)
    trainer = TrainerRanks(gpus=2)
    assert on_each_rank(turns, trainer).work == on_each_rank(once, trainer).work, "it is in the driver"
    assert with_samplers(turns, 1).work == with_samplers(once, 1).work, "or in the samplers"
    planned = []
    for limit in (1, 2):
        stage = {
            "kind": "rl", "tasks": {"generate": "arithmetic"}, "rewards": [{"kind": "verifier"}], "train": {"steps": 1},
            "environment": {"tools": [{"kind": "calculator"}], "limits": {"turns": limit}},
            "sampling": {"cache_gib": 0.25},
        }  # fmt: skip
        recipe = load_recipe({"name": "r", "model": "whet:demo", "stages": {"rl": stage}}).recipe
        planned += footprints(Run(recipe=recipe, folder=tmp_path))
    assert [need.roles[0].kept for need in planned] == [0, int(1.14 * 2**24)]
    full = sampling.model_copy(update={"max_running": 10**6})
    once, turns = (footprint("rl", MODEL, train, full, goes_on=goes_on) for goes_on in (False, True))
    assert turns.cache == pytest.approx(once.cache, rel=0.01), "rows make room"
