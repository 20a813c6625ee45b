"""What a run leaves loads elsewhere and computes the same; adapters, references, checkpointing and bfloat16 in runs."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.support import logps_of
from whet.algorithms.sft import CrossEntropy, weigh
from whet.config import CreateConfig, LoraConfig, ModelConfig, SamplingConfig, TrainConfig
from whet.config.loading import load_recipe
from whet.errors import ConfigError, ModelError
from whet.files import read_json, write_json
from whet.launch.main import run_recipe
from whet.launch.world import LocalWorld
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.models.tokenizer import load_tokenizer
from whet.records import Message, TokenRow
from whet.sampling.weight_sync import base_weights
from whet.tracking.log import read_metrics
from whet.training.engine import LocalTrainer

SHAPE = CreateConfig(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, max_length=128)
SFT = """
    kind: sft
    data: {generate: arithmetic, count: 24, digits: 1}
    train: {lr: 0.02, batch_size: 8, steps: 4}
"""
RL = """
    kind: rl
    tasks: {generate: arithmetic, count: 24, digits: 1}
    rewards: [{kind: verifier}, {kind: overlong, cache_tokens: 10}]
    algorithm: grpo
    max_gap: 0.2  # the adapters' dropout is in the trainer alone
    prompts_per_step: 4
    rollouts_per_prompt: 4
    sampling: {max_tokens: 12}
    train: {lr: 0.01, steps: 3}
"""
LORA = "{rank: 4, dropout: 0.1}"
PROBE = tuple(range(3, 40))
ROW = TokenRow(tokens=PROBE, trained=(False, *[True] * (len(PROBE) - 1)))


def run(folder: Path, body: str, *words: str, model: str | None = None) -> Path:
    """Run one stage and return its folder."""
    recipe = folder / "recipe.yaml"
    source = model or "whet:tiny"
    recipe.write_text(
        f'name: one\nmodel: {{path: "{source}", create: {SHAPE.model_dump_json()}}}\nstages:\n  stage: {body}'
    )
    run_recipe(load_recipe(recipe, [f"out={folder / 'run'}", *words]), quiet=True)
    return folder / "run" / "stages" / "01-stage"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model directory made by a run of full fine-tuning."""
    return str(run(tmp_path_factory.mktemp("base"), SFT, "stages.stage.train.steps=2") / "model")


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The log-probabilities that the model in memory gave just before it was exported; its weights are untouched."""
    found: list[torch.Tensor] = []
    export = LanguageModel.export

    def watched(self: LanguageModel, folder: Path) -> None:
        before = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        found.append(logps(self))
        export(self, folder)
        assert all(torch.equal(p, before[name]) for name, p in self.module.named_parameters())
        assert torch.equal(logps(self), found[-1])

    monkeypatch.setattr(LanguageModel, "export", watched)
    return found


def logps(model: LanguageModel) -> torch.Tensor:
    """log p of the probe's tokens, by whet's own forward."""
    model.module.eval()
    (values,) = logps_of(LocalTrainer(model, TrainConfig()), [ROW])
    return torch.tensor(values)


def by_transformers(module: Any) -> torch.Tensor:
    """The same by transformers' forward."""
    tokens = torch.tensor([PROBE])
    with torch.no_grad():
        logp = module.eval()(input_ids=tokens).logits[0].log_softmax(-1)
    return logp[:-1].gather(-1, tokens[0, 1:, None]).squeeze(-1)


WHOLE = "modules_to_save: [embed_tokens, lm_head]"


@pytest.mark.parametrize(
    ("body", "lora"),
    [
        *((body, lora) for body in (SFT, RL) for lora in (None, LORA)),
        *((SFT, f"{{rank: 4, {more}}}") for more in ("rslora: true", "dora: true", "dora: true, rslora: true", WHOLE)),
    ],
)
def test_an_exported_model_computes_what_was_trained(
    base: str, exported: list[torch.Tensor], body: str, lora: str | None, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = [] if lora is None else [f"stages.stage.train.lora={lora}"]
    folder = run(tmp_path, body, *words, model=base) / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    (expected,) = exported
    torch.testing.assert_close(by_transformers(loaded), expected, atol=1e-5, rtol=0)
    start = AutoModelForCausalLM.from_pretrained(base)
    assert (by_transformers(start) - expected).abs().max() > 1e-3
    assert loaded.state_dict().keys() == start.state_dict().keys()
    if lora is not None:
        adapted = PeftModel.from_pretrained(start, folder / "adapter")
        torch.testing.assert_close(by_transformers(adapted), expected, atol=1e-5, rtol=0)
    messages = [Message(role="user", content="1+2")]
    template = LocalWorld().template(ModelConfig(path=str(folder)))
    plain = [{"role": "user", "content": "1+2"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shown = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)
    assert tuple(shown["input_ids"]) == template.prompt(messages)
    assert tokenizer.eos_token_id in template.stop_ids


@pytest.mark.parametrize("lora", [None, f"{{rank: 4, {WHOLE}}}", f"{{rank: 4, dora: true, rslora: true, {WHOLE}}}"])
def test_new_tokens_are_learned_and_transformers_gives_an_export_the_logged_held_out_loss(
    base: str, lora: str | None, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    published = shutil.copytree(base, tmp_path / "published")
    config = json.loads((published / "config.json").read_text())
    del config["whet_template"]
    (published / "config.json").write_text(json.dumps(config))
    pairs = [(str(n), f"<plan>{n}+1</plan>{n + 1}") for n in range(8)]
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    words = [f"stages.stage.data={rows}", f"stages.stage.eval_data={rows}", "model.add_tokens=['<plan>', '</plan>']"]
    words += [] if lora is None else [f"stages.stage.train.lora={lora}"]
    folder = run(tmp_path, SFT, *words, model=str(published))
    tokenizer, model = (kind.from_pretrained(folder / "model") for kind in (AutoTokenizer, AutoModelForCausalLM))
    new = tokenizer("<plan></plan>", add_special_tokens=False)["input_ids"]
    before = AutoModelForCausalLM.from_pretrained(published)
    assert new == [before.config.vocab_size, before.config.vocab_size + 1] and model.config.vocab_size == new[1] + 1
    spelled = AutoTokenizer.from_pretrained(published)("<plan>", add_special_tokens=False)["input_ids"]
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        start, learned = (getattr(each, layer)().weight for each in (before, model))
        assert (learned[new[0]] - start[spelled].mean(0)).abs().max() > 0.01, "it began there, and was trained"
    nats, count = 0.0, 0
    for chat in chats:
        shown = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        tokens, mask = torch.tensor([shown["input_ids"]]), torch.tensor(shown["assistant_masks"][1:]).bool()
        with torch.no_grad():
            logp = model.eval()(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])
        nats, count = nats - float(logp[mask].sum()), count + int(mask.sum())
    assert nats / count == pytest.approx(read_metrics(folder)[-1]["eval_loss"], abs=1e-5)


def test_new_tokens_that_would_not_be_trained_or_not_belong_are_refused(base: str, tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, modules_to_save=["embed_tokens"])
    with pytest.raises(ModelError, match=r"add_tokens: .* set train.lora.modules_to_save: \[embed_tokens, lm_head\]"):
        load_model(ModelConfig(path="whet:demo", add_tokens=("<plan>",)), lora=lora)
    with pytest.raises(ModelError, match="modules_to_save: no module is called 'head_lm'"):
        load_model(ModelConfig(path="whet:demo"), lora=LoraConfig(rank=2, modules_to_save=["head_lm"]))
    with pytest.raises(ModelError, match="was trained with a tokenizer without '<plan>'"):
        load_tokenizer(ModelConfig(path=base, add_tokens=("<plan>",)))
    known = ModelConfig(path=base, add_tokens=("</think>",))
    assert len(load_tokenizer(known)) == len(load_tokenizer(ModelConfig(path=base))), "it has that one already"
    new = ModelConfig(path="whet:demo", add_tokens=("<plan>",))
    with pytest.raises(ConfigError, match="add_tokens: vllm reads whet:demo as it is, without '<plan>'"):
        LocalWorld().policy(new, TrainConfig(), SamplingConfig(engine="vllm"))


def test_a_trained_model_keeps_its_chat_template(base: str, tmp_path: Path) -> None:
    """Another one is refused with the first line that differs, and so is a file that was changed."""
    own = (Path(base) / "chat_template.jinja").read_text()
    same, other = tmp_path / "same.jinja", tmp_path / "other.jinja"
    same.write_text(own)
    other.write_text(f"{{{{ 1 }}}}\n{own}")
    assert load_tokenizer(ModelConfig(path=base, chat_template=same)).chat_template == own
    with pytest.raises(ModelError, match=r"was trained with another chat template than .*other.jinja \(line 1 is "):
        load_tokenizer(ModelConfig(path=base, chat_template=other))
    assert load_tokenizer(ModelConfig(path="whet:demo", chat_template=other)).chat_template.startswith("{{ 1 }}")
    changed = shutil.copytree(base, tmp_path / "changed")
    (changed / "chat_template.jinja").write_text(other.read_text())
    with pytest.raises(ModelError, match=r"than its folder has \(line 1 is .* and '{{ 1 }}' here\); put that back"):
        load_tokenizer(ModelConfig(path=str(changed)))
    assert load_tokenizer(ModelConfig(path=str(changed), chat_template=same)).chat_template == own
    config = read_json(changed / "config.json")
    write_json(changed / "config.json", {**config, "whet_template": hashlib.sha256(own.encode()).hexdigest()})
    with pytest.raises(ModelError, match="than its folder has"):
        load_tokenizer(ModelConfig(path=str(changed)))
    (changed / "chat_template.jinja").write_text(own)
    assert load_tokenizer(ModelConfig(path=str(changed))).chat_template == own, "of an earlier whet: a digest"


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, dropout=0.5)], ids=["full", "lora"])
def test_the_reference_is_where_training_started(base: str, lora: LoraConfig | None) -> None:
    """Exactly so, before any step; after steps it still is, and the policy is elsewhere."""
    train = TrainConfig(lora=lora, lr=0.05)
    policy = LocalWorld().policy(ModelConfig(path=base), train, SamplingConfig(), reference=True)
    (own,) = logps_of(policy.trainer, [ROW], temperature=0.8)
    (reference,) = logps_of(policy.trainer, [ROW], temperature=0.8, frozen="reference")
    assert own == reference
    for _ in range(2):
        policy.trainer.forward_backward(weigh([ROW]), CrossEntropy())
        policy.trainer.optim_step(1.0)
    assert logps_of(policy.trainer, [ROW], temperature=0.8, frozen="reference") == [reference]
    (moved,) = logps_of(policy.trainer, [ROW], temperature=0.8)
    assert max(abs(a - b) for a, b in zip(moved, reference, strict=True)) > 0.1


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_modules_that_are_trained_whole_are_exported_and_the_reference_is_without_them(
    base: str, whole: list[str], tmp_path: Path
) -> None:
    """The base's head is tied: what is named is trained alone, and written apart."""
    lora = LoraConfig(rank=2, targets=["q_proj"], modules_to_save=whole)
    policy = LocalWorld().policy(ModelConfig(path=base), TrainConfig(lora=lora, lr=0.05), SamplingConfig())
    trained = [name for name in policy.trainer.model.parameters if ".modules_to_save." in name]  # type: ignore[attr-defined]
    assert len(trained) == len(whole)
    (start,) = logps_of(policy.trainer, [ROW])
    policy.trainer.forward_backward(weigh([ROW]), CrossEntropy())
    policy.trainer.optim_step(1.0)
    (moved,) = logps_of(policy.trainer, [ROW])
    assert max(abs(a - b) for a, b in zip(start, moved, strict=True)) > 0.1
    assert logps_of(policy.trainer, [ROW], frozen="reference") == [start]
    policy.trainer.export(tmp_path / "made")
    again = LocalWorld().policy(ModelConfig(path=str(tmp_path / "made")), TrainConfig(), SamplingConfig())
    assert logps_of(again.trainer, [ROW])[0] == pytest.approx(moved, abs=1e-5)
    with pytest.raises(ConfigError, match="modules_to_save: vLLM takes adapters alone"):
        list(base_weights(policy.trainer.model))  # type: ignore[attr-defined]


@pytest.mark.parametrize("lora", ["null", LORA], ids=["full", "lora"])
def test_the_kl_of_a_run_starts_at_zero(base: str, lora: str, tmp_path: Path) -> None:
    lines = read_metrics(run(tmp_path, RL, f"stages.stage.train.lora={lora}", model=base))
    kls = [line["kl"] for line in lines]
    assert abs(kls[0] or 0) < 1e-7
    assert all(kl is not None and kl > 1e-5 for kl in kls[1:])


@pytest.mark.parametrize("lora", ["null", "{rank: 4}"], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_number_of_a_run(lora: str, tmp_path: Path) -> None:
    runs = []
    for flag in ("false", "true"):
        (tmp_path / flag).mkdir()
        words = [f"stages.stage.train.gradient_checkpointing={flag}", f"stages.stage.train.lora={lora}"]
        runs.append(read_metrics(run(tmp_path / flag, SFT, *words)))
    for plain, checkpointed in zip(*runs, strict=True):
        assert checkpointed["loss"] == pytest.approx(plain["loss"], abs=1e-6)
        assert checkpointed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("body", [SFT, RL], ids=["sft", "rl"])
def test_bfloat16_computes_in_it_and_keeps_float32_weights(base: str, body: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = run(tmp_path, body, "model.dtype=bfloat16", model=base)
    (tmp_path / "exact").mkdir()
    exact = run(tmp_path / "exact", body, "model.dtype=float32", model=base)
    first, reference = read_metrics(folder)[0], read_metrics(exact)[0]
    assert first["grad_norm"] != reference["grad_norm"]
    assert first["loss"] == pytest.approx(reference["loss"], rel=0.02, abs=0.02)
    assert all(math.isfinite(line["grad_norm"] or 0) for line in read_metrics(folder))
    if body == RL:
        assert 0 < (first["sampling/logp_gap_mean"] or 0) < 0.05
    weights = load_file(folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert json.loads((folder / "model" / "config.json").read_text())["dtype"] == "float32"
