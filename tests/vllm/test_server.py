"""A real `vLLM` server in a process of its own: the same promises over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.laws.support import answers_of
from tests.vllm.conftest import disturb, largest_gap, serving
from tests.vllm.test_hand_over import ASKED, TOLERANCE, WRONG
from whet.config import LoraConfig, ModelConfig
from whet.errors import ConfigError
from whet.models.create import byte_tokenizer
from whet.models.load import load_model
from whet.records import Completion
from whet.sampling.vllm_server import VllmServerSampler

pytestmark = pytest.mark.usefixtures("vllm")

FLAGS = (
    "--tokens-only --logprobs-mode processed_logprobs --no-enable-chunked-prefill "
    "--max-num-batched-tokens 8192 --max-num-seqs 32 --enable-lora --max-lora-rank 8"
)


@pytest.fixture(scope="module")
def folder(vllm: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose head is its own: a server on a CPU does not renew a tied one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("model")
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=512, hidden_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, tie_word_embeddings=False,
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


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=5, rslora=True)])
def test_versions_are_handed_over_to_a_server(server: str, folder: Path, lora: LoraConfig | None) -> None:
    model = load_model(ModelConfig(path=str(folder)), lora=lora)
    sampler = VllmServerSampler(model, [server])
    for version in (1, 2):
        disturb(model, size=0.1)
        assert largest_gap(model, ASKED, whole(sampler)) > WRONG
        sampler.publish(version)
        answers = whole(sampler)
        assert largest_gap(model, ASKED, answers) < TOLERANCE
        assert {answer.version for answer in answers} == {version}
    if lora is None:
        newer = VllmServerSampler(load_model(ModelConfig(path=str(folder))), [server])
        with pytest.raises(Exception, match="is another run using this server"):
            answers_of(sampler, ASKED)
        assert len(answers_of(newer, ASKED)) == len(ASKED)


def test_a_server_that_reads_less_than_the_model_is_refused(server: str) -> None:
    with pytest.raises(ConfigError, match="--max-model-len 4096"):
        VllmServerSampler(load_model(ModelConfig(path="whet:demo")), [server])


def whole(sampler: VllmServerSampler) -> list[Completion]:
    answers = answers_of(sampler, ASKED)
    assert all(isinstance(answer, Completion) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Completion)]
