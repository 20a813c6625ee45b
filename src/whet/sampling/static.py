"""A decode step that is the same kernels over the same addresses every time, so that a GPU may record it once.

A small step of decoding is a few hundred kernels, and starting them one by one takes longer than they run. A CUDA graph
starts them together, but only if nothing about them changes: so every slot takes part, whoever is in it, the columns
that are looked at are a bucket, and which column is written and where a row begins are tensors. What a slot without a
row computes is not read; a column that a row does not see has a bias of -inf, as in the step of changing shape
(`cache.Decode`), which computes the same and to which a recorded step is compared before it is believed.

A recording lasts for one `sample`: the next one's cache, and below float32 its weights, are elsewhere.

Legend: S slots, H query heads, K key-value heads, D head size, L columns of the bucket, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whet.models.attention import Call
from whet.sampling.cache import Cache, Decode, Rows, attend_rows
from whet.sampling.forward import Forward

BUCKET = 256
"""Columns are looked at in multiples of this: each multiple is a recording of its own."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE_TOLERANCE = 0.25
"""Largest difference between log-probabilities of a recorded step and of the other, in and below float32."""

Run = Callable[[], Tensor]


class EagerStep:
    """Logits of the next token, by kernels for just the rows and columns that there are."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def __call__(self, token_S: Tensor, position_S: Tensor, rows: Rows, column: int) -> Tensor:
        """(rows, V): writes the keys and values of these tokens into this column."""
        return self._forward.logits(self._forward.hidden(token_S, position_S, Decode(rows, column)))


class StaticStep:
    """The same by kernels of one shape for each bucket of columns.

    Only where prompts stand in front of their answers; kept apart, their places change as rows come and go.
    """

    def __init__(self, forward: Forward, cache: Cache, device: torch.device) -> None:
        self._forward, self._cache = forward, cache
        self._token_S, self._position_S, self._first_S = torch.zeros(3, cache.slots, dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._rows: Rows | None = None

    def __call__(self, token_S: Tensor, position_S: Tensor, rows: Rows, column: int) -> Tensor:
        """(rows, V): writes the keys and values of these tokens into this column."""
        self.place(token_S, position_S, rows, column)
        return self.run(self.bucket(column))[: rows.count]

    def place(self, token_S: Tensor, position_S: Tensor, rows: Rows, column: int) -> None:
        """Put what the step reads where it reads it."""
        self._token_S[: rows.count] = token_S
        self._position_S[: rows.count] = position_S
        self._column.fill_(column)
        if rows is not self._rows:
            self._rows = rows
            self._first_S.zero_()  # a slot without a row: one that saw no column would write NaN, which stays
            self._first_S[: rows.count] = torch.tensor(rows.firsts, device=self._first_S.device)

    def bucket(self, column: int) -> int:
        """How many columns a step that writes this one looks at."""
        return min(self._cache.columns, -(-(column + 1) // BUCKET) * BUCKET)

    def run(self, columns: int) -> Tensor:
        """Logits (S, V) of all slots; only tensors decide what is computed."""
        layout = _StaticDecode(self._cache, self._first_S, self._column, columns)
        return self._forward.logits(self._forward.hidden(self._token_S, self._position_S, layout))


class RecordedStep:
    """`StaticStep`, each bucket recorded at its first use and compared with `EagerStep`; else that, with a warning."""

    def __init__(self, eager: EagerStep, static: StaticStep, record: Callable[[Run], Run]) -> None:
        self._eager, self._static, self._record = eager, static, record
        self._recordings: dict[int, Run] = {}
        self._trusted = True

    def __call__(self, token_S: Tensor, position_S: Tensor, rows: Rows, column: int) -> Tensor:
        """(rows, V): writes the keys and values of these tokens into this column."""
        if not self._trusted:
            return self._eager(token_S, position_S, rows, column)
        self._static.place(token_S, position_S, rows, column)
        columns = self._static.bucket(column)
        if columns in self._recordings:
            return self._recordings[columns]()[: rows.count]
        expected = self._eager(token_S, position_S, rows, column)
        try:
            recording = self._record(lambda: self._static.run(columns))
            gap = _gap(recording()[: rows.count], expected)
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


Step = EagerStep | StaticStep | RecordedStep


def step_for(forward: Forward, cache: Cache, device: torch.device, *, plain: bool) -> Step:
    """Recorded on a GPU, where the forward pass is our own and prompts are not kept apart."""
    eager = EagerStep(forward)
    if device.type != "cuda" or cache.prompts or not plain:
        return eager
    return RecordedStep(eager, StaticStep(forward, cache, device), record_cuda_graph)


@dataclass(slots=True)
class _StaticDecode:
    """One new token for each slot: `Layout` whose shapes depend on the bucket alone."""

    cache: Cache
    first_S: Tensor
    column: Tensor
    columns: int
    biases: dict[int | None, Tensor] = field(default_factory=dict)
    """(S * K, 1, L) by the window."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """`Layout`."""
        layer, S, K = self.cache.layer(call.layer, key), self.cache.slots, key.shape[1]
        layer.keys.index_copy_(3, self.column, key[0].transpose(0, 1)[..., None])
        layer.values.index_copy_(2, self.column, value[0].transpose(0, 1)[:, :, None])
        keys = layer.keys[..., : self.columns].flatten(0, 1)
        values = layer.values[:, :, : self.columns].flatten(0, 1)
        query = query[0].transpose(0, 1).reshape(S * K, -1, query.shape[3])
        if call.window not in self.biases:
            self.biases[call.window] = self._bias(call.window, query, K)
        return attend_rows(query, keys, values, self.biases[call.window], call).view(1, S, -1, query.shape[2])

    def _bias(self, window: int | None, like: Tensor, heads: int) -> Tensor:
        at = torch.arange(self.columns, device=like.device)
        hidden = (at < self.first_S[:, None]) | (at > self.column)
        if window is not None:
            hidden = hidden | (at <= self.column - window)
        # A slot without a row begins at 0 and sees zeros, or what a row that has left wrote.
        bias = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, float("-inf"))
        return bias[:, None].repeat_interleave(heads, 0)


def _gap(found: Tensor, expected: Tensor) -> float:
    found, expected = (logits.double().log_softmax(-1) for logits in (found, expected))
    return float((found - expected).abs().max())
