"""Engines for other models, one after the other, and a run that learns through one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.laws.support import answers_of
from tests.vllm.conftest import CACHE_GIB, disturb, largest_gap
from tests.vllm.test_hand_over import ASKED, TOLERANCE, WRONG
from whet.config import LoraConfig, ModelConfig
from whet.config.loading import load_recipe
from whet.errors import SamplerError
from whet.launch.main import run_recipe
from whet.models.create import byte_tokenizer
from whet.models.load import load_model
from whet.sampling.vllm import VllmSampler
from whet.tracking.log import read_metrics

pytestmark = pytest.mark.usefixtures("vllm")

RECIPE = """
name: demo-vllm
model: whet:demo
stages:
  sft:
    kind: sft
    data: {generate: arithmetic, bare: 0.7, count: 6400}
    train: {optimizer: muon, lr: 3.0e-3, muon_lr: 0.03, batch_size: 64, steps: 100, schedule: linear}
  rl:
    kind: rl
    tasks: {generate: arithmetic, count: 20000, seed: 1}
    rewards: [{kind: verifier, name: accuracy}, {kind: format, weight: 0.1}]
    algorithm: {preset: dapo, dynamic_sampling: {rounds: 1}}
    prompts_per_step: 32
    rollouts_per_prompt: 8
    sampling: {max_tokens: 40, engine: vllm, cache_gib: 0.25}
    train: {optimizer: muon, lr: 2.0e-4, muon_lr: 0.003, steps: 12}
"""


def test_adapters_are_handed_over_by_version() -> None:
    model = load_model(ModelConfig(path="whet:demo"), lora=LoraConfig(rank=5, rslora=True))
    sampler = VllmSampler(model, max_running=16, cache_gib=CACHE_GIB)
    assert largest_gap(model, ASKED, answers_of(sampler, ASKED)) < TOLERANCE
    for version in (1, 2, 3):
        disturb(model, size=0.05)
        assert largest_gap(model, ASKED, answers_of(sampler, ASKED)) > WRONG
        sampler.publish(version)
        answers = answers_of(sampler, ASKED)
        assert largest_gap(model, ASKED, answers) < TOLERANCE
        assert {answer.version for answer in answers} == {version}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_other_architectures_are_handed_over_too(kind: str, tmp_path: Path) -> None:
    """An untied head; biases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), max_position_embeddings=512, hidden_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path)))
    sampler = VllmSampler(model, max_running=16, cache_gib=CACHE_GIB)
    for version in (1, 2):
        disturb(model, size=0.1)
        assert largest_gap(model, ASKED, answers_of(sampler, ASKED)) > WRONG
        sampler.publish(version)
        assert largest_gap(model, ASKED, answers_of(sampler, ASKED)) < TOLERANCE


def test_one_engine_at_a_time() -> None:
    first = VllmSampler(load_model(ModelConfig(path="whet:demo")), max_running=4, cache_gib=CACHE_GIB)
    second = VllmSampler(load_model(ModelConfig(path="whet:demo")), max_running=4, cache_gib=CACHE_GIB)
    with pytest.raises(SamplerError, match="has ended"):
        raise answers_of(first, ASKED)[0]
    del first
    assert len(answers_of(second, ASKED)) == len(ASKED)


def test_a_run_learns_through_vllm(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run_recipe(load_recipe(tmp_path / "recipe.yaml", [f"out={tmp_path / 'run'}", "threads=1"]), quiet=True)
    (stage,) = (tmp_path / "run" / "stages").glob("*-rl")
    steps = read_metrics(stage)
    solved = [step["solved"] for step in steps]
    assert sum(solved[-3:]) / 3 > sum(solved[:3]) / 3 + 0.1, solved
    assert all(step["sampling/logp_gap_mean"] < 1e-4 for step in steps)
