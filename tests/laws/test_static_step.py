"""The decode step of one shape computes what the step of changing shape does, and a bad recording is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import whet.sampling.cuda_graph
import whet.sampling.engine
from tests.laws.support import answers_of, tiny_model
from whet.config import ModelConfig
from whet.models.create import byte_tokenizer
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.records import Completion
from whet.sampling.base import Request, SamplingParams
from whet.sampling.cuda_graph import RecordedStep, Run, StaticStep, Step
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.engine import Engine
from whet.sampling.forward import Forward
from whet.sampling.kv_cache import Slab
from whet.sampling.tickets import EagerStep

STOP = frozenset(range(200, 230))
"""So many that an answer ends by itself after some nine tokens."""
ASKED = [
    Request(
        prompt=tuple(range(3, 3 + length)),
        seed=100 * length + number,
        params=SamplingParams(max_tokens=30 - number, stop_ids=STOP),
    )
    for length in (1, 17, 5, 40)
    for number in range(4)
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Weights far larger than at the start of training, so that attention and the head have opinions."""
    found = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        for p in found.module.parameters():
            p.mul_(8 if p.ndim == 2 else 1)
    return found


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whet.sampling.cuda_graph, "BUCKET", 16)
    monkeypatch.setattr(whet.sampling.engine, "BUCKET", 16)


def step_with(monkeypatch: pytest.MonkeyPatch, record: Callable[[Run], Run], made: list[Slab] | None = None) -> None:
    """Step as on a GPU: one slab, and a recorded step for each bucket of its columns."""

    def step(forward: Forward, device: torch.device, *, plain: bool) -> Step:
        def static(slab: Slab) -> StaticStep:
            if made is not None:
                made.append(slab)
            return StaticStep(forward, slab, device)

        return RecordedStep(EagerStep(forward), static, record)

    monkeypatch.setattr(whet.sampling.engine, "step_of", step)
    monkeypatch.setattr(Engine, "one_width", True)


def as_it_is(run: Run) -> Run:
    return run


def assert_equal(found: list[Completion], expected: list[Completion]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("max_running", [1, 5, 64])
def test_the_static_step_samples_the_same(
    model: LanguageModel, max_running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come and go, slots are empty, columns pass from bucket to bucket and move to the front."""
    sampler = EmbeddedSampler(model, max_running=max_running)
    expected = answers_of(sampler, ASKED)
    slabs: list[Slab] = []
    step_with(monkeypatch, as_it_is, slabs)
    assert_equal(answers_of(sampler, ASKED), expected)
    assert slabs


def test_a_slot_without_a_row_keeps_no_nan_for_the_next_one(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third prompt's answers enter and leave at late columns; when all have left, columns begin again before them.

    Then one slot is empty beside the fourth prompt's three answers, until the fifth's two enter.
    """
    budgets = {tuple(range(3, 23)): (20, 20), (30,): (10, 10), (31,): (3, 3), (32,): (5, 20, 20), (33,): (9, 9)}
    asked = [
        Request(prompt=prompt, seed=number, params=SamplingParams(max_tokens=tokens))
        for prompt, each in budgets.items()
        for number, tokens in enumerate(each)
    ]
    sampler = EmbeddedSampler(model, max_running=4)
    expected = answers_of(sampler, asked)
    step_with(monkeypatch, as_it_is)
    assert_equal(answers_of(sampler, asked), expected)


def test_sliding_windows_too(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        "mistral", vocab_size=len(tokenizer), max_position_embeddings=128, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, sliding_window=12,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    sampler = EmbeddedSampler(load_model(ModelConfig(path=str(tmp_path))))
    assert {call.window for call in sampler.engine.plan.calls} == {12}
    expected = answers_of(sampler, ASKED)
    step_with(monkeypatch, as_it_is)
    assert_equal(answers_of(sampler, ASKED), expected)


def test_a_recording_that_agrees_is_used(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorded: list[int] = []

    def record(run: Run) -> Run:
        recorded.append(0)

        def replay() -> Tensor:
            recorded[-1] += 1
            return run()

        return replay

    asked = [replace(request, params=SamplingParams(max_tokens=30)) for request in ASKED]
    sampler = EmbeddedSampler(model)
    expected = answers_of(sampler, asked)
    step_with(monkeypatch, record)
    assert_equal(answers_of(sampler, asked), expected)
    assert not caplog.records
    assert len(recorded) == 3 and sum(recorded) == 29  # columns 40 to 68: three buckets, one replay for every step


def wrong(run: Run) -> Run:
    """Replays what was computed first, as a recording that reads other addresses would."""
    return lambda: run() + torch.linspace(0, 1, run().shape[-1])


def impossible(run: Run) -> Run:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(("record", "said"), [(wrong, "are off by"), (impossible, "could not be recorded")])
def test_a_recording_that_does_not_is_not(
    model: LanguageModel,
    record: Callable[[Run], Run],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampler = EmbeddedSampler(model)
    expected = answers_of(sampler, ASKED)
    step_with(monkeypatch, record)
    assert_equal(answers_of(sampler, ASKED), expected)
    (warning,) = caplog.records
    assert said in warning.getMessage()
