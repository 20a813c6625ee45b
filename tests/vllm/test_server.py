"""A real `vLLM` server in a process of its own: the same promises over HTTP, and weights in the middle of answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.laws.support import answers_of
from tests.vllm.conftest import disturb, largest_gap, logps_in, serving
from tests.vllm.test_hand_over import ASKED, LONG, TOLERANCE, WRONG
from whet.config import LoraConfig, ModelConfig
from whet.errors import ConfigError, SamplerError
from whet.models.create import byte_tokenizer
from whet.models.load import load_model
from whet.records import Completion
from whet.sampling.base import LoopThread, Request, SamplingParams
from whet.sampling.vllm_flags import SERVER_FLAGS
from whet.sampling.vllm_server import VllmServerSampler

pytestmark = pytest.mark.usefixtures("vllm")

FLAGS = (
    f"{' '.join(SERVER_FLAGS)} --no-enable-chunked-prefill --max-num-batched-tokens 8192 --max-num-seqs 32 "
    "--enable-lora --max-lora-rank 8 --max-loras 2"
)


@pytest.fixture(scope="module")
def folder(vllm: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose head is tied to its embeddings, of which vLLM has a packed copy on a CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("model")
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=512, hidden_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with serving(folder, FLAGS, VLLM_SERVER_DEV_MODE="1", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as url:
        yield url


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def connect(server: str, folder: Path, lora: LoraConfig | None = None) -> VllmServerSampler:
    return VllmServerSampler(load_model(ModelConfig(path=str(folder)), lora=lora), [server], max_running=32)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=5, rslora=True)])
def test_versions_are_handed_over_to_a_server(server: str, folder: Path, lora: LoraConfig | None) -> None:
    sampler = connect(server, folder, lora)
    model = sampler.model
    for version in (1, 2, 3):
        disturb(model, size=0.1)
        assert largest_gap(model, ASKED, whole(sampler)) > WRONG
        sampler.publish(version)
        answers = whole(sampler)
        assert largest_gap(model, ASKED, answers) < TOLERANCE
        assert {(answer.version, answer.later) for answer in answers} == {(version, ())}
    newer = connect(server, folder)
    with pytest.raises(SamplerError, match="is another run using this server"):
        raise answers_of(sampler, ASKED)[0]
    assert len(whole(newer)) == len(ASKED)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_weights_come_in_the_middle_of_answers_which_say_from_which_token_on(
    server: str, folder: Path, lora: LoraConfig | None
) -> None:
    """The pause keeps them: before the span vLLM wrote what the old weights write, and as many tokens as were asked.

    An adapter is kept by what began with it.
    """
    sampler = connect(server, folder, lora)
    model = sampler.model
    disturb(model, size=0.1)
    sampler.publish(1)
    asked = [Request(prompt=LONG, seed=seed, params=SamplingParams(max_tokens=200)) for seed in range(4)]
    old = whole(sampler, asked)
    old_logps = logps_in(model, asked, old)

    async def across() -> list[Completion]:
        running = [asyncio.ensure_future(sampler.sample(request)) for request in asked]
        while len(sampler._servers[0].owed) < len(asked):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        disturb(model, size=0.1)
        await asyncio.to_thread(sampler.publish, 2)
        return await asyncio.gather(*running)

    answers = asyncio.run(across())
    assert {len(answer.tokens) for answer in answers} == {200}
    for answer, before, logps in zip(answers, old, old_logps, strict=True):
        assert answer.version == 1
        if lora is None:
            ((first, version),) = answer.later
            assert version == 2 and 0 < first < 200
        else:
            first = 200
            assert not answer.later
        assert (answer.tokens[:first] == before.tokens[:first]).all()
        np.testing.assert_allclose(answer.logprobs[:first], logps[:first], rtol=0, atol=TOLERANCE)
        assert (answer.tokens[first:] != before.tokens[first:]).any() or lora is not None
    fresh = whole(sampler, asked)
    assert {answer.version for answer in fresh} == {2}
    assert largest_gap(model, asked, fresh) < TOLERANCE, "what came later read nothing that was cached before"


def test_a_file_with_another_digest_is_refused_and_the_server_goes_on_with_what_it_has(
    server: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = connect(server, folder)
    before = whole(sampler)
    digests = sampler._files._digests
    sampler._files.whole(f"{sampler._name}-1")
    digests[f"{sampler._name}-1"] = "0" * 64
    with pytest.raises(SamplerError, match=r"refuses weights: .*the digest .* handed over 000000000000"):
        sampler.publish(1)
    assert httpx.get(f"{server}/is_paused", trust_env=False).json() == {"is_paused": False}
    sampler._servers[0].lost = ""
    assert [answer.tokens.tolist() for answer in whole(sampler)] == [answer.tokens.tolist() for answer in before]
    disturb(sampler.model, size=0.1)
    sampler.publish(2)
    assert largest_gap(sampler.model, ASKED, whole(sampler)) < TOLERANCE


def test_weights_that_no_cached_key_must_outlive_are_salted(server: str, folder: Path) -> None:
    """Without the salt the prompt's old keys and values would be read: what the salt is for is seen to be needed."""
    sampler = connect(server, folder)
    whole(sampler)
    disturb(sampler.model, size=0.1)
    sampler.publish(1)
    only = sampler._servers[0]
    body, label = only._body, f"{sampler._name}-0"
    only._body = lambda request: {**body(request), "cache_salt": label}  # type: ignore[method-assign]
    assert largest_gap(sampler.model, ASKED, whole(sampler)) > WRONG
    only._body = body  # type: ignore[method-assign]
    assert largest_gap(sampler.model, ASKED, whole(sampler)) < TOLERANCE


def test_a_server_that_reads_less_than_the_model_is_refused(server: str) -> None:
    with pytest.raises(ConfigError, match="--max-model-len 4096"):
        VllmServerSampler(load_model(ModelConfig(path="whet:demo")), [server], max_running=32)


def test_what_waits_for_a_server_is_sent_under_the_new_weights(server: str, folder: Path) -> None:
    """More requests than run at once, and a hand-over among them: each is of versions that it could be of."""
    sampler = connect(server, folder)
    asked = [Request(prompt=LONG, seed=seed, params=SamplingParams(max_tokens=60)) for seed in range(96)]
    loop = LoopThread("asks")
    first = loop.begin(sampler.sample(Request(prompt=LONG, seed=0, params=SamplingParams(max_tokens=1))))
    running = [loop.begin(sampler.sample(request)) for request in asked]
    assert first.result(300).version == 0  # those beside it have begun
    disturb(sampler.model, size=0.1)
    sampler.publish(1)
    answers = [each.result(300) for each in running]
    loop.close()
    begun = [answer for answer in answers if answer.version == 1]
    assert begun and {answer.later for answer in begun} == {()} and len(begun) < len(asked)
    assert largest_gap(sampler.model, [asked[answers.index(each)] for each in begun], begun) < TOLERANCE


def whole(sampler: VllmServerSampler, asked: list[Request] = ASKED) -> list[Completion]:
    answers = answers_of(sampler, asked)
    assert all(isinstance(answer, Completion) for answer in answers), answers
    return [answer for answer in answers if isinstance(answer, Completion)]
