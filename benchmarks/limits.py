"""What the machine could do: the matrix products of a training pass alone, and a copy of memory.

Measured in the run that they judge, after the timed steps, with the same threads.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from benchmarks.work import Work
from whet.models.language import LanguageModel

COPY_BYTES = 256 * 2**20
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(N, I), (O, I) -> (N, O)."""


def products_cpu_s(model: LanguageModel, tokens: int, trained: int) -> float:
    """CPU seconds of the products that training cannot avoid: three for each linear layer, over `tokens` of the stream.

    The head sees the `trained` tokens only; so many of them are measured that their logits fill 128 MiB at most.
    """
    head = model.module.get_output_embeddings() or model.module.score
    linears = [m for m in model.module.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    shapes = Counter((tokens, *m.weight.shape) for m in linears)
    rows = max(1, min(trained, 2**25 // head.weight.shape[0]))
    seconds = sum(count * _three_products_cpu_s(*shape) for shape, count in shapes.items())
    return seconds + _three_products_cpu_s(rows, *head.weight.shape) * trained / rows


def products_flops(model: LanguageModel, tokens: int, trained: int) -> float:
    """Floating-point operations of the same products."""
    head = model.module.get_output_embeddings() or model.module.score
    linears = [m for m in model.module.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return 6.0 * (tokens * sum(m.weight.numel() for m in linears) + trained * head.weight.numel())


def copy_bytes_per_s() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _seconds(lambda: target.copy_(source), clock=time.perf_counter)


def decode_bytes(work: Work, model: LanguageModel, step: int = 0) -> float:
    """Bytes that decoding this step must read: all weights for each position, and each sequence's own cache."""
    config = model.module.config
    lengths = work.lengths(step)
    prompts = [len(prompt) for prompt in work.token_prompts(step, model.vocabulary)]
    head, embedding = model.module.get_output_embeddings().weight, model.module.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.module.parameters()) - (0 if head is embedding else embedding.numel())
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    seen = sum(sum(range(prompt, prompt + length)) for prompt, length in zip(prompts, lengths, strict=True))
    return 4.0 * (weights * max(lengths) + cached * seen)


def _three_products_cpu_s(rows: int, outputs: int, inputs: int) -> float:
    """Each product by the faster of the libraries that torch has: what the machine could do, whoever uses it."""
    x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    libraries: list[Product] = [torch.nn.functional.linear]
    if torch.backends.mkldnn.is_available():
        libraries.append(_by_onednn)
    products = ((x, weight), (grad, weight.T), (grad.T, x.T))
    return sum(
        min(_seconds(partial(multiply, left, right), clock=time.process_time) for multiply in libraries)
        for left, right in products
    )


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def _seconds(work: Callable[[], object], clock: Callable[[], float], repeats: int = 3) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return median(times)
