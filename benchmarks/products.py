"""A step's products of weights alone: `python -m benchmarks.products [--threads N]`, a line for each number of rows.

The weights of the small model (5.8 M) one after the other, as a step of decoding reads them: more than the second
level of cache holds. CPU milliseconds for all of them, the least of nine, by MKL and oneDNN on the weights as they
are, by MKL on a transposed copy, and by oneDNN on a copy in its own order (`whet.models.matmul.product`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.make_model import SHAPES

ROWS = (4, 8, 16, 32, 64, 256, 1024)


def main() -> None:
    """Time every way with every number of rows."""
    parser = argparse.ArgumentParser(description="time the products of a decoding step")
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    shape = SHAPES["small"]
    size = shape.hidden // shape.heads
    layer = [
        (size * (shape.heads + 2 * shape.kv_heads), shape.hidden),
        (shape.hidden, size * shape.heads),
        (2 * shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
    ]
    weights = [torch.randn(sizes) for sizes in layer * shape.layers + [(shape.vocabulary, shape.hidden)]]
    onednn = torch.ops.mkldnn._linear_pointwise
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, 16) for weight in weights]
    ways: dict[str, tuple[list[Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
        "mkl": (weights, F.linear),
        "onednn": (weights, lambda x, weight: onednn(x, weight, None, "none", [], "")),
        "mkl_across": ([weight.t().contiguous() for weight in weights], torch.mm),
        "onednn_packed": (packed, lambda x, weight: onednn(x, weight, None, "none", [], "")),
    }
    with torch.inference_mode():
        for rows in ROWS:
            inputs = [torch.randn(rows, weight.shape[1]) for weight in weights]
            found = {name: round(_least_ms(held, inputs, multiply), 2) for name, (held, multiply) in ways.items()}
            gflop = 2e-9 * rows * sum(weight.numel() for weight in weights)
            sys.stdout.write(json.dumps({"rows": rows, "gflop": round(gflop, 3), "cpu_ms": found}) + "\n")


def _least_ms(weights: list[Tensor], inputs: list[Tensor], multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
    taken = []
    for _ in range(9):
        began = time.process_time()
        for x, weight in zip(inputs, weights, strict=True):
            multiply(x, weight)
        taken.append(time.process_time() - began)
    return 1e3 * min(taken)


if __name__ == "__main__":
    main()
