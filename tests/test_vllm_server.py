"""A vLLM server as sampler, played by a script that computes with the weights it was told to load."""

from __future__ import annotations

import errno
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.laws.support import answers_of, tiny_model, written
from tests.laws.test_lag import G, P, lags, seeds, seeds_at_lag_0, steps_of
from tests.test_rollouts import TEMPLATE, Lengths, player, task
from whet.config import LoraConfig, SamplingConfig
from whet.config.lag import LagConfig
from whet.envs.base import SingleTurn
from whet.errors import ConfigError, RunError, SamplerError, SamplersLost
from whet.models.language import LanguageModel
from whet.records import Completion, Ending
from whet.rollouts.ledger import AheadFeed
from whet.sampling.base import LoopThread, Request, SamplingParams, run
from whet.sampling.calls import SILENT, Patience
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.vllm_server import VllmServerSampler
from whet.sampling.weight_sync import weights_digest

ASKED = [Request(prompt=(1, 2, 3), seed=seed, params=SamplingParams(max_tokens=5)) for seed in range(4)]
PATIENCE = Patience(attempts=3, request_s=10, total_s=15, first_wait_s=0.01)
Json = dict[str, Any]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class FakeServer(ThreadingHTTPServer):
    """Plays the calls of a vLLM server over a model of its own; `spoil` may change an answer, or give a status."""

    daemon_threads = True

    def __init__(self, model: LanguageModel, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.sampler, self.lock = EmbeddedSampler(model), threading.Lock()
        self.read: dict[str, torch.Tensor] = {}
        self.loaded = 0
        self.phase = "running"
        self.version = "default"
        self.adapters: dict[str, Path] = {}
        self.calls: list[tuple[str, Json]] = []
        self.settings: Json = {
            "device_config": {"device": "cuda"},
            "model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": model.max_length},
            "scheduler_config": {"enable_chunked_prefill": True, "max_num_seqs": 256},
            "parallel_config": {"worker_extension_cls": "whet.sampling.vllm_worker.Extension"},
            "weight_transfer_config": {"backend": "whet_files"},
            "lora_config": {"max_lora_rank": 8},
        }
        self.spoil: Callable[[Json, Json], Json | int] = lambda body, answer: answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, body: Json) -> Json | int:
        match path:
            case "/server_info?config_format=json":
                return {"vllm_config": self.settings}
            case "/collective_rpc":
                assert body["method"] == "whet_read"
                self.read = load_file(body["kwargs"]["path"])
                return {"results": ["" if weights_digest(self.read) == body["kwargs"]["digest"] else "another digest"]}
            case "/v1/load_lora_adapter":
                assert body["lora_name"] not in self.adapters
                self.adapters[body["lora_name"]] = Path(body["lora_path"])
                return {}
            case "/v1/unload_lora_adapter":
                del self.adapters[body["lora_name"]]
                return {}
            case "/pause?mode=keep&clear_cache=false":
                return self._become("paused", after="running")
            case "/start_weight_update":
                return self._become("started", after="paused")
            case "/update_weights":
                assert body["update_info"] == {"digest": weights_digest(self.read)}
                self._load(self.read)
                return self._become("updated", after="started")
            case "/finish_weight_update":
                self.version = body["weight_version"]
                return self._become("finished", after="updated")
            case "/resume":
                return self._become("running", after="finished")
        assert path == "/inference/v1/generate"
        deadline = time.monotonic() + 10
        while self.phase != "running":  # what was sent before a pause and comes in it waits, as in vLLM
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if "model" in body:  # vLLM may read it again
            assert (self.adapters[body["model"]] / "adapter_config.json").is_file()
        return self.spoil(body, self._generate(body))

    def _become(self, phase: str, *, after: str) -> Json | int:
        if self.phase != after:
            return 500
        self.phase = phase
        return {}

    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        self.loaded += 1
        module = self.sampler.engine.model.module
        with torch.no_grad():
            assert {name: p.copy_(weights[name]) for name, p in module.named_parameters()}.keys() == weights.keys()

    def _generate(self, body: Json) -> Json:
        asked = body["sampling_params"]
        assert asked["ignore_eos"] and asked["logprobs"] == 0
        params = SamplingParams(
            max_tokens=asked["max_tokens"],
            temperature=asked["temperature"],
            stop_ids=frozenset(asked["stop_token_ids"]),
            stop=tuple(asked.get("stop", ())),
        )
        request = Request(prompt=tuple(body["token_ids"]), seed=asked["seed"], params=params)
        with self.lock:
            written = run(self.sampler.sample(request))
        assert isinstance(written, Completion)
        content = [
            {"token_id": token, "logprob": logprob}
            for token, logprob in zip(written.tokens.tolist(), written.logprobs.tolist(), strict=True)
        ]
        versions = [{"version": self.version, "start": 0, "end": len(content)}]
        choice = {"token_ids": written.tokens.tolist(), "logprobs": {"content": content}, "weight_versions": versions}
        return {"choices": [{**choice, "finish_reason": "length"}]}


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self, body: Json) -> None:
        with self.server.lock:
            self.server.calls.append((self.path, body))
        answer = self.server.answer(self.path, body)
        status, data = (answer, b"no") if isinstance(answer, int) else (200, json.dumps(answer).encode())
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(port: int = 0) -> Iterator[FakeServer]:
    server = FakeServer(tiny_model(seed=7), port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def connect(server: FakeServer, model: LanguageModel | None = None) -> VllmServerSampler:
    return VllmServerSampler(model or tiny_model(), [server.url], patience=PATIENCE)


def change(model: LanguageModel) -> None:
    with torch.no_grad():
        for p in model.parameters.values():
            p.add_(torch.randn_like(p) * 0.1)


def tokens_of(found: Sequence[Completion | SamplerError]) -> list[list[int]]:
    return [each.tokens.tolist() if isinstance(each, Completion) else [] for each in found]


def of(server: FakeServer, path: str) -> list[Json]:
    return [body for called, body in server.calls if called == path]


def test_it_samples_what_the_embedded_sampler_does_with_the_weights_that_were_handed_over() -> None:
    model = tiny_model()
    with serving() as server:
        sampler = connect(server, model)
        for version in (0, 3):
            expected = answers_of(EmbeddedSampler(model), ASKED)
            found = answers_of(sampler, ASKED)
            assert [a.tokens.tolist() for a in found] == [a.tokens.tolist() for a in expected]
            for ours, theirs in zip(expected, found, strict=True):
                assert isinstance(ours, Completion) and isinstance(theirs, Completion)
                assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-5)
                assert theirs.version == version
            change(model)
            if version == 0:
                sampler.publish(3)
        salts = [body["cache_salt"] for body in of(server, "/inference/v1/generate")]
        assert len(set(salts)) == 2 and salts[-1] == server.version, "no version reads what another one has cached"
        assert server.loaded == 2
        sampler.publish(3)
        answers_of(sampler, ASKED[:1])
        assert of(server, "/inference/v1/generate")[-1]["cache_salt"] not in salts, "a version, twice"
        assert not any(Path(body["kwargs"]["path"]).exists() for body in of(server, "/collective_rpc"))


def test_stop_strings_end_answers_as_they_do_in_the_embedded_sampler() -> None:
    model, text = tiny_model(), tiny_model().tokenizer
    said = written(answers_of(EmbeddedSampler(model), ASKED)[0])
    stop = text.decode(said[:2])[-1:]
    asked = [replace(each, params=SamplingParams(max_tokens=5, stop=(stop, "none"))) for each in ASKED]
    expected = answers_of(EmbeddedSampler(model), asked)
    with serving() as server:
        found = answers_of(connect(server, model), asked)
        settings = of(server, "/inference/v1/generate")[-1]["sampling_params"]
    assert [(each.ending, written(each)) for each in found] == [(each.ending, written(each)) for each in expected]
    assert expected[0].ending is Ending.STOP_STRING
    wanted = {"stop": [stop, "none"], "include_stop_str_in_output": True, "detokenize": True}
    assert {name: settings[name] for name in wanted} == wanted and not settings["skip_special_tokens"]


def test_a_temperature_that_vllm_would_replace_is_refused() -> None:
    almost_greedy = SamplingParams(max_tokens=5, temperature=0.001)
    with serving() as server:
        sampler = connect(server)
        with pytest.raises(ConfigError, match=r"sampling\.temperature is 0\.001, and vLLM samples at 0\.01"):
            answers_of(sampler, [replace(ASKED[0], params=almost_greedy)])
        assert not sampler._servers[0].owed


def test_a_request_that_fails_alone_is_answered_with_its_error() -> None:
    def refuse(body: Json, answer: Json) -> Json | int:
        return 400 if body["sampling_params"]["seed"] == 2 else answer

    with serving() as server:
        sampler = connect(server)
        server.spoil = refuse
        found = answers_of(sampler, ASKED)
    assert [isinstance(each, SamplerError) for each in found] == [False, False, True, False]
    assert "400 Bad Request" in str(found[2])


def test_a_server_error_is_tried_again_and_one_that_stays_is_raised() -> None:
    tried: list[int] = []

    def busy(body: Json, answer: Json) -> Json | int:
        tried.append(body["sampling_params"]["seed"])
        return 503 if tried.count(tried[-1]) == 1 else answer

    with serving() as server:
        sampler = connect(server)
        server.spoil = busy
        assert all(isinstance(each, Completion) for each in answers_of(sampler, ASKED))
        assert sorted(tried) == [0, 0, 1, 1, 2, 2, 3, 3]
        server.spoil = lambda body, answer: 500
        with pytest.raises(SamplerError, match=r"500 Internal Server Error.*no attempt is left"):
            raise answers_of(sampler, ASKED)[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda choice: choice["logprobs"]["content"].pop(), "5 tokens came with 4 log-probabilities"),
        (lambda choice: (choice["token_ids"].pop(), choice["logprobs"]["content"].pop()), "after 4 of 5 tokens"),
        (lambda choice: choice["weight_versions"][0].update(version="older"), "sampled with weights older"),
        (lambda choice: choice.update(weight_versions=[]), "without a version"),
        (lambda choice: choice["logprobs"]["content"][1].update(logprob=-9999.0), "not finite"),
        (lambda choice: choice.pop("token_ids"), "no completion.*token_ids"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error_and_names_itself(change: Callable[[Json], object], said: str) -> None:
    def spoil(body: Json, answer: Json) -> Json:
        if body["sampling_params"]["seed"] == 1:
            change(answer["choices"][0])
        return answer

    with serving() as server:
        sampler = connect(server)
        server.spoil = spoil
        found = answers_of(sampler, ASKED)
        assert [isinstance(each, SamplerError) for each in found] == [False, True, False, False]
        with pytest.raises(SamplerError, match=said):
            raise found[1]  # type: ignore[misc]


def test_weights_that_did_not_arrive_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with serving() as server:
        sampler = connect(server, model)
        with torch.no_grad():
            for p in model.parameters.values():
                p.add_(torch.randn_like(p) * 0.3)
        monkeypatch.setattr(server, "_load", lambda weights: None)
        with pytest.raises(SamplerError, match="on a probe"):
            sampler.publish(1)
        assert sampler.version == 0


def test_weights_that_were_replaced_are_found_out_by_the_probe_and_in_an_answer() -> None:
    """A server that goes on with them (a finish that it forgot, another one behind the same address) is waited for no
    longer than for its answer."""
    with serving() as server:
        sampler = connect(server)
        label = f"{sampler._name}-0"

        def of_before(body: Json, answer: Json) -> Json:
            answer["choices"][0]["weight_versions"][0]["version"] = label
            return answer

        sampler.publish(1)
        server.spoil = of_before
        (found,) = answers_of(sampler, ASKED[:1])
        assert isinstance(found, SamplerError) and re.search(r"with weights \S+-0, and \S+-1 were handed", str(found))
        with pytest.raises(SamplerError, match=r"sampled with weights \S+-0, and \S+-2 were handed over"):
            sampler.publish(2)


def test_a_full_disk_is_no_bug_of_ours_with_an_adapter_either(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(lora=LoraConfig(rank=4))
    with serving() as server:
        sampler = connect(server, model)

        def full(folder: Path) -> None:
            raise OSError(errno.ENOSPC, "no room")

        monkeypatch.setattr(model.adapter, "save_pretrained", full)
        with pytest.raises(RunError, match="the disk is full"):
            sampler.publish(1)


def test_adapters_go_one_after_the_other() -> None:
    """A fresh adapter changes nothing, so that the script may leave it out."""
    model = tiny_model(lora=LoraConfig(rank=4))
    with serving() as server:
        sampler = connect(server, model)
        sampler.publish(1)
        assert server.loaded == 1  # the base, once
        sampler.publish(2)
        labels = [f"{sampler._name}-{version}" for version in range(3)]
        assert [body["lora_name"] for body in of(server, "/v1/load_lora_adapter")] == labels
        assert list(server.adapters) == labels[1:], "those that requests may have begun with stay"
        assert server.version == f"{sampler._name}-base"
        sampler._servers[0].lose(SamplerError("it was started again"))
        server.adapters.clear()
        sampler.publish(2)
        assert server.loaded == 2 and list(server.adapters) == [f"{sampler._name}-3"], "the base again"
        assert {answer.version for answer in answers_of(sampler, ASKED) if isinstance(answer, Completion)} == {2}


def test_an_adapter_that_a_request_began_with_stays_until_that_is_answered() -> None:
    """With its files, which a server may read again."""
    model, began, release = tiny_model(lora=LoraConfig(rank=4)), threading.Event(), threading.Event()

    def slow(body: Json, answer: Json) -> Json:
        if body["sampling_params"]["max_tokens"] == 5:
            began.set()
            release.wait(60)
        return answer

    with serving() as server, closing(LoopThread("asks")) as loop:
        sampler = connect(server, model)
        label = f"{sampler._name}-0"
        server.spoil = slow
        running = loop.begin(sampler.sample(ASKED[0]))
        assert began.wait(60)
        sampler.publish(1)
        sampler.publish(2)
        assert label in server.adapters and (server.adapters[label] / "adapter_config.json").is_file()
        release.set()
        assert running.result(60).version == 0
        sampler.publish(3)
        assert list(server.adapters) == [f"{sampler._name}-2", f"{sampler._name}-3"]


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"model_config": {"logprobs_mode": "raw_logprobs", "max_model_len": 10**6}}, "--logprobs-mode processed"),
        ({"model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": 8}}, "--max-model-len"),
        ({"device_config": {"device": "cpu"}}, "--no-enable-chunked-prefill"),
        ({"scheduler_config": {"enable_chunked_prefill": True, "max_num_seqs": 64}}, "runs 64 requests at once"),
        ({"parallel_config": {"worker_extension_cls": ""}}, "--worker-extension-cls whet.sampling.vllm_worker.Ext"),
        ({"weight_transfer_config": None}, "--weight-transfer-config.backend whet_files"),
        ({"lora_config": None}, "--enable-lora --max-lora-rank 4"),
    ],
)
def test_a_server_that_would_sample_wrongly_is_refused_before_weights_move(settings: Json, remedy: str) -> None:
    with serving() as server:
        server.settings |= settings
        with pytest.raises(ConfigError, match=remedy):
            connect(server, tiny_model(lora=LoraConfig(rank=4)))
        assert len(server.calls) == 1


MANY = [Request(prompt=(n, 2, 3), seed=n, params=SamplingParams(max_tokens=5)) for n in range(1, 13)]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_several_servers_share_the_requests_and_read_the_same_files(lora: LoraConfig | None) -> None:
    model = tiny_model(lora=lora)
    with serving() as one, serving() as two:
        sampler = VllmServerSampler(model, [one.url, two.url], patience=PATIENCE)
        if lora is None:  # the script leaves adapters out, and a fresh one changes nothing
            change(model)
        sampler.publish(1)
        assert tokens_of(answers_of(sampler, MANY)) == tokens_of(answers_of(EmbeddedSampler(model), MANY))
        asked = [{tuple(body["token_ids"]) for body in of(each, "/inference/v1/generate")} for each in (one, two)]
        probe = asked[0] & asked[1]
        assert len(probe) == 1 and min(map(len, asked)) > 3, "prompts are spread, and each meets its own server"
        assert of(one, "/collective_rpc") == of(two, "/collective_rpc")
        assert of(one, "/v1/load_lora_adapter") == of(two, "/v1/load_lora_adapter")


def test_weights_of_another_digest_are_refused_before_the_server_is_paused() -> None:
    model = tiny_model()
    with serving() as server:
        sampler = connect(server, model)
        sampler._files.whole(f"{sampler._name}-1")
        sampler._files._digests[f"{sampler._name}-1"] = "0" * 64
        with pytest.raises(SamplerError, match=r"vLLM at http\S+ refuses weights: another digest"):
            sampler.publish(1)
        assert (server.phase, server.loaded, sampler.version) == ("running", 1, 0)


def test_a_phase_that_fails_is_not_repeated_and_the_server_is_lost() -> None:
    with serving() as one, serving() as two:
        sampler = VllmServerSampler(tiny_model(), [one.url, two.url], patience=PATIENCE)
        two._become = lambda phase, *, after: 500 if phase == "started" else {}  # type: ignore[method-assign]
        change(sampler.model)
        sampler.publish(1)
        assert not sampler._servers[0].lost and "500 Internal" in sampler._servers[1].lost
        assert len(of(two, "/start_weight_update")) == 2, "one of each version"
        assert {each.version for each in answers_of(sampler, MANY)} == {1}


def test_a_server_that_stays_paused_owes_nothing_any_more() -> None:
    """Its answers would come at no time; what was asked of it is asked of the other one at once."""
    with serving() as one, serving() as two, closing(LoopThread("asks")) as loop:
        patience = replace(PATIENCE, request_s=60, total_s=60)
        sampler = VllmServerSampler(tiny_model(), [one.url, two.url], patience=patience)
        release = threading.Event()
        two.spoil = lambda body, answer: answer if release.wait(60) else 500
        try:
            asked = [loop.begin(sampler.sample(request)) for request in MANY]
            while sum(each.done() for each in asked) + len(sampler._servers[1].owed) < len(asked):
                time.sleep(0.01)
            two._become = lambda phase, *, after: 500 if phase == "started" else {}  # type: ignore[method-assign]
            change(sampler.model)
            sampler.publish(1)
            answers = [each.result(10) for each in asked]
        finally:
            release.set()
        assert "500 Internal" in sampler._servers[1].lost
        assert {each.version for each in answers} == {0, 1}


def test_more_requests_than_run_at_once_outlive_a_server() -> None:
    """Also those that wait for their turn at it when many others have had no answer."""
    asked = [Request(prompt=(n, 2, 3), seed=n, params=SamplingParams(max_tokens=2)) for n in range(1, 120)]
    with serving() as one, serving() as two:
        sampler = VllmServerSampler(tiny_model(), [one.url, two.url], max_running=SILENT, patience=PATIENCE)
        two.spoil = lambda body, answer: 503
        assert all(isinstance(each, Completion) for each in answers_of(sampler, asked))


def test_what_a_lost_server_owed_is_asked_of_another_and_one_that_is_back_gets_the_weights() -> None:
    model = tiny_model()
    expected = tokens_of(answers_of(EmbeddedSampler(model), MANY))
    with serving() as one:
        with serving() as two:
            sampler = VllmServerSampler(model, [one.url, two.url], patience=PATIENCE)
            two.spoil = lambda body, answer: 503
            assert tokens_of(answers_of(sampler, MANY)) == expected
        change(model)
        sampler.publish(1)  # the second is gone, and not waited for
        changed = tokens_of(answers_of(EmbeddedSampler(model), MANY))
        assert tokens_of(answers_of(sampler, MANY)) == changed != expected
        with serving(two.server_address[1]) as back:
            change(model)
            sampler.publish(2)
            found = answers_of(sampler, MANY)
            assert tokens_of(found) == tokens_of(answers_of(EmbeddedSampler(model), MANY))
            assert {each.version for each in found if isinstance(each, Completion)} == {2}
            assert back.loaded == 1 and len(of(back, "/inference/v1/generate")) > 3
            back.version = "default"  # started again, with the weights of its own files
            assert tokens_of(answers_of(sampler, MANY)) == tokens_of(found)
        one.spoil = lambda body, answer: 500
        with pytest.raises(SamplersLost, match=r"no vLLM server is left: .*500 Internal.*sampled with weights default"):
            answers_of(sampler, MANY[:1])


def test_all_servers_must_be_there_at_the_start() -> None:
    with serving() as one, pytest.raises(SamplerError, match=r"127.0.0.1:9: .*has been awaited"):
        VllmServerSampler(tiny_model(), [one.url, "http://127.0.0.1:9"], patience=PATIENCE)


def test_a_folder_for_weights_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling.server_folder is .*/none, where nothing can be written \(No such"):
        VllmServerSampler(tiny_model(), ["http://127.0.0.1:9"], folder=tmp_path / "none")


def test_a_server_of_another_kind_is_named() -> None:
    with serving() as server:
        server.settings = {}
        with pytest.raises(SamplerError, match="does not describe itself as a vLLM server does: KeyError"):
            connect(server)
        assert len(server.calls) == 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"server": "http://127.0.0.1:8000"}, "add engine: vllm"),
        ({"engine": "vllm", "server": "127.0.0.1:8000"}, "write it in full"),
        ({"engine": "vllm", "server": "http://gpu-box:8000"}, "name it: server_folder"),
        ({"engine": "vllm", "server": ["http://127.0.0.1:8000", "gpu-box"]}, "write it in full"),
        ({"engine": "vllm", "server": ["http://127.0.0.1:8000"] * 2}, "give each server once"),
        ({"engine": "vllm", "server": []}, "at least 1"),
        ({"engine": "vllm", "server_folder": "/weights"}, "name it too: server"),
    ],
)
def test_impossible_keys_are_refused_when_the_recipe_is_read(keys: Json, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingConfig.model_validate(keys)


@pytest.mark.parametrize("newer", [1, 0], ids=["the next version", "the same version again"])
def test_weights_come_in_the_middle_of_answers_and_what_is_asked_meanwhile_waits_for_them(newer: int) -> None:
    """Answers say which token is of which version; one that was begun after it under the old salt is repeated."""
    model, release, asked = tiny_model(), threading.Event(), threading.Event()
    changing, let = threading.Event(), threading.Event()

    with serving() as server, closing(LoopThread("asks")) as loop, ThreadPoolExecutor(1) as trainer:
        sampler = connect(server, model)
        labels = [f"{sampler._name}-{version}" for version in range(2)]
        load = server._load

        def slow(body: Json, answer: Json) -> Json:
            seed = body["sampling_params"]["seed"]
            if body["sampling_params"]["max_tokens"] == 5 and body["cache_salt"] == labels[0]:
                asked.set()
                release.wait(60)
                spans = [(labels[0], 0, 2), (labels[1], 2, 5)] if seed == 0 else [(labels[1], 0, 5)]
                answer["choices"][0]["weight_versions"] = [
                    {"version": label, "start": start, "end": end} for label, start, end in spans
                ]
            return answer

        def slowly(weights: dict[str, torch.Tensor]) -> None:
            changing.set()
            assert let.wait(60)
            load(weights)

        server.spoil, server._load = slow, slowly  # type: ignore[method-assign]
        first, overtaken = (loop.begin(sampler.sample(request)) for request in ASKED[:2])
        assert asked.wait(60)
        change(model)
        pushed = trainer.submit(sampler.publish, newer)
        assert changing.wait(60)
        third = loop.begin(sampler.sample(ASKED[2]))
        assert "owes 2 answers" in sampler.describe() and not pushed.done()
        let.set()
        pushed.result(60)
        assert third.result(60).version == newer and not first.done(), "the hand-over waits for no answer"
        release.set()
        assert first.result(60).versions.tolist() == [0, 0, newer, newer, newer]
        assert overtaken.result(60).versions.tolist() == [newer] * 5
        salts = [
            body["cache_salt"]
            for body in of(server, "/inference/v1/generate")
            if body["sampling_params"]["seed"] == 1 and body["sampling_params"]["max_tokens"] == 5
        ]
        assert salts == labels
        assert tokens_of([overtaken.result(), third.result()]) == tokens_of(
            answers_of(EmbeddedSampler(model), ASKED[1:3])
        )
        assert sampler.gaps.keys() == {0, newer}


@pytest.mark.parametrize("order", ["strict", "window"])
def test_servers_sample_ahead_and_one_that_is_lost_loses_nothing(order: str) -> None:
    """Each position is trained once, within the bound, though one of two servers is gone in the middle."""
    model = tiny_model()
    with serving() as one, serving() as two:
        sampler = VllmServerSampler(model, [one.url, two.url], patience=PATIENCE)
        feed = AheadFeed(
            player=player(
                environment=SingleTurn, sampler=sampler, rubric=Lengths(), max_length=128,
                params=SamplingParams(max_tokens=6, stop_ids=TEMPLATE.stop_ids),
            ),
            tasks=[task(f"t{n}", f"Q{n}") for n in range(24)], samples=G, steps=6, seed=3, sampler=sampler,
            hand_over=sampler.publish, lag=LagConfig(steps=1, order=order), prompts_per_step=P, progress_s=60.0,  # type: ignore[arg-type]
        )  # fmt: skip
        trained, oldest = list[int](), 0
        with closing(feed):
            for step, taken in steps_of(feed, until=6):
                trained += seeds(taken.played)
                oldest = max(oldest, *lags(taken, step))
                assert all(e.score.value is not None for group in taken.played for e in group.episodes)
                change(model)
                if step == 2:
                    two.spoil = lambda body, answer: 404
        assert sorted(trained) == sorted(seeds_at_lag_0(6)) and 1 <= oldest <= feed.lag.bound(P)
        assert "owes" in sampler.describe()
