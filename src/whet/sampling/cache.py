"""Keys and values of the sequences that are being written.

All running sequences write into the same column: they end at the same place, and begin where their lengths have it.
So a step writes one column of each layer, whoever is there looks at the columns since its own first one, and a
sliding window is the last few columns. A row that ends is replaced by the last one; when the columns are used up,
what is still seen moves to the front.

Long prompts with several answers are kept once, apart (`prompts`): the queries of all answers to a prompt are rows of
one product with its keys, and one softmax covers the prompt and what the row has written. Short ones are copied in
front of each answer, which is faster.

Keys are kept transposed, (D, L): a product of few queries with them is then up to a third faster where they come
from memory.

Legend: S running sequences, P prompts, R most answers of one prompt, H query heads, K key-value heads, G query heads
of one key-value head, D head size, L columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whet.models.attention import Call, TreeLayout, weigh


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Of one layer: keys (slots, K, D, L) and values (slots, K, L, D), and the same of prompts that are kept apart."""

    keys: Tensor
    values: Tensor
    prompt_keys: Tensor
    prompt_values: Tensor


@dataclass(slots=True)
class Cache:
    """The tensors of all layers, made when a layer first asks; sizes are fixed."""

    slots: int
    columns: int
    prompts: int
    """Prompts that are kept apart; 0: each stands in front of its answers."""
    prompt_columns: int
    layers: list[LayerCache] = field(default_factory=list)

    def layer(self, index: int, like: Tensor) -> LayerCache:
        """The tensors of a layer (like: (1, K, N, D))."""
        while len(self.layers) <= index:
            K, D = like.shape[1], like.shape[3]
            own = ((self.slots, K, D, self.columns), (self.slots, K, self.columns, D))
            apart = ((self.prompts, K, D, self.prompt_columns), (self.prompts, K, self.prompt_columns, D))
            self.layers.append(LayerCache(*(like.new_zeros(shape) for shape in (*own, *apart))))
        return self.layers[index]

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], seen: slice) -> None:
        """Rows that go on take the place of rows that have ended; only these columns hold anything."""
        if not sources:
            return
        for layer in self.layers:
            layer.keys[list(targets), ..., seen] = layer.keys[list(sources), ..., seen]
            layer.values[list(targets), :, seen] = layer.values[list(sources), :, seen]

    def move_prompts(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """The same for prompts."""
        if not sources:
            return
        for layer in self.layers:
            for cache in (layer.prompt_keys, layer.prompt_values):
                cache[list(targets)] = cache[list(sources)]

    def shift(self, rows: int, seen: slice, to: slice) -> None:
        """Move these columns of the running rows to others."""
        for layer in self.layers:
            layer.keys[:rows, ..., to] = layer.keys[:rows, ..., seen].clone()
            layer.values[:rows, :, to] = layer.values[:rows, :, seen].clone()

    def clear_what_is_no_number(self) -> None:
        """A row sees nothing of who had its place before it, but -inf and 0 times NaN are NaN."""
        for layer in self.layers:
            for cache in (layer.keys, layer.values, layer.prompt_keys, layer.prompt_values):
                cache.nan_to_num_(0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a prompt that is computed goes: its tokens in the stream, and its rows or its place among the prompts."""

    tokens: slice
    rows: slice
    prompt: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Computes prompts as a packed stream, and notes each one's keys and values."""

    layout: TreeLayout
    cache: Cache
    entries: Sequence[Entry]
    column: int
    """The prompts end before this column."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """`Layout`."""
        layer = self.cache.layer(call.layer, key)
        for entry in self.entries:
            new_keys, new_values = key[0, :, entry.tokens].transpose(1, 2), value[0, :, entry.tokens]
            length = entry.tokens.stop - entry.tokens.start
            if self.cache.prompts:
                layer.prompt_keys[entry.prompt, ..., :length] = new_keys
                layer.prompt_values[entry.prompt, :, :length] = new_values
            else:
                columns = slice(self.column - length, self.column)
                layer.keys[entry.rows, ..., columns] = new_keys
                layer.values[entry.rows, :, columns] = new_values
        return self.layout.attend(query, key, value, call)


class Rows:
    """Who is running: which columns each row sees, and which prompt it continues. Changes when rows come or go."""

    def __init__(self, cache: Cache, firsts: Sequence[int], prompts: Sequence[int], lengths: Sequence[int]) -> None:
        """First column of each row, its prompt's place, and the length of each prompt that is kept apart."""
        self.cache, self.count = cache, len(firsts)
        self.first = min(firsts)
        self.firsts, self.members, self.lengths = firsts, prompts, lengths
        self.bias: Tensor | None = None
        self.shared: Shared | None = None

    def bias_of(self, like: Tensor, heads: int) -> Tensor:
        """(S * K, 1, L): 0 where a row looks, -inf before its first column."""
        if self.bias is None:
            columns = torch.arange(self.cache.columns, device=like.device)
            hidden = columns < torch.tensor(self.firsts, device=like.device)[:, None]
            self.bias = _bias(hidden, like).repeat_interleave(heads, 0)
        return self.bias

    def shared_of(self, like: Tensor) -> Shared:
        """How queries meet their prompts."""
        if self.shared is None:
            self.shared = Shared.of(self.members, self.lengths, like)
        return self.shared


@dataclass(frozen=True, slots=True)
class Shared:
    """Rows arranged by their prompts, P x R places; a place without a row repeats the prompt's last one."""

    row_PR: Tensor
    place_S: Tensor
    shape: tuple[int, int]
    longest: int
    bias: Tensor

    @classmethod
    def of(cls, members: Sequence[int], lengths: Sequence[int], like: Tensor) -> Shared:
        """From each row's prompt and each prompt's length."""
        rows_P: list[list[int]] = [[] for _ in lengths]
        for row, prompt in enumerate(members):
            rows_P[prompt].append(row)
        R = max(map(len, rows_P))
        place_S = [0] * len(members)
        for prompt, rows in enumerate(rows_P):
            for rank, row in enumerate(rows):
                place_S[row] = prompt * R + rank
        row_PR = [row for rows in rows_P for row in rows + rows[-1:] * (R - len(rows))]
        columns = torch.arange(max(lengths), device=like.device)
        return cls(
            row_PR=torch.tensor(row_PR, device=like.device),
            place_S=torch.tensor(place_S, device=like.device),
            shape=(len(lengths), R),
            longest=max(lengths),
            bias=_bias(columns >= torch.tensor(lengths, device=like.device)[:, None], like)[:, None],
        )

    def by_prompt(self, rows: Tensor) -> Tensor:
        """(S, K, G, X) -> (P, K, R * G, X)."""
        _, K, G, X = rows.shape
        arranged = rows.index_select(0, self.row_PR).view(*self.shape, K, G, X)
        return arranged.transpose(1, 2).reshape(self.shape[0], K, -1, X)

    def by_row(self, grouped: Tensor, G: int) -> Tensor:
        """(P, K, R * G, X) -> (S, K, G, X)."""
        P, R = self.shape
        arranged = grouped.view(P, grouped.shape[1], R, G, -1).transpose(1, 2)
        return arranged.flatten(0, 1).index_select(0, self.place_S)


@dataclass(frozen=True, slots=True)
class Decode:
    """One new token for each running row: writes its key and value, and attends to what the row sees."""

    rows: Rows
    column: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """`Layout`."""
        rows, S, K = self.rows, self.rows.count, key.shape[1]
        layer = rows.cache.layer(call.layer, key)
        layer.keys[:S, ..., self.column] = key[0].transpose(0, 1)
        layer.values[:S, :, self.column] = value[0].transpose(0, 1)
        first = rows.first if call.window is None else max(rows.first, self.column - call.window + 1)
        seen = slice(first, self.column + 1)
        keys, values = layer.keys[:S, ..., seen].flatten(0, 1), layer.values[:S, :, seen].flatten(0, 1)
        # The query heads that share a key-value head are rows of one small product.
        query = query[0].transpose(0, 1).reshape(S * K, -1, query.shape[3])
        bias = rows.bias_of(query, K)[..., seen]
        if rows.cache.prompts:
            assert call.window is None and call.usual, "windows, softcaps and sinks cover prompt and answer at once"
            own = torch.baddbmm(bias, query, keys, alpha=call.scale)
            out = self._with_prompts(query, own, layer, values, call.scale)
        else:
            out = attend_rows(query, keys, values, bias, call)
        return out.view(1, S, -1, query.shape[2])

    def _with_prompts(self, query: Tensor, own: Tensor, layer: LayerCache, values: Tensor, scale: float) -> Tensor:
        shared = self.rows.shared_of(query)
        P, G, K = shared.shape[0], query.shape[1], layer.keys.shape[1]
        prompt_keys, prompt_values = (
            layer.prompt_keys[:P, ..., : shared.longest],
            layer.prompt_values[:P, :, : shared.longest],
        )
        asked = shared.by_prompt(query.unflatten(0, (-1, K)))
        scores = shared.by_row(asked @ prompt_keys * scale + shared.bias, G)
        share = softmax(torch.cat((scores.flatten(0, 1), own), -1))
        seen = shared.by_prompt(share[..., : shared.longest].unflatten(0, (-1, K))) @ prompt_values
        return torch.baddbmm(shared.by_row(seen, G).flatten(0, 1), share[..., shared.longest :], values)


def attend_rows(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, call: Call) -> Tensor:
    """(S * K, G, D), (S * K, D, L), (S * K, L, D) and the bias that hides keys -> (S * K, G, D)."""
    if call.usual:
        return torch.bmm(softmax(torch.baddbmm(bias, query, keys, alpha=call.scale)), values)
    sinks = None
    if call.sinks_H is not None:
        of_heads = call.sinks_H.view(-1, query.shape[1], 1)
        sinks = of_heads.repeat(len(query) // len(of_heads), 1, 1)
    return torch.bmm(weigh(torch.bmm(query, keys) * call.scale, call, bias, sinks), values)


def softmax(scores: Tensor) -> Tensor:
    """Over the last axis, summed in float32 or wider."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _bias(hidden: Tensor, like: Tensor) -> Tensor:
    """(rows, L) -> (rows, 1, L): -inf where hidden."""
    return like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None]
