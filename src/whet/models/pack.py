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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whet.models.attention import Tree, TreeLayout
from whet.models.marks import RoleTable
from whet.records import Atom, TokenIds


@dataclass(frozen=True, slots=True)
class Packed:
    """A micro-batch as tensors."""

    input_N: Tensor
    layout: TreeLayout
    source_T: Tensor
    place_T: Tensor
    target_T: Tensor
    role_N: Tensor | None = None
    """The role after each token of the stream, where adapters are routed by it."""


def prompt_ends(packed: Packed) -> Tensor:
    """(T,): where the prompt ends that each trained token's row shares; the rows must share one."""
    trees, device = packed.layout.trees, packed.place_T.device
    ends = torch.tensor([tree.size for tree in trees], device=device).cumsum(0)
    own = torch.tensor([tree.size - tree.prefix for tree in trees], device=device)
    prompt_ends: Tensor = ends - own - 1
    return prompt_ends[torch.bucketize(packed.place_T, ends, right=True)]


def pack(atoms: Sequence[Atom], device: torch.device, backend: str = "flash", roles: RoleTable | None = None) -> Packed:
    """The atoms one after another, each as its shared prompt and then every row's own tokens."""
    stream: list[TokenIds] = []
    sources: list[npt.NDArray[np.int64]] = []
    places: list[npt.NDArray[np.int64]] = []
    targets: list[TokenIds] = []
    trees: list[Tree] = []
    passed: list[npt.NDArray[np.int64]] = []
    end = 0
    for atom in atoms:
        shared = atom.rows[0].shared
        stream.append(atom.rows[0].tokens[:shared])
        end += shared
        prompt_end = end - 1
        if roles is not None:
            read = [roles.roles(row.tokens) for row in atom.rows]
            passed += [read[0][:shared], *(roles_N[shared:] for roles_N in read)]
        for row in atom.rows:
            own, own_T = row.tokens[shared:], np.flatnonzero(row.trained[shared:])
            place_T = own_T + end
            # A row's first own token is predicted where its prompt ends; without a prompt it is never trained.
            sources.append(np.where(own_T == 0, prompt_end, place_T - 1))
            places.append(place_T)
            targets.append(own[own_T])
            stream.append(own)
            end += len(own)
        trees.append(Tree(shared, tuple(len(row.tokens) - shared for row in atom.rows)))
    return Packed(
        input_N=torch.from_numpy(np.concatenate(stream, dtype=np.int64)).to(device),
        layout=TreeLayout(tuple(trees), device, backend),
        source_T=torch.from_numpy(np.concatenate(sources)).to(device),
        place_T=torch.from_numpy(np.concatenate(places)).to(device),
        target_T=torch.from_numpy(np.concatenate(targets, dtype=np.int64)).to(device),
        role_N=torch.from_numpy(np.concatenate(passed)).to(device) if passed else None,
    )
