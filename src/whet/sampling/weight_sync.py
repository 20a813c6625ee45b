"""What vLLM gets and gives, in this process or behind HTTP: weights that it must prove, completions that must be whole.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from whet.errors import ConfigError, SamplerError
from whet.models.attention import Tree, TreeLayout
from whet.models.export import plain_name
from whet.models.heads import SCORE
from whet.models.language import LanguageModel
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
        if ".lora_" not in name and name != f"{SCORE}.weight":
            yield plain_name(name), p.detach()


async def check_probe(sampler: TokenSampler, model: LanguageModel) -> None:
    """A few greedy tokens must have the log-probabilities that the model itself gives them; else `SamplerError`."""
    prompt = tuple(n * 7 % model.vocabulary for n in range(2, 14))
    params = SamplingParams(max_tokens=PROBE_TOKENS, temperature=0)
    written = await sampler.sample(Request(prompt=prompt, seed=0, params=params))
    gap = (_logp(model, prompt, written.tokens.tolist()) - torch.tensor(written.logprobs)).abs().max().item()
    if not gap <= PROBE_TOLERANCE[model.compute]:
        raise SamplerError(
            f"{model.name}: weights were handed over, but vLLM's log-probabilities differ by {gap:.3g} on a "
            f"probe (at most {PROBE_TOLERANCE[model.compute]}): it does not compute what the trainer does"
        )


def check_temperature(params: SamplingParams) -> None:
    """`ConfigError` for a temperature that vLLM would replace by another."""
    if 0 < params.temperature < LOWEST_TEMPERATURE:
        raise ConfigError(
            f"sampling.temperature is {params.temperature}, and vLLM samples at {LOWEST_TEMPERATURE} or above; use 0"
        )


def complete(
    request: Request, tokens: Sequence[int], logprobs: Sequence[float], *, version: int, why: str
) -> Completion:
    """What vLLM wrote; `SamplerError` if that is not all of it. `why` is the reason that it gives for the end."""
    params = request.params
    stopped = len(tokens) > 0 and tokens[-1] in params.stop_ids
    if not stopped and len(tokens) != params.max_tokens:
        raise SamplerError(f"vLLM ended a completion after {len(tokens)} of {params.max_tokens} tokens: {why}")
    return Completion(
        tokens=token_ids(tokens),
        logprobs=np.array(logprobs, np.float32),
        version=version,
        ending=Ending.STOP if stopped else Ending.LENGTH,
    )


@torch.no_grad()
def _logp(model: LanguageModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """log p of each token after the prompt under the model's own forward pass, on the CPU."""
    model.module.eval()
    stream_N = torch.tensor([*prompt, *tokens], device=model.device)
    layout = TreeLayout((Tree(0, (len(stream_N),)),), model.device, model.backend)
    logits_NV = model.logits(model.hidden(stream_N, layout.positions_N, layout)[len(prompt) - 1 : -1])
    chosen_N = stream_N[len(prompt) :, None]
    return logits_NV.float().log_softmax(-1).gather(-1, chosen_N)[:, 0].cpu()
