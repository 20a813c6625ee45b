"""A real `vLLM` server in a process of its own: the same promises over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.vllm.conftest import disturb, largest_gap
from tests.vllm.test_hand_over import ASKED, TOLERANCE, WRONG
from whet.config import LoraConfig, ModelConfig
from whet.errors import ConfigError
from whet.models.create import byte_tokenizer
from whet.models.load import load_model
from whet.records import Completion
from whet.sampling.vllm_server import VllmServerSampler

pytestmark = pytest.mark.usefixtures("vllm")

START_S = 300
FLAGS = (
    "--tokens-only --logprobs-mode processed_logprobs --dtype float32 --enforce-eager --no-enable-chunked-prefill "
    "--max-num-batched-tokens 8192 --max-num-seqs 32 --kv-cache-memory-bytes 100000000 --enable-lora --max-lora-rank 8"
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
    # `vllm serve` is this module; its own command asks for a package of the name vllm, and the CPU build has another.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *FLAGS.split()]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=os.environ | settings, stdout=out, stderr=out
        )
    try:
        _await(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(2 * START_S):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=5, rslora=True)])
def test_versions_are_handed_over_to_a_server(server: str, folder: Path, lora: LoraConfig | None) -> None:
    model = load_model(ModelConfig(path=str(folder)), lora=lora)
    sampler = VllmServerSampler(model, server)
    for version in (1, 2):
        disturb(model, size=0.1)
        assert largest_gap(model, ASKED, whole(sampler)) > WRONG
        sampler.publish(version)
        answers = whole(sampler)
        assert largest_gap(model, ASKED, answers) < TOLERANCE
        assert {answer.version for answer in answers} == {version}
    if lora is None:
        newer = VllmServerSampler(load_model(ModelConfig(path=str(folder))), server)
        with pytest.raises(Exception, match="is another run using this server"):
            sampler.sample(ASKED)
        assert len(newer.sample(ASKED)) == len(ASKED)


def test_a_server_that_reads_less_than_the_model_is_refused(server: str) -> None:
    with pytest.raises(ConfigError, match="--max-model-len 4096"):
        VllmServerSampler(load_model(ModelConfig(path="whet:demo")), server)


def whole(sampler: VllmServerSampler) -> list[Completion]:
    answers = sampler.sample(ASKED)
    assert all(isinstance(answer, Completion) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Completion)]
