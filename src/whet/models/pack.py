"""Atoms as one stream of tokens: what the model computes, and where the trained tokens are read off.

A row's target at position t is predicted by the token before it, which for the first answer token is the last
token of the shared prompt. So each trained token has a `source` (where in the stream its logits come from), a
`place` (where it stands itself: a reward is read there) and a `target` (its id); the prompt itself is in the stream
once for all rows of its atom.

Legend: N tokens of the stream, T trained tokens, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whet.models.attention import Tree, TreeLayout
from whet.records import Atom


@dataclass(frozen=True, slots=True)
class Packed:
    """A micro-batch as tensors."""

    input_N: Tensor
    layout: TreeLayout
    source_T: Tensor
    place_T: Tensor
    target_T: Tensor


def prompt_ends(packed: Packed) -> Tensor:
    """(T,): where the prompt ends that each trained token's row shares; the rows must share one."""
    trees, device = packed.layout.trees, packed.place_T.device
    ends = torch.tensor([tree.size for tree in trees], device=device).cumsum(0)
    own = torch.tensor([tree.size - tree.prefix for tree in trees], device=device)
    prompt_ends: Tensor = ends - own - 1
    return prompt_ends[torch.bucketize(packed.place_T, ends, right=True)]


def pack(atoms: Sequence[Atom], device: torch.device, backend: str = "flash") -> Packed:
    """The atoms one after another, each as its shared prompt and then every row's own tokens."""
    stream: list[int] = []
    source: list[int] = []
    place: list[int] = []
    target: list[int] = []
    trees: list[Tree] = []
    for atom in atoms:
        shared, start = atom.rows[0].shared, len(stream)
        stream += atom.rows[0].tokens[:shared]
        for row in atom.rows:
            base = len(stream) - shared  # position t >= shared of this row stands at base + t
            for t in range(shared, len(row.tokens)):
                if row.trained[t]:
                    source.append(base + t - 1 if t > shared else start + shared - 1)
                    place.append(base + t)
                    target.append(row.tokens[t])
            stream += row.tokens[shared:]
        trees.append(Tree(shared, tuple(len(row.tokens) - shared for row in atom.rows)))
    return Packed(
        input_N=torch.tensor(stream, device=device),
        layout=TreeLayout(tuple(trees), device, backend),
        source_T=torch.tensor(source, dtype=torch.long, device=device),
        place_T=torch.tensor(place, dtype=torch.long, device=device),
        target_T=torch.tensor(target, dtype=torch.long, device=device),
    )
