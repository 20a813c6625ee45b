"""The plan's memory: what is rehearsed without content is what a real step takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from whet.config import CreateConfig, LoraConfig, ModelConfig, SamplingConfig, TrainConfig
from whet.launch.memory import Footprint, footprint

SHAPE = CreateConfig(hidden_size=256, layers=4, heads=4, kv_heads=2, intermediate_size=768)
MODEL = ModelConfig(path="whet:tiny", create=SHAPE)
MEASURE = """
import json, resource, sys
from whet.config import ModelConfig, TrainConfig
from whet.launch.memory import _full_microbatch, footprint
from whet.models.load import load_model
from whet.models.machine import give_memory_back
from whet.training.optim import Optimizers

give_memory_back()
model, train = ModelConfig.model_validate(json.loads(sys.argv[1])), TrainConfig.model_validate(json.loads(sys.argv[2]))
planned = footprint("", model, train, None)
language = load_model(model, lora=train.lora, checkpointing=train.gradient_checkpointing)
language.module.train()
optimizers = Optimizers(language.parameters, train)
batch = _full_microbatch(train.microbatch_tokens, with_entropy=False)
for _ in range(2):
    batch.run(language)
    optimizers.step(lr=1e-4, muon_lr=1e-3)
print(planned.peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"lora": {"rank": 4}}])
def test_the_plan_is_within_ten_percent_of_a_real_step(change: dict[str, object]) -> None:
    train = TrainConfig.model_validate({"microbatch_tokens": 6144, **change})
    words = [sys.executable, "-c", MEASURE, MODEL.model_dump_json(), train.model_dump_json()]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    planned, real = map(int, done.stdout.split())
    assert abs(planned / real - 1) < 0.1, (planned, real)


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
    few, many = (footprint("eval", MODEL, None, SamplingConfig(max_running=n)) for n in (8, 64))
    assert few.cache > 0
    assert many.cache == pytest.approx(8 * few.cache, rel=1e-6)
    assert few.optimizer == few.work == 0


def test_a_stage_that_does_not_fit_says_what_to_change() -> None:
    roomy = Footprint(
        stage="sft", microbatch_tokens=16384, process=1, weights=1, optimizer=2, work=9, cache=0, available=20
    )
    assert roomy.advice == ""
    tight = Footprint(**{**json.loads(json.dumps(_fields(roomy))), "available": 5})
    assert tight.advice.startswith("does not fit; try train.microbatch_tokens=4096")


def _fields(footprint_: Footprint) -> dict[str, object]:
    return {name: getattr(footprint_, name) for name in Footprint.__dataclass_fields__}
