"""Roles of tokens: where they stand, training on one of them, the angle between them, and adapters routed by them."""

from __future__ import annotations

import json
import math
import random
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.laws.support import answers_of
from tests.test_adapters import logps
from whet.algorithms.groups import only_roles, with_roles
from whet.algorithms.policy_loss import policy_loss
from whet.algorithms.roles import angle, norms_apart
from whet.config import LoraConfig, ModelConfig, PolicyConfig, RewardModelStage, SamplingConfig, TrainConfig
from whet.config.loading import load_recipe
from whet.config.train import MarksConfig
from whet.errors import ConfigError, ModelError
from whet.evals.interference import interference, logits
from whet.files import Digests
from whet.launch.main import run_recipe
from whet.launch.world import LocalWorld
from whet.models.language import LanguageModel
from whet.models.load import load_model, read_contents
from whet.models.marks import ADAPTERS, CALL, ROLES, RoleTable
from whet.records import Atom, Completion, TokenRow
from whet.sampling.base import Request, SamplingParams, run
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.tickets import Answers
from whet.sampling.weight_sync import probe_of, probe_request
from whet.tracking.log import read_metrics
from whet.training.engine import LocalTrainer

ROOT = Path(__file__).parent.parent
MARKS = MarksConfig(reasoning=("3", "4"), call=("1", "2"))
"""What the demo model, which adds numbers, writes often."""
LORA = LoraConfig(rank=3, routed=MARKS)
DEMO = ModelConfig(path="whet:demo")


def spoken(text: str, marks: MarksConfig) -> list[int]:
    """The role after each character, by the definition."""
    role, found = 0, []
    pairs = [marks.reasoning, marks.call]
    for end in range(1, len(text) + 1):
        so_far = text[:end]
        if role:
            role = 0 if so_far.endswith(pairs[role - 1][1]) else role
        else:
            role = next((n for n, (opens, _) in enumerate(pairs, start=1) if so_far.endswith(opens)), 0)
        found.append(role)
    return found


@pytest.mark.parametrize(
    "marks", [MARKS, MarksConfig(), MarksConfig(call=("<a>", "</a>"), reasoning=("<ab>", "</ab>"))]
)
def test_the_table_says_where_each_token_stands(marks: MarksConfig) -> None:
    """However tokens cut the marks; the end of a turn ends every role."""
    tokenizer = load_model(DEMO).tokenizer
    table, draw = RoleTable.of(tokenizer, len(tokenizer), marks.marks), random.Random(0)
    words = [*marks.reasoning, *marks.call, "<", "a", "1", ">", "ab", "</"]
    for _ in range(100):
        text = "".join(draw.choice(words) for _ in range(12))
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = np.cumsum([len(tokenizer.decode([token])) for token in tokens])
        of_text = spoken(text, marks)
        assert table.roles(np.array(tokens)).tolist() == [of_text[end - 1] for end in ends]
    inside = tokenizer(marks.call[0], add_special_tokens=False)["input_ids"]
    assert table.roles(np.array([*inside, tokenizer.eos_token_id])).tolist()[-2:] == [CALL, 0]


def test_a_token_is_trained_in_the_role_of_what_precedes_it() -> None:
    model = load_model(DEMO)
    table = RoleTable.of(model.tokenizer, model.vocabulary, MARKS.marks)
    tokens = model.tokenizer("5162738495", add_special_tokens=False)["input_ids"]
    row = TokenRow(tokens=tokens, trained=[False, *[True] * (len(tokens) - 1)], columns={"x": range(1, len(tokens))})
    row = with_roles(row, table)
    roles = [ROLES[role] for role in row.columns["role"].astype(int)]
    text = [model.tokenizer.decode([token]) for token in tokens[1:]]
    assert list(zip(text, roles, strict=True)) == [
        ("1", "answer"), ("6", "call"), ("2", "call"), ("7", "answer"), ("3", "answer"), ("8", "reasoning"),
        ("4", "reasoning"), ("9", "answer"), ("5", "answer"),
    ]  # fmt: skip
    calls = only_roles(row, [CALL])
    assert calls.trained.nonzero()[0].tolist() == [2, 3] and calls.columns["x"].tolist() == [2, 3]


# --------------------------------------------------------------------------------------------- two adapters


def moved(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """With adapters that do something: B is no longer 0."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.parameters.items():
            if ".lora_B." in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=draw))
    return model


def sampled(model: LanguageModel, count: int = 12) -> list[tuple[Request, Completion]]:
    draw = random.Random(1)
    prompts = [model.tokenizer.encode(f"{draw.randrange(999)}+{draw.randrange(999)}=") * length for length in (1, 9)]
    asked = [
        Request(
            prompt=prompts[n % 2], seed=n, params=SamplingParams(max_tokens=30, temperature=1.0), samples=count // 2
        )
        for n in range(count)
    ]
    return list(zip(asked, answers_of(EmbeddedSampler(model, max_running=8, cache_gib=1.0), asked), strict=True))


def gap(model: LanguageModel, answers: list[tuple[Request, Completion]]) -> float:
    """Largest difference of a log-probability between trainer and sampler; prompts are shared in the stream."""
    rows = []
    for request, written in answers:
        tokens, prompt = [*request.prompt, *written.tokens.tolist()], len(request.prompt)
        rows.append(TokenRow(tokens=tokens, trained=np.arange(len(tokens)) >= prompt, shared=prompt))
    read = LocalTrainer(model, TrainConfig()).forward(rows, "logp")["logp"]
    return max(float(np.abs(a - w.logprobs).max()) for a, (_, w) in zip(read, answers, strict=True))


def test_trainer_and_sampler_send_each_token_through_the_same_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a route that is late by one token is seen by the gate between them."""
    model = moved(load_model(DEMO, lora=LORA))
    answers = sampled(model)
    table = RoleTable.of(model.tokenizer, model.vocabulary, MARKS.marks)
    met = {int(role) for _, written in answers for role in table.roles(written.tokens)}
    assert met == {0, 1, 2}, "the test meets every role"
    assert gap(model, answers) < 1e-4
    right = Answers.route

    def late(self: Answers, line_S: torch.Tensor) -> None:
        now = self.marks
        self.marks = getattr(self, "before", now)
        self.before = now.clone()  # type: ignore[attr-defined]
        right(self, line_S if len(self.marks) == len(now) else line_S * 0)
        self.marks = now

    monkeypatch.setattr(Answers, "route", late)
    assert gap(model, sampled(model)) > 0.05


def test_the_probe_of_a_hand_over_goes_through_the_adapters_of_its_tokens() -> None:
    """Else samplers in processes of their own would be killed for log-probabilities that are right."""
    prompt = load_model(DEMO).tokenizer.decode(list(probe_request(load_model(DEMO)).prompt))
    marks = MarksConfig(reasoning=("q", "z"), call=(prompt[2], "y"))
    model = moved(load_model(DEMO, lora=LORA.model_copy(update={"routed": marks})))
    sampler = EmbeddedSampler(model, max_running=1)
    probe = run(probe_of(sampler, model))
    assert probe.gaps(run(sampler.sample(probe.request))).max() < 1e-4


def test_without_calls_two_adapters_are_one_bit_for_bit() -> None:
    """The text never opens a call, so all of it passes through the first adapter, as through a plain one."""
    never = LORA.model_copy(update={"routed": MarksConfig(reasoning=("q", "z"), call=("x", "y"))})
    plain, routed = (moved(load_model(DEMO, lora=lora)) for lora in (LORA.model_copy(update={"routed": None}), never))
    with torch.no_grad():
        for name, p in plain.parameters.items():
            routed.parameters[name.replace(".default.", f".{ADAPTERS[0]}.")].copy_(p)
    assert torch.equal(logps(plain), logps(routed))
    for (_, one), (_, other) in zip(sampled(plain), sampled(routed), strict=True):
        assert one == other


def test_each_adapter_learns_from_its_own_tokens_through_its_own_products() -> None:
    """The last token's loss reaches the adapter that it passed through; the other one by attention alone."""
    model = moved(load_model(DEMO, lora=LORA))
    tokens = model.tokenizer("71555555", add_special_tokens=False)["input_ids"]
    row = TokenRow(tokens=tokens, trained=[False] * (len(tokens) - 1) + [True], columns={"weight": [1.0]})
    packed = model.packed([Atom(rows=(row,))])
    assert packed.role_N is not None and packed.role_N.tolist() == [0, *[CALL] * (len(tokens) - 1)]
    model.module.zero_grad()
    model.logp_at(model.stream(packed)[packed.source_T], packed.target_T, temperature=1.0)[0].sum().backward()
    grads = {name: float(p.grad.norm()) for name, p in model.parameters.items() if p.grad is not None}
    last = max(int(found[1]) for name in grads if (found := re.search(r"layers\.(\d+)\.", name)))
    through = {adapter: grads[f"model.layers.{last}.mlp.down_proj.lora_B.{adapter}.weight"] for adapter in ADAPTERS}
    assert through["act"] > 0 and through["reason"] == 0.0
    assert grads[f"model.layers.{last}.self_attn.v_proj.lora_B.reason.weight"] > 0


def test_routed_adapters_are_exported_apart_and_loaded_again(tmp_path: Path) -> None:
    model = moved(load_model(DEMO, lora=LORA))
    expected = logps(model)
    model.export(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model" / "adapter").iterdir() if path.is_dir()) == sorted(ADAPTERS)
    again = ModelConfig(path=str(tmp_path / "model"))
    loaded = load_model(again)
    assert loaded.routing is not None and loaded.routing.marks["call"] == MARKS.call
    torch.testing.assert_close(logps(loaded), expected)
    assert gap(loaded, sampled(loaded)) < 1e-4
    before = read_contents(again, Digests())
    assert any(name.startswith("adapter/act/") for name in before["files"])
    moved(loaded, seed=1).export(tmp_path / "model")
    assert read_contents(again, Digests()) != before
    for lora, why in ((LORA, "go on being trained"), (LoraConfig(rank=2), "go on being trained")):
        with pytest.raises(ModelError, match=why):
            load_model(again, lora=lora)
    with pytest.raises(ModelError, match="the output head cannot be routed"):
        load_model(DEMO, lora=LORA.model_copy(update={"targets": ["q_proj", "lm_head"]}))
    with pytest.raises(ModelError, match="vLLM sends no tokens through two adapters"):
        LocalWorld().policy(again, TrainConfig(), SamplingConfig(engine="vllm")).sampler  # noqa: B018


# ------------------------------------------------------------------------------------------------- gradients


def test_the_angle_between_the_gradients_of_roles() -> None:
    """From norms alone, and of a model from the gradients themselves; nothing is stepped."""
    assert angle(math.sqrt(2), 1, 1) == pytest.approx(90) and angle(2, 1, 1) == pytest.approx(0)
    assert angle(0, 1, 1) == pytest.approx(180) and math.isnan(angle(1, 0, 1))
    model = load_model(DEMO)
    trainer = LocalTrainer(model, TrainConfig())
    tokens = model.tokenizer("7155265381", add_special_tokens=False)["input_ids"]
    row = TokenRow(tokens=tokens, trained=[False, *[True] * (len(tokens) - 1)])
    row = with_roles(row, RoleTable.of(model.tokenizer, model.vocabulary, MARKS.marks))
    logp = trainer.forward([row], "logp")["logp"][0]
    row = row.with_columns(sampler_logp=logp, weight=0.1, advantage=np.linspace(-1, 1, len(logp)))
    atoms, objective = [Atom(rows=(row,))], policy_loss(PolicyConfig())
    start = {name: p.detach().clone() for name, p in model.parameters.items()}
    grads = []
    for calls in (True, False):
        of = row.with_columns(weight=row.columns["weight"] * ((row.columns["role"] == CALL) == calls))
        trainer.forward_backward([Atom(rows=(of,))], objective)
        grads.append(torch.cat([p.grad.flatten().clone() for p in model.parameters.values() if p.grad is not None]))
        trainer.optim_step(None)
    norms = norms_apart(trainer, atoms, objective)
    assert norms == pytest.approx([float(grad.norm()) for grad in grads], rel=1e-3)
    trainer.forward_backward(atoms, objective)
    whole = trainer.optim_step(None).grad_norm
    expected = math.degrees(math.acos(torch.cosine_similarity(*grads, dim=0)))
    assert angle(whole, *norms) == pytest.approx(expected, abs=0.1)
    assert all(torch.equal(p, start[name]) for name, p in model.parameters.items())


def test_the_interaction_is_what_both_give_beyond_the_sum() -> None:
    """In logits; a question that is wholly right or wrong stands half a sample away from that."""
    z = logits([[1, 1, 1, 0], [1] * 4, [0] * 4, [1, 0]])
    assert z == pytest.approx([math.log(3), math.log(7), -math.log(7), 0.0])
    half, most = (1, 0, 1, 0), (1, 1, 1, 0)
    asked = {"a": half, "b": half}
    found = interference({**asked, "c": half}, {"a": most, "b": half}, {"a": most, "b": half}, {"a": most, "b": most})
    assert found["questions"] == 2
    assert found["mean"] == pytest.approx((-math.log(3) + math.log(3)) / 2)
    assert (found["below"], found["above"]) == (0.5, 0.5)
    assert (found["mean_low"], found["mean_high"]) == pytest.approx((-math.log(3), math.log(3)))
    with pytest.raises(ValueError, match="no scored task in common"):
        interference({"a": half}, {"b": half}, asked, asked)


def test_a_run_trains_one_role_through_two_adapters(tmp_path: Path) -> None:
    """The metrics of each role are there, the other adapter stays as it was, and an evaluation loads both."""
    (tmp_path / "recipe.yaml").write_text(f"""
name: roles
model: whet:demo
stages:
  rl:
    kind: rl
    tasks: {{generate: arithmetic, count: 24, digits: 2}}
    rewards: [{{kind: verifier}}]
    algorithm: grpo
    prompts_per_step: 4
    rollouts_per_prompt: 8
    sampling: {{max_tokens: 12}}
    train:
      lr: 0.01
      steps: 2
      lora: {{rank: 2, routed: {json.dumps(MARKS.model_dump())}}}
      roles: {{only: [call], angle: true, reasoning: ["3", "4"], call: ["1", "2"]}}
  eval:
    kind: eval
    tasks: {{generate: arithmetic, count: 8, digits: 2, split: test}}
    samples: 1
    sampling: {{max_tokens: 12}}
""")
    run_recipe(load_recipe(tmp_path / "recipe.yaml", [f"out={tmp_path / 'run'}"]), quiet=True)
    (_, last) = read_metrics(tmp_path / "run" / "stages" / "01-rl")
    assert sum(last[f"roles/{role}/share"] for role in ROLES) == pytest.approx(1)
    assert last["roles/call/share"] == 1.0, "the others are context"
    loaded = load_model(ModelConfig(path=str(tmp_path / "run" / "stages" / "01-rl" / "model")))
    assert loaded.routing is not None
    table = json.loads((tmp_path / "run" / "stages" / "02-eval" / "eval.json").read_text())
    assert table["rows"][0]["tasks"] == 8


RL = """
name: roles
model: whet:demo
stages:
  rl:
    kind: rl
    tasks: {generate: arithmetic, count: 24, digits: 2}
    rewards: [{kind: verifier}]
    prompts_per_step: 2
    rollouts_per_prompt: 4
    sampling: {max_tokens: 6}
    algorithm: {preset: ppo}
    train: {lr: 0.001, steps: 1, roles: {only: [call], call: ["x", "y"]}}
"""


def test_a_critic_learns_the_values_of_all_tokens(tmp_path: Path) -> None:
    """Also of those that the policy is not trained on, and where it is trained on none."""
    (tmp_path / "recipe.yaml").write_text(RL)
    run_recipe(load_recipe(tmp_path / "recipe.yaml", [f"out={tmp_path / 'run'}"]), quiet=True)
    (first,) = read_metrics(tmp_path / "run" / "stages" / "01-rl")
    assert first["optimizer_steps"] == 0 and first["value/optimizer_steps"] > 0 and first["value/loss"] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("algorithm.critic.share_trunk=true", "set share_trunk: false"),
        ("train.roles.angle=true algorithm.ptx.data.path=rows.jsonl algorithm.ptx.coefficient=1", "or algorithm.ptx"),
        ("train.lora.routed.call=[a,b]", "give both the same"),
    ],
)
def test_roles_that_would_do_something_else_are_refused(words: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RL)
    with pytest.raises(ConfigError, match=told):
        load_recipe(tmp_path / "recipe.yaml", [f"stages.rl.{word}" for word in words.split()])
    with pytest.raises(ValueError, match="models that write calls"):
        RewardModelStage(kind="reward_model", data={"path": "rows.jsonl"}, train={"lora": {"routed": {}}})  # type: ignore[arg-type]


def test_the_recipe_measures_whether_the_two_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`agent_roles.yaml` at a small size: four ways of training, and an evaluation that names their interaction."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "recipes")
    runpy.run_path("recipes/agent_roles.py")["write"](tmp_path, demonstrations=8, tasks=4, held_out=2)
    rl = ["prompts_per_step=2", "rollouts_per_prompt=2", "train.steps=1", f"tasks.path={tmp_path / 'tasks.jsonl'}"]
    small = {
        "sft": ["train.batch_size=4", "train.steps=1", f"data.path={tmp_path / 'demonstrations.jsonl'}"],
        **dict.fromkeys(("both", "calls", "rest", "routed"), rl),
        "eval": ["samples=2", f"tasks.path={tmp_path / 'held_out.jsonl'}"],
    }
    words = [f"stages.{name}.{word}" for name, asked in small.items() for word in asked]
    loaded = load_recipe(Path("recipes/agent_roles.yaml"), [*words, f"out={tmp_path / 'run'}"])
    assert list(loaded.recipe.stages) == list(small)
    run_recipe(loaded, quiet=True)
    table = json.loads((tmp_path / "run" / "stages" / "06-eval" / "eval.json").read_text())
    assert [row["label"] for row in table["rows"]] == ["sft", "calls", "rest", "both", "routed"]
    assert table["interference"]["questions"] == 2
