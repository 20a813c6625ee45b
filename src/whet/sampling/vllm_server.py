"""Running vLLM servers, behind the same door: tokens in, tokens and log-probabilities out.

The servers belong to one run. Weights go to them as files in a folder that all see. A server's workers
(`sampling.vllm_worker`) read a file and compare the digest of its tensors with what the trainer states; only then is
the server paused, which keeps what is running, the weights go through vLLM's phases (start, update, finish), and it
goes on. So an answer may be of several versions, and vLLM says from which token on: an answer of weights that this run
did not hand over is an error. The version is the salt of the prefix cache too. With LoRA the base goes over once and
each version as an adapter of its own name; what is running keeps the adapter that it began with. As in this process, a
probe must get the log-probabilities of our own forward pass before a version counts as handed over.

Whether a server can do this (its settings, its device) is asked before anything is sent.

A request goes to the server that its prompt points to, so that equal prompts meet, or to one with less to do. Where
there are several, one that does not answer, or has other weights since it was started again, is lost: what it owed is
asked of another one with the same seed, and the next hand-over greets it anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
from safetensors.torch import load_file, save_file

from whet.errors import ConfigError, SamplerError, SamplersLost, boundary
from whet.files import writing
from whet.models.language import LanguageModel
from whet.records import Completion
from whet.sampling.base import Request
from whet.sampling.base import run as run_here
from whet.sampling.calls import Call, Caller, NotFound, Patience, Unanswered, excerpt
from whet.sampling.fleet import routed
from whet.sampling.vllm_flags import EXTENSION, FILES
from whet.sampling.weight_sync import base_weights, check_probe, check_temperature, complete, stopping, weights_digest

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
    """An answer by weights that were not handed over, or that others have replaced."""


class _Overtaken(_OtherWeights):
    """An answer that was begun after a hand-over and sent before it: it may have read what older weights cached."""


class _Files:
    """The weights on their way: each version is written once, at its first use."""

    def __init__(self, model: LanguageModel, folder: Path | None) -> None:
        self._model, self._lock = model, threading.Lock()
        self._digests: dict[str, str] = {}
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="whet-vllm-", dir=folder)
        except OSError as error:
            raise ConfigError(
                f"sampling.server_folder is {folder}, where nothing can be written ({error.strerror}); name a folder "
                "that exists here and where the server is"
            ) from error

    def whole(self, name: str) -> tuple[Path, str]:
        """The model without its adapter, as it is now: its file, and the digest of its tensors."""
        with self._lock:
            file = Path(self._folder.name) / name / "model.safetensors"
            if name not in self._digests:
                file.parent.mkdir(exist_ok=True)
                weights = {name: p.to("cpu").contiguous() for name, p in base_weights(self._model)}
                with writing(file, sum(tensor.nbytes for tensor in weights.values())):
                    save_file(weights, file, metadata={"format": "pt"})
                self._digests[name] = weights_digest(weights)
            return file, self._digests[name]

    def adapter(self, name: str) -> tuple[Path, str]:
        """The adapter, as it is now."""
        with self._lock:
            file = Path(self._folder.name) / name / "adapter_model.safetensors"
            if name not in self._digests:
                with writing(file, 0):
                    self._model.adapter.save_pretrained(file.parent)
                self._digests[name] = weights_digest(load_file(file))
            return file, self._digests[name]

    def keep(self, names: Collection[str]) -> None:
        """Remove all but the adapters of these names, which servers may read again at any time."""
        for folder in Path(self._folder.name).iterdir():
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)  # a server may have it open, on a disk that minds
                self._digests.pop(folder.name, None)


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
        self._pushes = 0
        self.publish(0)

    def publish(self, version: int) -> None:
        """Hand the model's weights over under this version, in the middle of what is being answered.

        Raises `SamplerError` where the only server does not take them or then computes another thing, `SamplersLost`
        where none of several does.
        """
        # Of several, one that cannot be used is left out; but all that are named must be there at the start.
        excused = self.version >= 0 and len(self._servers) > 1
        label = f"{self._name}-{self._pushes}"  # a version may be handed over twice, and nothing cached is of both
        self._pushes += 1

        def renew(server: _Server) -> None:
            try:
                server.renew(self._name, label, version)
            except (SamplerError, ConfigError) as error:
                server.lose(error)
                if not excused:
                    raise

        with ThreadPoolExecutor(len(self._servers), "whet-vllm") as threads:
            list(threads.map(renew, self._servers))
        if all(server.lost for server in self._servers):
            raise self._all_lost()
        self._files.keep({name for server in self._servers for name in server.adapters})
        self.version = version
        self.gaps[version] = max(server.gap for server in self._servers if not server.lost)

    async def sample(self, request: Request) -> Completion:
        """`TokenSampler`: one call, which the server batches with others; where a server is lost, one of another."""
        while (server := routed([each for each in self._servers if not each.lost], request)) is not None:
            try:
                return await server.sample(request)
            except (Unanswered, NotFound, _OtherWeights) as error:  # dead, or started again: without the adapter
                if len(self._servers) == 1:
                    raise
                server.lose(error)
        raise self._all_lost()

    def describe(self) -> str:
        """`ApartSampler`."""
        return "; ".join(f"{each.address} owes {len(each.owed)} answers {each.lost}".strip() for each in self._servers)

    def save(self, folder: Path) -> None:
        """`ApartSampler`: servers have no past versions."""

    def load(self, folder: Path) -> None:
        """`ApartSampler`: nothing was saved."""

    def close(self) -> None:
        """`ApartSampler`: nothing; the servers were not started here."""

    def _all_lost(self) -> SamplersLost:
        why = "; ".join(f"{server.address}: {server.lost}" for server in self._servers)
        return SamplersLost(f"sampling.server: no vLLM server is left: {why}")


class _Server:
    """One server: what it was told, and what it owes."""

    def __init__(
        self, number: int, address: str, model: LanguageModel, files: _Files, max_running: int, patience: Patience
    ) -> None:
        self.number, self.address, self.model = number, address.rstrip("/"), model
        self.owed: dict[object, str] = {}
        """The label of the weights that each request was sent with."""
        self._give_up: dict[object, Callable[[], object]] = {}
        """Ends the wait for each of them, from any thread."""
        self.adapters: set[str] = set()
        """Those that are loaded, by label: the newest, and what running requests began with."""
        self.lost, self.gap = "it was not asked yet", 0.0
        self._files, self._max_running, self._renewing = files, max_running, False
        self._label = self._base = ""
        self._known: dict[str, int] = {}
        """The version of each label that it was given."""
        who = f"vLLM at {self.address}"
        self._caller = Caller(who, patience, concurrency=max_running, remedy=lambda code: REMEDY.get(code, ""))

    def lose(self, error: Exception) -> None:
        """Ask it nothing until it has taken weights again, and wait for nothing that it owes: it may be paused."""
        if not self.lost:
            logging.getLogger(__name__).warning("%s is left out until the next step: %s", self.address, error)
        self.lost = str(error)
        for give_up in tuple(self._give_up.values()):
            give_up()

    def renew(self, run: str, label: str, version: int) -> None:
        """Give it the weights of a version. A lost one may have been started again, and is greeted like a new one."""
        self._renewing = True  # what is asked from now on is sent under the new label
        try:
            if self.lost:
                with boundary(SamplerError, f"vLLM at {self.address}: does not describe itself as a vLLM server does"):
                    known = json.loads(self._tell("/server_info?config_format=json", None))
                    self._check_settings(known["vllm_config"])
                self.adapters = set()
                if self.model.adapter is not None:
                    self._base = f"{run}-base"
                    self._load_weights(self._base)
            self._known[label] = version
            if self.model.adapter is None:
                self._load_weights(label)
            else:
                self._load_adapter(label)
            self._label = label
            self.gap = run_here(check_probe(self._ask, self.model))
            self.lost = ""
        finally:
            self._renewing = False

    async def sample(self, request: Request) -> Completion:
        """`TokenSampler`. Raises `Unanswered` where the server has none, `SamplerError` for this request alone."""
        while True:
            while self._renewing:
                await asyncio.sleep(LOOK_S)
            if self.lost:
                raise Unanswered(self.lost)
            with suppress(_Overtaken):
                return await self._ask(request)

    async def _ask(self, request: Request) -> Completion:
        key, loop = object(), asyncio.get_running_loop()

        def send() -> dict[str, Any]:
            self.owed[key] = self._label
            return self._body(request)

        def read(response: httpx.Response) -> Completion:
            return self._read(request, self.owed[key], response)

        self.owed[key] = self._label
        call = Call(f"{self.address}/inference/v1/generate", send, read, "a completion")
        asked = asyncio.ensure_future(self._caller.ask(call))
        self._give_up[key] = partial(loop.call_soon_threadsafe, asked.cancel)
        try:
            return await asked
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            raise Unanswered(self.lost) from None  # only the wait for the server was cancelled, by `lose`
        finally:
            del self.owed[key], self._give_up[key]

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
        named = {} if self.model.adapter is None else {"model": self._label}
        prompt = [int(token) for token in request.prompt]
        # The salt keeps keys and values of other weights from being read: those of running requests cannot be reset.
        return {"token_ids": prompt, "sampling_params": settings, "cache_salt": self._label, **named}

    def _read(self, request: Request, label: str, response: httpx.Response) -> Completion:
        """The completion, if it is whole and of versions that were handed over."""
        answer = response.json()
        try:
            (choice,) = answer["choices"]
            tokens = [int(token) for token in choice["token_ids"]]
            written = [(int(each["token_id"]), float(each["logprob"])) for each in choice["logprobs"]["content"]]
            spans = [(int(span["start"]), str(span["version"])) for span in choice["weight_versions"]]
            spans = [(start, label if name == self._base else name) for start, name in spans]
        except (KeyError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}; it says {excerpt(answer)}"
            raise SamplerError(f"vLLM at {self.address}: the answer is no completion ({said})") from error
        order = [
            *self._known
        ]  # later tokens are of later weights, and none of those that were replaced when it was sent
        places = [order.index(name) if name in self._known else -1 for name in (label, *(name for _, name in spans))]
        if not spans or spans[0][0] != 0 or places != sorted(places):
            found = ", ".join(name for _, name in spans) or "without a version"
            raise _OtherWeights(
                f"vLLM at {self.address} sampled with weights {found}, and {label} were handed over; is another "
                "run using this server?"
            )
        if spans[0][1] != label:
            raise _Overtaken(f"vLLM at {self.address}: {label} were replaced before the request was begun")
        if [token for token, _ in written] != tokens:
            raise SamplerError(
                f"vLLM at {self.address}: {len(tokens)} tokens came with {len(written)} log-probabilities, or of others"
            )
        if not all(math.isfinite(logprob) and logprob > NO_LOGPROB for _, logprob in written):
            raise SamplerError(f"vLLM at {self.address}: a log-probability is missing or not finite")
        (_, version), *later = [(start, self._known[name]) for start, name in spans]
        logprobs = [logprob for _, logprob in written]
        return complete(
            request, tokens, logprobs, model=self.model, version=version, why=choice.get("finish_reason"),
            later=tuple(later),
        )  # fmt: skip

    def _load_weights(self, label: str) -> None:
        """The whole model, by vLLM's phases; an error between start and finish is the end of the engine."""
        _, digest = self._compared(self._files.whole(label))
        self._tell("/pause?mode=keep&clear_cache=false", {})
        self._tell("/start_weight_update", {}, attempts=1)
        self._tell("/update_weights", {"update_info": {"digest": digest}}, attempts=1)
        self._tell("/finish_weight_update", {"weight_version": label}, attempts=1)
        self._tell("/resume", {})

    def _load_adapter(self, label: str) -> None:
        """An adapter under a name of its own; those that nothing uses any more go."""
        file, _ = self._compared(self._files.adapter(label))
        self._tell("/v1/load_lora_adapter", {"lora_name": label, "lora_path": str(file.parent)}, attempts=1)
        unused = self.adapters - {self._label, *self.owed.values()}
        for old in unused:
            self._tell("/v1/unload_lora_adapter", {"lora_name": old}, attempts=1)
        self.adapters = self.adapters - unused | {label}

    def _compared(self, sent: tuple[Path, str]) -> tuple[Path, str]:
        """What was sent, once the server's workers have read the same. Raises `SamplerError` where they have not."""
        arguments = {"path": str(sent[0]), "digest": sent[1]}
        with boundary(SamplerError, f"vLLM at {self.address}: its workers do not compare weights as whet's do"):
            answers = json.loads(self._tell("/collective_rpc", {"method": "whet_read", "kwargs": arguments}))
            wrong = "; ".join(filter(None, answers["results"]))
        if wrong:
            raise SamplerError(f"vLLM at {self.address} refuses weights: {wrong}")
        return sent

    def _tell(self, path: str, body: Mapping[str, Any] | None, attempts: int | None = None) -> str:
        """The text of its answer."""
        method: Literal["GET", "POST"] = "GET" if body is None else "POST"
        what = f"the answer to {path}"
        return self._caller.one(Call(self.address + path, body or {}, lambda said: said.text, what, method, attempts))

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raises `ConfigError` for the first setting that would make its samples wrong, with the remedy."""
        on_cpu = settings["device_config"]["device"] == "cpu"
        serves, most = settings["model_config"], self.model.max_length
        lora = settings["lora_config"]
        rank = 0 if self.model.adapter is None else max(c.r for c in self.model.adapter.peft_config.values())
        extended = settings["parallel_config"]["worker_extension_cls"] == EXTENSION
        room = (settings["weight_transfer_config"] or {}).get("backend")
        seqs = settings["scheduler_config"]["max_num_seqs"]
        wrong = {
            "reports log-probabilities before temperature and truncation; start it with "
            "--logprobs-mode processed_logprobs": serves["logprobs_mode"] != "processed_logprobs",
            f"reads {serves['max_model_len']} tokens, and the model {most}; start it with "
            f"--max-model-len {most}": serves["max_model_len"] < most,
            "on a CPU cuts prompts into chunks, which fails for requests with seeds; start it with "
            "--no-enable-chunked-prefill": on_cpu and bool(settings["scheduler_config"]["enable_chunked_prefill"]),
            f"runs {seqs} requests at once, and sampling.max_running is {self._max_running}; make them equal, since "
            "what waits in the server while weights are handed over is asked twice": seqs < self._max_running,
            "does not compare weights before it takes them; start it, where whet is installed too, with "
            f"--worker-extension-cls {EXTENSION} --weight-transfer-config.backend {FILES}": not extended
            or room != FILES,
            f"takes no adapters of rank {rank}; start it with --enable-lora --max-lora-rank {rank}": rank > 0
            and (lora is None or lora["max_lora_rank"] < rank),
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise ConfigError(f"sampling.server: vLLM at {self.address} {what}")
