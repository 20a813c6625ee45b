"""What vLLM gets and gives, in this process or behind HTTP: weights that it must prove, completions that must be whole.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whet.errors import ConfigError, SamplerError
from whet.models.attention import Tree, TreeLayout
from whet.models.export import plain_name
from whet.models.heads import SCORE
from whet.models.language import LanguageModel
from whet.models.marks import completing, stop_table
from whet.records import Completion, Ending, token_ids
from whet.sampling.base import Request, SamplingParams, TokenSampler

PROBE_TOKENS = 8
PROBE_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5}
"""Largest difference of log-probabilities on the probe; a layer with old weights is off by more."""
LOWEST_TEMPERATURE = 0.01
"""vLLM samples at this temperature where it is asked for a lower one that is not 0."""


def base_weights(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters by the names of a model's files, tied ones once, without adapters and without a critic's head."""
    for name, p in model.module.named_parameters():
        if ".modules_to_save." in name:
            raise ConfigError("train.lora.modules_to_save: vLLM takes adapters alone; use sampling.engine: embedded")
        if ".lora_" not in name and name != f"{SCORE}.weight":
            yield plain_name(name), p.detach()


def sampled_weights(model: LanguageModel) -> dict[str, nn.Parameter]:
    """What training changes and sampling reads, by the trainer's names: of an adapter's run the adapter alone."""
    return {name: p for name, p in model.parameters.items() if name != f"{SCORE}.weight"}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types and shapes of tensors and their bytes, in the order of names."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().to("cpu").contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A request whose answer is known: these tokens, to which the trainer gives these log-probabilities."""

    request: Request
    tokens: list[int]
    logps: list[float]

    def gaps(self, written: Completion) -> np.ndarray:
        """|difference| of each token up to the first that is another one; infinite where that is the first."""
        count = min(len(written.tokens), len(self.tokens))
        same = np.cumprod(written.tokens[:count] == np.array(self.tokens[:count])).sum()
        gaps = np.abs(written.logprobs[:count] - np.array(self.logps[:count], np.float32))
        return gaps[:same] if same else np.array([np.inf])


def probe_request(model: LanguageModel) -> Request:
    """A few tokens at temperature 1."""
    return Request(prompt=_probe_prompt(model), seed=0, params=SamplingParams(max_tokens=2 * PROBE_TOKENS))


async def probe_of(sampler: TokenSampler, model: LanguageModel) -> Probe:
    """What `sampler`, which has the model's weights, writes now, and what the model's own forward pass says of that."""
    request = probe_request(model)
    tokens = (await sampler.sample(request)).tokens.tolist()
    return Probe(request=request, tokens=tokens, logps=_logp(model, request.prompt, tokens).tolist())


async def check_probe(sample: Callable[[Request], Awaitable[Completion]], model: LanguageModel) -> float:
    """A few greedy tokens must have the log-probabilities that the model itself gives them; else `SamplerError`.

    Returns by how much they differ on average.
    """
    prompt = _probe_prompt(model)
    params = SamplingParams(max_tokens=PROBE_TOKENS, temperature=0)
    written = await sample(Request(prompt=prompt, seed=0, params=params))
    gaps = (_logp(model, prompt, written.tokens.tolist()) - torch.tensor(written.logprobs)).abs()
    if not (gap := gaps.max().item()) <= PROBE_TOLERANCE[model.compute]:
        raise SamplerError(
            f"{model.name}: weights were handed over, but vLLM's log-probabilities differ by {gap:.3g} on a "
            f"probe (at most {PROBE_TOLERANCE[model.compute]}): it does not compute what the trainer does"
        )
    return gaps.mean().item()


def stopping(params: SamplingParams) -> dict[str, Any]:
    """The settings by which vLLM ends a completion where we would, with the tokens and the text as they are."""
    settings = {"stop_token_ids": sorted(params.stop_ids), "ignore_eos": True, "detokenize": bool(params.stop)}
    if params.stop:  # matched on the text, special tokens as they are written
        settings |= {"stop": list(params.stop), "include_stop_str_in_output": True, "skip_special_tokens": False}
    return settings


def check_temperature(params: SamplingParams) -> None:
    """`ConfigError` for a temperature that vLLM would replace by another."""
    if 0 < params.temperature < LOWEST_TEMPERATURE:
        raise ConfigError(
            f"sampling.temperature is {params.temperature}, and vLLM samples at {LOWEST_TEMPERATURE} or above; use 0"
        )


def complete(
    request: Request,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    *,
    model: LanguageModel,
    version: int,
    why: str,
    later: tuple[tuple[int, int], ...] = (),
) -> Completion:
    """What vLLM wrote; `SamplerError` if that is not all of it. `why` is the reason that it gives for the end.

    A stop string must be complete with the last token, and not before, as the embedded engine would have it.
    """
    params, ending = request.params, Ending.LENGTH
    if len(tokens) > 0 and tokens[-1] in params.stop_ids:
        ending = Ending.STOP
    elif params.stop:
        complete_at = completing(stop_table(model.tokenizer, model.vocabulary, params.stop), tokens)
        if complete_at is not None and complete_at < len(tokens):
            raise SamplerError(f"vLLM wrote {len(tokens) - complete_at} tokens after a stop string was complete")
        ending = Ending.LENGTH if complete_at is None else Ending.STOP_STRING
    if ending is Ending.LENGTH and len(tokens) != params.max_tokens:
        raise SamplerError(f"vLLM ended a completion after {len(tokens)} of {params.max_tokens} tokens: {why}")
    return Completion(
        tokens=token_ids(tokens), logprobs=np.array(logprobs, np.float32), version=version, ending=ending, later=later
    )


def _probe_prompt(model: LanguageModel) -> tuple[int, ...]:
    return tuple(n * 7 % model.vocabulary for n in range(2, 14))


@torch.no_grad()
def _logp(model: LanguageModel, prompt: Sequence[int] | np.ndarray, tokens: Sequence[int]) -> Tensor:
    """log p of each token after the prompt under the model's own forward pass, on the CPU."""
    model.module.eval()
    stream_N = torch.tensor([*prompt, *tokens], device=model.device)
    if model.routing is not None:
        model.routing.read([stream_N.cpu().numpy()])
    layout = TreeLayout((Tree(0, (len(stream_N),)),), model.device, model.backend)
    logits_NV = model.logits(model.hidden(stream_N, layout.positions_N, layout)[len(prompt) - 1 : -1])
    chosen_N = stream_N[len(prompt) :, None]
    return logits_NV.float().log_softmax(-1).gather(-1, chosen_N)[:, 0].cpu()
