"""Running vLLM servers, behind the same door: tokens in, tokens and log-probabilities out.

The servers belong to one run. Weights go to them as files in a folder that all see: the whole model once and after
every step, or with LoRA the base once and then each version's adapter. They load them when told to (`/collective_rpc`,
`/v1/load_lora_adapter`), forget what they cached (`/reset_prefix_cache`) and take a new version label
(`/update_weight_version`), which they then write on every answer: one of another version is an error. As in this
process, a probe must get the log-probabilities of our own forward pass before a version counts as handed over.

Whether a server can do this (its settings, its device) is asked before anything is sent.

A request goes to the server that its prompt points to, so that equal prompts meet, or to one with less to do. Where
there are several, one that does not answer, or has other weights since it was started again, is lost: what it owed is
asked of another one with the same seed, and the next hand-over greets it anew.

They may sample ahead of the trainer (`rollouts.ledger`): a hand-over waits until nothing is under way, and what is
asked meanwhile waits for it, so that every answer is of one version.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
from safetensors.torch import save_file

from whet.errors import ConfigError, SamplerError, SamplersLost, boundary
from whet.files import writing
from whet.models.language import LanguageModel
from whet.records import Completion
from whet.sampling.base import Request
from whet.sampling.bridge import run
from whet.sampling.calls import Call, Caller, NotFound, Patience, Unanswered, excerpt
from whet.sampling.fleet import routed
from whet.sampling.weight_sync import base_weights, check_probe, check_temperature, complete, stopping

PATIENCE = Patience(request_s=600.0, total_s=3600.0)
"""An answer of many thousand tokens on a full server takes minutes, and so does reading a large model."""
LOOK_S = 0.02
"""How often a request that waits for a hand-over looks whether it is over."""
NO_LOGPROB = -9999.0
"""What the server writes for a log-probability that is no number or that it does not have."""
REMEDY = {
    403: "",
    404: "; start it with VLLM_SERVER_DEV_MODE=1 (weights) and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (adapters)",
}


class _OtherWeights(SamplerError):
    """An answer by weights that were not handed over."""


class _Files:
    """The weights on their way: each version is written once, at its first use."""

    def __init__(self, model: LanguageModel, folder: Path | None) -> None:
        self._model, self._lock = model, threading.Lock()
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="whet-vllm-", dir=folder)
        except OSError as error:
            raise ConfigError(
                f"sampling.server_folder is {folder}, where nothing can be written ({error.strerror}); name a folder "
                "that exists here and where the server is"
            ) from error

    def whole(self, name: str) -> Path:
        """The model without its adapter, as it is now."""
        with self._lock:
            folder = Path(self._folder.name) / name
            if not folder.exists():
                folder.mkdir()
                weights = {name: p.to("cpu").contiguous() for name, p in base_weights(self._model)}
                with writing(folder, sum(tensor.nbytes for tensor in weights.values())):
                    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            return folder

    def adapter(self, name: str) -> Path:
        """The adapter, as it is now."""
        with self._lock:
            folder = Path(self._folder.name) / name
            if not folder.exists():
                self._model.adapter.save_pretrained(folder)
            return folder

    def keep(self, name: str | None) -> None:
        """Remove all but the adapter of this name, which servers may read again at any time."""
        for folder in Path(self._folder.name).iterdir():
            if folder.name != name:
                shutil.rmtree(folder)


class VllmServerSampler:
    """`ApartSampler` over running vLLM servers, with the model's weights as of the last `publish`."""

    def __init__(
        self,
        model: LanguageModel,
        servers: Sequence[str],
        *,
        max_running: int = 256,
        folder: Path | None = None,
        patience: Patience = PATIENCE,
    ) -> None:
        """Look at the servers, and hand them the weights as version 0.

        `servers` are `http://host:port`; at most `max_running` requests are under way together at each; files go under
        `folder`, which the servers must see under the same path (None: the machine's own folder for such things).
        `ConfigError` where a server's settings do not fit, `SamplerError` where it does not answer as it should.
        """
        self.model, self.version = model, -1
        self._name = f"whet-{secrets.token_hex(4)}"
        self._files = _Files(model, folder)
        addresses = enumerate(servers)
        self._servers = [_Server(n, address, model, self._files, max_running, patience) for n, address in addresses]
        self.gaps: dict[int, float] = {}
        self._moving, self._asked, self._renewing = threading.Condition(), 0, False
        self._patience = patience
        self.publish(0)

    def publish(self, version: int) -> None:
        """Hand the model's weights over under this version, once all that was asked is answered.

        Raises `SamplerError` where the only server does not take them or then computes another thing, `SamplersLost`
        where none of several does.
        """
        label = f"{self._name}-{version}"
        # Of several, one that cannot be used is left out; but all that are named must be there at the start.
        excused = (SamplerError, ConfigError) if self.version >= 0 and len(self._servers) > 1 else ()

        def renew(server: _Server) -> None:
            try:
                server.renew(label, version)
            except excused as error:
                server.lose(error)

        with self._alone(), ThreadPoolExecutor(len(self._servers), "whet-vllm") as threads:
            list(threads.map(renew, self._servers))
            if all(server.lost for server in self._servers):
                raise self._all_lost()
            self._files.keep(None if self.model.adapter is None else label)
            self.version = version
            self.gaps[version] = max(server.gap for server in self._servers if not server.lost)

    async def sample(self, request: Request) -> Completion:
        """`TokenSampler`: one call, which the server batches with others; where a server is lost, one of another."""
        while not self._enter():
            await asyncio.sleep(LOOK_S)
        try:
            return await self._sample(request)
        finally:
            with self._moving:
                self._asked -= 1
                self._moving.notify_all()

    def describe(self) -> str:
        """`ApartSampler`."""
        return "; ".join(f"{each.address} owes {len(each.owed)} answers {each.lost}".strip() for each in self._servers)

    def save(self, folder: Path) -> None:
        """`ApartSampler`: servers have no past versions."""

    def load(self, folder: Path) -> None:
        """`ApartSampler`: nothing was saved."""

    def close(self) -> None:
        """`ApartSampler`: nothing; the servers were not started here."""

    def _enter(self) -> bool:
        """Count a request as asked, unless weights are on their way."""
        with self._moving:
            self._asked += not self._renewing
            return not self._renewing

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within the block no request is under way."""
        limit = self._patience.total_s
        with self._moving:
            self._renewing = True
        try:
            with self._moving:
                if not self._moving.wait_for(lambda: not self._asked, limit):
                    raise SamplersLost(f"weights wait for answers since {limit:g} s: {self.describe()}")
            yield
        finally:
            self._renewing = False

    async def _sample(self, request: Request) -> Completion:
        while (server := routed([each for each in self._servers if not each.lost], request)) is not None:
            try:
                return await server.sample(request)
            except (Unanswered, NotFound, _OtherWeights) as error:  # dead, or started again: without the adapter
                if len(self._servers) == 1:
                    raise
                server.lose(error)
        raise self._all_lost()

    def _all_lost(self) -> SamplersLost:
        why = "; ".join(f"{server.address}: {server.lost}" for server in self._servers)
        return SamplersLost(f"sampling.server: no vLLM server is left: {why}")


class _Server:
    """One server: what it was told, and what it owes."""

    def __init__(
        self, number: int, address: str, model: LanguageModel, files: _Files, max_running: int, patience: Patience
    ) -> None:
        self.number, self.address, self.model, self.version = number, address.rstrip("/"), model, -1
        self.owed: set[object] = set()
        self.lost, self.gap = "it was not asked yet", 0.0
        self._files = files
        self._label = ""
        self._adapter: str | None = None
        self._caller = Caller(
            f"vLLM at {self.address}", patience, concurrency=max_running, remedy=lambda code: REMEDY.get(code, "")
        )

    def lose(self, error: Exception) -> None:
        """Ask it nothing until it has taken weights again."""
        if not self.lost:
            logging.getLogger(__name__).warning("%s is left out until the next step: %s", self.address, error)
        self.lost = str(error)

    def renew(self, label: str, version: int) -> None:
        """Give it the weights of a version. A lost one may have been started again, and is greeted like a new one."""
        if self.lost:
            with boundary(SamplerError, f"vLLM at {self.address}: does not describe itself as a vLLM server does"):
                self._check_settings(self._tell("/server_info?config_format=json", None, _json)["vllm_config"])
            if self.model.adapter is not None:
                self._load_weights("base")
        self._label = label
        if self.model.adapter is None:
            self._load_weights(label)
        else:
            self._load_adapter(label)
        self._tell("/update_weight_version", {"new_version": label}, _json)
        self.version = version
        self.gap = run(check_probe(self, self.model))
        self.lost = ""

    async def sample(self, request: Request) -> Completion:
        """`TokenSampler`. Raises `Unanswered` where the server has none, `SamplerError` for this request alone."""
        body, read, owed = self._body(request), partial(self._read, request), object()
        self.owed.add(owed)
        try:
            return await self._caller.ask(Call(f"{self.address}/inference/v1/generate", body, read, "a completion"))
        finally:
            self.owed.discard(owed)

    def _body(self, request: Request) -> dict[str, Any]:
        params = request.params
        check_temperature(params)
        settings = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or 0,
            "seed": request.seed,
            "logprobs": 0,  # those of the sampled tokens and no others
            **stopping(params),
        }
        named = {} if self._adapter is None else {"model": self._adapter}
        prompt = [int(token) for token in request.prompt]
        # The salt keeps keys and values of other weights from being read, whatever became of the reset.
        return {"token_ids": prompt, "sampling_params": settings, "cache_salt": self._label, **named}

    def _read(self, request: Request, response: httpx.Response) -> Completion:
        """The completion, if it is whole and of the version that was handed over."""
        answer = response.json()
        try:
            (choice,) = answer["choices"]
            tokens = [int(token) for token in choice["token_ids"]]
            written = [(int(each["token_id"]), float(each["logprob"])) for each in choice["logprobs"]["content"]]
            versions = {str(span["version"]) for span in choice["weight_versions"]}
        except (KeyError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}; it says {excerpt(answer)}"
            raise SamplerError(f"vLLM at {self.address}: the answer is no completion ({said})") from error
        if versions != {self._label}:
            found = ", ".join(sorted(versions)) or "without a version"
            raise _OtherWeights(
                f"vLLM at {self.address} sampled with weights {found}, and {self._label} were handed over; is another "
                "run using this server?"
            )
        if [token for token, _ in written] != tokens:
            raise SamplerError(
                f"vLLM at {self.address}: {len(tokens)} tokens came with {len(written)} log-probabilities, or of others"
            )
        if not all(math.isfinite(logprob) and logprob > NO_LOGPROB for _, logprob in written):
            raise SamplerError(f"vLLM at {self.address}: the model's log-probabilities are not finite")
        logprobs = [logprob for _, logprob in written]
        return complete(
            request, tokens, logprobs, model=self.model, version=self.version, why=choice.get("finish_reason")
        )

    def _load_weights(self, name: str) -> None:
        where = {"weights_path": str(self._files.whole(name))}
        self._tell("/collective_rpc", {"method": "reload_weights", "kwargs": where}, _json)
        self._forget_cached()

    def _load_adapter(self, name: str) -> None:
        """An adapter under a name of its own, in the place of the one before."""
        folder = self._files.adapter(name)
        if self._adapter is not None and not self.lost:
            self._tell("/v1/unload_lora_adapter", {"lora_name": self._adapter}, _text)
        self._tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, _text)
        self._adapter = name
        self._forget_cached()

    def _forget_cached(self) -> None:
        if not self._tell("/reset_prefix_cache", {}, _json).get("success"):
            raise SamplerError(
                f"vLLM at {self.address} keeps the keys and values of the weights before: its prefix cache was not "
                "reset"
            )

    def _tell(self, path: str, body: Mapping[str, Any] | None, read: Any) -> Any:
        method: Literal["GET", "POST"] = "GET" if body is None else "POST"
        return self._caller.one(Call(self.address + path, body or {}, read, f"the answer to {path}", method))

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raises `ConfigError` for the first setting that would make its samples wrong, with the remedy."""
        on_cpu = settings["device_config"]["device"] == "cpu"
        serves, most = settings["model_config"], self.model.max_length
        lora = settings["lora_config"]
        rank = 0 if self.model.adapter is None else max(c.r for c in self.model.adapter.peft_config.values())
        wrong = {
            "reports log-probabilities before temperature and truncation; start it with "
            "--logprobs-mode processed_logprobs": serves["logprobs_mode"] != "processed_logprobs",
            f"reads {serves['max_model_len']} tokens, and the model {most}; start it with "
            f"--max-model-len {most}": serves["max_model_len"] < most,
            "on a CPU cuts prompts into chunks, which fails for requests with seeds; start it with "
            "--no-enable-chunked-prefill": on_cpu and bool(settings["scheduler_config"]["enable_chunked_prefill"]),
            f"on a CPU does not renew a head that is tied to the embeddings, as that of {self.model.name} is; leave "
            "sampling.server out (vLLM in this process does), or serve from a GPU": on_cpu
            and bool(self.model.module.config.tie_word_embeddings),
            f"takes no adapters of rank {rank}; start it with --enable-lora --max-lora-rank {rank}": rank > 0
            and (lora is None or lora["max_lora_rank"] < rank),
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise ConfigError(f"sampling.server: vLLM at {self.address} {what}")


def _json(response: httpx.Response) -> Any:
    return response.json()


def _text(response: httpx.Response) -> str:
    return response.text
