"""A decode step that is the same kernels over the same addresses every time, so that a GPU may record it once.

A small step of decoding is a few hundred kernels, and starting them one by one takes longer than they run. A CUDA graph
starts them together, but only if nothing about them changes: so every place takes part in every step, the columns that
are looked at are a bucket, and where a row stands is a tensor. What a place without a row computes is not read; a
column that a row does not see has a bias of -inf, as in the step of changing shape (`layouts.Decode`), which computes
the same and to which a recorded step is compared before it is believed.

A recording lasts until the engine has nothing left to do: the next cache, and below float32 the next weights, are
elsewhere.

Legend: S places of a slab, H query heads, K key-value heads, D head size, W columns of the bucket, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whet.models.attention import AttentionCall
from whet.sampling.forward import Forward
from whet.sampling.kv_cache import Slab, hidden_columns
from whet.sampling.layouts import DecodeBatch, attend_rows

BUCKET = 256
"""Columns are looked at in multiples of this: each multiple is a recording of its own."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE_TOLERANCE = 0.25
"""Largest difference between log-probabilities of a recorded step and of the other, in and below float32."""

Run = Callable[[], Tensor]
Step = Callable[[Tensor, Tensor, DecodeBatch], Tensor]
"""(tokens (S,), their positions (S,), the rows) -> logits of the next token (rows, V)."""


class StaticStep:
    """The same by kernels of one shape for each bucket of columns.

    Only where all rows stand in one slab, with their prompts in front; it is for that slab, wherever its tensors are
    when it first runs.
    """

    def __init__(self, forward: Forward, slab: Slab, device: torch.device) -> None:
        self._forward, self.slab = forward, slab
        self._token_S, self._position_S = torch.zeros(2, slab.capacity, dtype=torch.long, device=device)

    def __call__(self, token_S: Tensor, position_S: Tensor, longest: int) -> Tensor:
        """(rows, V): writes the keys and values of these tokens; the longest row has so many."""
        self.place(token_S, position_S)
        return self.run(self.bucket(longest))[: len(token_S)]

    def place(self, token_S: Tensor, position_S: Tensor) -> None:
        """Put what the step reads where it reads it."""
        self._token_S[: len(token_S)] = token_S
        self._position_S[: len(position_S)] = position_S

    def bucket(self, longest: int) -> int:
        """How many columns a step looks at whose longest row has so many."""
        return min(self.slab.width, -(-longest // BUCKET) * BUCKET)

    def run(self, columns: int) -> Tensor:
        """Logits (S, V) of all places; only tensors decide what is computed."""
        layout = _StaticDecode(self.slab, self._position_S, columns)
        return self._forward.logits(self._forward.hidden(self._token_S, self._position_S, layout))


class RecordedStep:
    """`StaticStep`, each bucket recorded at its first use and compared with `eager`; else that, with a warning."""

    def __init__(self, eager: Step, static: Callable[[Slab], StaticStep], record: Callable[[Run], Run]) -> None:
        self._eager, self._make, self._record = eager, static, record
        self._static: StaticStep | None = None
        self._recordings: dict[int, Run] = {}
        self._where = 0
        self._trusted = True

    def __call__(self, token_S: Tensor, position_S: Tensor, batch: DecodeBatch) -> Tensor:
        """(rows, V): writes the keys and values of these tokens into their rows' next columns."""
        if not self._trusted or not batch.alone or len(batch.slabs) > 1:
            return self._eager(token_S, position_S, batch)
        (slab,) = batch.slabs
        where = slab.keys[0].data_ptr()
        if self._static is None or self._static.slab is not slab or self._where != where:
            # A recording reads and writes addresses: of a slab that was made anew they are another's.
            self._static, self._recordings, self._where = self._make(slab), {}, where
        self._static.place(token_S, position_S)
        columns = self._static.bucket(batch.longest)
        if columns in self._recordings:
            return self._recordings[columns]()[: len(token_S)]
        expected = self._eager(token_S, position_S, batch)
        try:
            static = self._static
            recording = self._record(lambda: static.run(columns))
            gap = _gap(recording()[: len(token_S)], expected)
        except RuntimeError as error:
            return self._distrust(f"could not be recorded ({error})", expected)
        if not gap <= TOLERANCE.get(expected.dtype, COARSE_TOLERANCE):
            return self._distrust(f"gives log-probabilities that are off by {gap:.3g}", expected)
        self._recordings[columns] = recording
        return expected

    def _distrust(self, why: str, expected: Tensor) -> Tensor:
        self._trusted = False
        self._recordings.clear()
        logging.getLogger(__name__).warning("decoding goes on without CUDA graphs, more slowly: a step %s", why)
        return expected


def record_cuda_graph(run: Run) -> Run:
    """Run it once for what is made at a first use, then record it. `RuntimeError` where it cannot be recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@dataclass(slots=True)
class _StaticDecode:
    """One new token for each place of a slab: `Layout` whose shapes depend on the bucket alone."""

    slab: Slab
    position_S: Tensor
    columns: int
    biases: dict[int | None, Tensor] = field(default_factory=dict)
    """(S * K, 1, W) by the window."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """`Layout`."""
        S, K = self.slab.capacity, key.shape[1]
        held_keys, held_values = self.slab.keys[call.layer], self.slab.values[call.layer]
        rows, at = torch.arange(S * K, device=query.device), self.position_S.repeat_interleave(K)
        held_keys[rows, :, at] = key[0].transpose(0, 1).flatten(0, 1)
        held_values[rows, at] = value[0].transpose(0, 1).flatten(0, 1)
        keys, values = held_keys[..., : self.columns], held_values[:, : self.columns]
        query = query[0].transpose(0, 1).reshape(S * K, -1, query.shape[3])
        if call.window not in self.biases:
            hidden = hidden_columns(self.position_S, self.columns, call.window)
            bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill(hidden, float("-inf"))
            self.biases[call.window] = bias[:, None].repeat_interleave(K, 0)
        return attend_rows(query, keys, values, self.biases[call.window], call).view(1, S, -1, values.shape[2])


def _gap(found: Tensor, expected: Tensor) -> float:
    found, expected = (logits.double().log_softmax(-1) for logits in (found, expected))
    return float((found - expected).abs().max())
