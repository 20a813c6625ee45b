"""The vLLM engine in this process, behind the same door: tokens in, tokens and log-probabilities out.

vLLM holds a copy of the weights in its own layout, so they must be handed over. `publish` does it in memory and then
proves it: tensors that vLLM keeps as they are must be equal to ours bit for bit, a probe must get the log-probability
that our own forward pass gives it, and everything cached under the old weights must be gone. With LoRA the base goes
over once and each version's adapter after it, from a folder, as vLLM's own adapter under a new id.

vLLM changes the process that it is loaded into: it seeds global generators and, on a CPU, replaces
`torch.set_num_threads`. Both are put back; its usage reports are switched off. Its parallel state is one for the whole
process, and an engine that ends takes it along, so there is one engine at a time: a new sampler ends the one before.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.errors import ConfigError, MissingExtra, ModelError, SamplerError
from whet.models.language import LanguageModel
from whet.records import Completion
from whet.sampling.base import Driver, Request, run
from whet.sampling.weight_sync import base_weights, check_probe, check_temperature, complete, stopping

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: tensors are handed over, not pickled
    "VLLM_NO_USAGE_STATS": "1",
}
PREFILL_TOKENS = 8192
"""Most prompt tokens computed at once on a CPU, or one prompt of any length."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The sizes that vLLM has kernels for; a rank in between takes the next one."""

_ends_living: list[weakref.finalize[..., VllmSampler]] = []
"""Ends the engine of this process, where there is one."""


class VllmSampler:
    """`TokenSampler` over a vLLM engine, with a copy of the model's weights as of the last `publish`."""

    def __init__(self, model: LanguageModel, *, max_running: int = 256, cache_gib: float = 4.0) -> None:
        """Start an engine for this model, which takes seconds to minutes, and hand it the weights as version 0.

        `MissingExtra` where vLLM is not installed, `ModelError` where it cannot run the model.
        """
        vllm = _import()
        self.model = model
        self.version = -1
        self._adapters = 0
        self._adapter: Any = None
        self._asked: dict[str, Request] = {}
        self._count = 0
        self._driver = Driver("vLLM's engine", self)
        # vLLM reads the model's shape from a folder, and an adapter each time that there is a new one.
        self._folder = tempfile.TemporaryDirectory(prefix="whet-vllm-")
        _write_config(model, Path(self._folder.name))
        settings = _settings(model, self._folder.name, max_running, cache_gib)
        while _ends_living:
            _ends_living.pop()()
        with _as_guest():
            try:
                self._engine: Any = vllm.LLM(**settings)
            except Exception as error:
                raise ModelError(f"{model.name}: vLLM cannot run it with these settings: {error}") from error
        self._end = weakref.finalize(self, self._engine.llm_engine.engine_core.shutdown)
        _ends_living.append(self._end)
        if model.adapter is not None:
            self._load_weights()
        self.publish(0)

    def publish(self, version: int) -> None:
        """Hand the model's weights over under this version; `SamplerError` if vLLM then computes something else."""
        if self.model.adapter is None:
            self._load_weights()
        else:
            self._load_adapter()
        if not self._engine.reset_prefix_cache():
            raise SamplerError("vLLM keeps the keys and values of the weights before: its prefix cache was not reset")
        run(check_probe(self.sample, self.model))
        self.version = version

    async def sample(self, request: Request) -> Completion:
        """`TokenSampler`. Whole blocks of a prompt that others share are computed once."""
        if not self._end.alive:
            raise SamplerError("this vLLM engine has ended: there is one in a process, and a newer sampler has its own")
        return await self._driver.sample(request)

    # ------------------------------------------------------------------------------ `base.Stepper`

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._asked)

    def submit(self, request: Request) -> str:
        """Hand a request to vLLM, under a name of its own."""
        self._count += 1
        name = str(self._count)
        prompt = {"prompt_token_ids": [int(token) for token in request.prompt]}
        with _as_guest():
            self._engine.llm_engine.add_request(name, prompt, _params(request), lora_request=self._adapter)
        self._asked[name] = request
        return name

    def cancel(self, ticket: str) -> None:
        """Take a request back."""
        if self._asked.pop(ticket, None) is not None:
            self._engine.llm_engine.abort_request([ticket])

    def clear(self) -> None:
        """Take every request back."""
        for ticket in tuple(self._asked):
            self.cancel(ticket)

    def step(self) -> list[tuple[str, Completion | SamplerError]]:
        """One step of vLLM's scheduler."""
        with _as_guest():
            outputs = self._engine.llm_engine.step()
        return [(output.request_id, self._complete(output)) for output in outputs if output.finished]

    def _complete(self, output: Any) -> Completion | SamplerError:
        request, (written,) = self._asked.pop(output.request_id), output.outputs
        logprobs = written.logprobs.logprobs
        try:
            return complete(
                request, written.token_ids, logprobs, model=self.model, version=self.version, why=written.finish_reason
            )
        except SamplerError as error:
            return error

    def _load_weights(self) -> None:
        """The tensors in memory, through vLLM's own loader; an adapter's are left out."""
        self._engine.collective_rpc(_receive, args=(dict(base_weights(self.model)),))

    def _load_adapter(self) -> None:
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        folder = Path(self._folder.name) / f"adapter-{self._adapters}"
        self.model.adapter.save_pretrained(folder)
        before = self._adapter
        self._adapter = LoRARequest(folder.name, self._adapters, str(folder))
        self._engine.llm_engine.add_lora(self._adapter)  # read now, not at the first request
        if before is not None:
            self._engine.llm_engine.remove_lora(before.lora_int_id)
            shutil.rmtree(before.lora_path)


def _import() -> Any:
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    try:
        import vllm
    except ImportError as error:
        raise MissingExtra("sampling.engine is vllm, which is not installed: pip install 'whet[vllm]'") from error
    return vllm


@contextmanager
def _as_guest() -> Iterator[None]:
    """Put back what vLLM changes of the process: torch's random state and how its threads are set."""
    set_threads = torch.set_num_threads
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_threads


def _settings(model: LanguageModel, folder: str, max_running: int, cache_gib: float) -> dict[str, Any]:
    """What `vllm.LLM` is told. Weights come later; log-probabilities are those of what is sampled from."""
    settings: dict[str, Any] = {
        "model": folder,
        "load_format": "dummy",
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "dtype": model.precision,
        "max_model_len": model.max_length,
        "max_num_seqs": max_running,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": int(cache_gib * 2**30),
        "gpu_memory_utilization": 0.01,  # only what must be free at the start, now that the cache has its size
        "seed": 0,
    }
    if model.device.type == "cpu":
        # Compiling for a CPU takes minutes and pays little. Half a prompt in one step and half in the next cannot be:
        # vLLM then turns a request's random numbers back, which a CPU's generator does not know how to.
        batch = max(PREFILL_TOKENS, model.max_length)
        settings |= {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": batch}
    if model.adapter is not None:
        rank = max(config.r for config in model.adapter.peft_config.values())
        fitting = next((size for size in LORA_RANKS if size >= rank), None)
        if fitting is None:
            raise ConfigError(f"train.lora.rank is {rank}; vLLM serves adapters of rank {LORA_RANKS[-1]} at most")
        settings |= {"enable_lora": True, "max_lora_rank": fitting, "max_loras": 1, "max_cpu_loras": 2}
    return settings


def _write_config(model: LanguageModel, folder: Path) -> None:
    config = copy.deepcopy(model.module.config)
    config.architectures = [type(model.module).__name__]
    config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)  # stop strings are matched on text


def _params(request: Request) -> Any:
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as VllmParams

    params = request.params
    check_temperature(params)
    return VllmParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k or 0,
        seed=request.seed,
        **stopping(params),
        logprobs=0,  # those of the sampled tokens and no others
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _receive(worker: Any, weights: dict[str, Tensor]) -> None:
    """In vLLM's worker: load the weights, and compare what it keeps as it is."""
    worker.reload_weights(weights_iterator=iter(weights.items()))
    module = worker.model_runner.get_model()
    repack_tied_head(module)
    compare(module, weights)


def compare(module: Any, weights: Mapping[str, Tensor]) -> None:
    """Raise `SamplerError` where a tensor that vLLM keeps as it is is another than the one that was sent."""
    compared = 0
    for name, held in module.named_parameters():
        sent = weights.get(name.replace(".base_layer.", "."))
        if sent is not None and held[: len(sent)].shape == sent.shape:  # vLLM pads a vocabulary at its end
            compared += 1
            if not torch.equal(held[: len(sent)], sent.to(held)):
                raise SamplerError(f"weights were handed over, but vLLM still has another {name}")
    if not compared:
        raise SamplerError("nothing of what vLLM holds can be compared with the weights that were handed over")


def repack_tied_head(module: Any) -> None:
    """A head that is tied to the embeddings gets no weights of its own, but on a CPU vLLM multiplies by a packed copy.

    vLLM 0.32 does not renew the copy: without this the head would stay as it was at the start.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for head in module.modules():
        if isinstance(head, ParallelLMHead):
            head.quant_method.process_weights_after_loading(head)
