"""A running vLLM server, behind the same door: tokens in, tokens and log-probabilities out.

The server belongs to one run. Weights go to it as files in a folder that both see: the whole model once and after every
step, or with LoRA the base once and then each version's adapter. It loads them when told to (`/collective_rpc`,
`/v1/load_lora_adapter`), forgets what it cached (`/reset_prefix_cache`) and takes a new version label
(`/update_weight_version`), which it then writes on every answer: one of another version is an error. As in this
process, a probe must get the log-probabilities of our own forward pass before a version counts as handed over.

Whether a server can do this (its settings, its device) is asked before anything is sent.
"""

from __future__ import annotations

import math
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
from safetensors.torch import save_file

from whet.errors import ConfigError, SamplerError, boundary
from whet.files import writing
from whet.models.language import LanguageModel
from whet.records import Completion
from whet.sampling.base import Request
from whet.sampling.bridge import run
from whet.sampling.calls import Call, Caller, Patience, excerpt
from whet.sampling.weight_sync import base_weights, check_probe, check_temperature, complete, stopping

PATIENCE = Patience(request_s=600.0, total_s=3600.0)
"""An answer of many thousand tokens on a full server takes minutes, and so does reading a large model."""
NO_LOGPROB = -9999.0
"""What the server writes for a log-probability that is no number or that it does not have."""
REMEDY = {
    403: "",
    404: "; start it with VLLM_SERVER_DEV_MODE=1 (weights) and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (adapters)",
}


class VllmServerSampler:
    """`TokenSampler` over a running vLLM server, with the model's weights as of the last `publish`."""

    def __init__(
        self,
        model: LanguageModel,
        server: str,
        *,
        max_running: int = 256,
        folder: Path | None = None,
        patience: Patience = PATIENCE,
    ) -> None:
        """Look at the server, and hand it the weights as version 0.

        `server` is `http://host:port`; at most `max_running` requests are under way together; files go under
        `folder`, which the server must see under the same path (None: the machine's own folder for such things).
        `ConfigError` where the server's settings do not fit, `SamplerError` where it does not answer as it should.
        """
        self.model, self.version = model, -1
        self._server = server.rstrip("/")
        self._adapter: str | None = None
        self._name = f"whet-{secrets.token_hex(4)}"
        self._caller = Caller(
            f"vLLM at {self._server}", patience, concurrency=max_running, remedy=lambda code: REMEDY.get(code, "")
        )
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="whet-vllm-", dir=folder)
        except OSError as error:
            raise ConfigError(
                f"sampling.server_folder is {folder}, where nothing can be written ({error.strerror}); name a folder "
                "that exists here and where the server is"
            ) from error
        with boundary(SamplerError, f"vLLM at {self._server}: does not describe itself as a vLLM server does"):
            self._check_settings(self._tell("/server_info?config_format=json", None, _json)["vllm_config"])
        if model.adapter is not None:
            self._load_weights("base")
        self.publish(0)

    def publish(self, version: int) -> None:
        """Hand the model's weights over under this version; `SamplerError` if the server then computes another."""
        self._label = f"{self._name}-{version}"
        if self.model.adapter is None:
            self._load_weights(self._label)
        else:
            self._load_adapter(self._label)
        self._tell("/update_weight_version", {"new_version": self._label}, _json)
        run(check_probe(self, self.model))
        self.version = version

    async def sample(self, request: Request) -> Completion:
        """`TokenSampler`: one call, which the server batches with others."""
        body, read = self._body(request), partial(self._read, request)
        return await self._caller.ask(Call(f"{self._server}/inference/v1/generate", body, read, "a completion"))

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
            raise SamplerError(f"vLLM at {self._server}: the answer is no completion ({said})") from error
        if versions != {self._label}:
            found = ", ".join(sorted(versions)) or "without a version"
            raise SamplerError(
                f"vLLM at {self._server} sampled with weights {found}, and {self._label} were handed over; is another "
                "run using this server?"
            )
        if [token for token, _ in written] != tokens:
            raise SamplerError(
                f"vLLM at {self._server}: {len(tokens)} tokens came with {len(written)} log-probabilities, or of others"
            )
        if not all(math.isfinite(logprob) and logprob > NO_LOGPROB for _, logprob in written):
            raise SamplerError(f"vLLM at {self._server}: the model's log-probabilities are not finite")
        logprobs = [logprob for _, logprob in written]
        return complete(
            request, tokens, logprobs, model=self.model, version=self.version, why=choice.get("finish_reason")
        )

    def _load_weights(self, name: str) -> None:
        """The whole model, from a folder that is gone when this returns."""
        folder = Path(self._folder.name) / name
        folder.mkdir()
        weights = {name: p.to("cpu").contiguous() for name, p in base_weights(self.model)}
        with writing(folder, sum(tensor.nbytes for tensor in weights.values())):
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self._tell("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}, _json)
        shutil.rmtree(folder)
        self._forget_cached()

    def _load_adapter(self, name: str) -> None:
        """An adapter under a name of its own, in the place of the one before; the server may read it again any time."""
        folder = Path(self._folder.name) / name
        self.model.adapter.save_pretrained(folder)
        if self._adapter is not None:
            self._tell("/v1/unload_lora_adapter", {"lora_name": self._adapter}, _text)
            shutil.rmtree(folder.with_name(self._adapter))
        self._tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, _text)
        self._adapter = name
        self._forget_cached()

    def _forget_cached(self) -> None:
        if not self._tell("/reset_prefix_cache", {}, _json).get("success"):
            raise SamplerError(
                f"vLLM at {self._server} keeps the keys and values of the weights before: its prefix cache was not "
                "reset"
            )

    def _tell(self, path: str, body: Mapping[str, Any] | None, read: Any) -> Any:
        method: Literal["GET", "POST"] = "GET" if body is None else "POST"
        return self._caller.one(Call(self._server + path, body or {}, read, f"the answer to {path}", method))

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
                raise ConfigError(f"sampling.server: vLLM at {self._server} {what}")


def _json(response: httpx.Response) -> Any:
    return response.json()


def _text(response: httpx.Response) -> str:
    return response.text
