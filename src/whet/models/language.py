"""A language model at work: one forward pass for training, reference, evaluation and sampling.

The module is a Hugging Face causal LM whose attention is ours (`models.attention`); the head sees only the
positions that it is asked about. Weights stay in float32; with `compute` bfloat16 the forward pass is autocast.

It reads atoms as one stream of tokens (`pack`). A row's target at position t is predicted by the token before it, which
for the first answer token is the last token of the shared prompt. So each trained token has a `source` (where in the
stream its logits come from), a `place` (where it stands itself: a reward is read there) and a `target` (its id); the
prompt itself is in the stream once for all rows of its atom.

Legend: N tokens of a packed stream, T trained tokens, R rows, D hidden size, V vocabulary, K outputs of a head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from whet.formulas.logprobs import Linear, LogitRule, chunked_logp
from whet.models.architecture import decoder_of, logit_rule
from whet.models.armo import Gate
from whet.models.attention import Layout, Tree, TreeLayout, pick_backend
from whet.models.context import ContextLayout, ContextRanks
from whet.models.export import save_model
from whet.models.heads import reward_facts
from whet.models.marks import RoleTable, Routing
from whet.models.matmul import linear
from whet.models.noise import noisy, row_lengths
from whet.records import Atom, TokenIds, TokenRow

Want = Literal["logp", "entropy", "value", "score", "top_k"]
"""What may be read of a row's trained tokens without a gradient."""
TEMPLATE_LOCK = "whet_template"
"""Key of a model's config: the chat template that it was trained with."""
ROUTED = "whet_routed"
"""Key of a model's config: the marks between which calls and thinking stand, where two adapters are routed by them."""
TOP_K_ROWS = 256
"""Positions whose logits over the whole vocabulary are held at once to find the most likely tokens."""


def template_of(tokenizer: Any) -> str:
    """Its chat template as text, several by their names; empty where it has none."""
    found = tokenizer.chat_template or ""
    return found if isinstance(found, str) else json.dumps(found, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Ask:
    """What to read of each trained token."""

    want: frozenset[Want]
    temperature: float = 1.0
    top_k: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what comes back."""
        names = (("top_k/ids", "top_k/logp") if name == "top_k" else (name,) for name in sorted(self.want))
        return tuple(column for each in names for column in each)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """Weights, tokenizer and how to compute with them."""

    module: Any
    """A transformers causal LM, possibly with peft adapters or a scalar head inside; or a scalar model."""
    tokenizer: Any
    name: str
    """What the weights were loaded from, for messages and manifests."""
    max_length: int
    device: torch.device
    compute: torch.dtype
    adapter: Any = None
    """The peft model around `module`, where there is one."""
    gate: Gate | None = None
    """What weighs the outputs of a head of several objectives, where something does."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end a turn: an exported model stops at them."""
    routing: Routing | None = None
    """What sends tokens through one of two adapters, where that is done."""
    noise: float | None = None
    """NEFTune's alpha: noise on the embeddings, of passes in training mode alone."""
    context: ContextRanks | None = None
    """The ranks that compute each micro-batch together, where several do."""
    decoder: Any = field(init=False, repr=False)
    """The module's stack of layers below the head."""
    rule: LogitRule = field(init=False)
    """What becomes of the head's products."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder", decoder_of(self.module))
        object.__setattr__(self, "rule", logit_rule(self.module.config))

    def packed(self, atoms: Sequence[Atom]) -> Packed:
        """These atoms as one stream on its device."""
        table = None if self.routing is None else self.routing.table
        packed = pack(atoms, self.device, self.backend, table)
        if self.context is None or len(packed.input_N) >= self.context.size:
            return packed
        size = self.context.size  # a token for each rank: modelling code does not compute none
        more = Atom(rows=(TokenRow(tokens=np.zeros(size, np.int32), trained=np.zeros(size, np.bool_)),))
        return pack([*atoms, more], self.device, self.backend, table)

    @property
    def vocabulary(self) -> int:
        """V, rows of the output head."""
        return int(self.module.get_output_embeddings().weight.shape[0])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; tied ones once."""
        parts = [("", self.module)] if self.gate is None else [("", self.module), ("gate.", self.gate)]
        return {prefix + name: p for prefix, part in parts for name, p in part.named_parameters() if p.requires_grad}

    @property
    def backend(self) -> str:
        """The attention backend for training."""
        return pick_backend(self.device)

    def hidden(self, input_N: Tensor, positions_N: Tensor, layout: Layout, at: Tensor | slice = slice(None)) -> Tensor:
        """Last hidden states (T, D) `at` these tokens of a packed stream."""
        with self.autocast():
            output = self.decoder(
                input_ids=input_N[None], position_ids=positions_N[None], use_cache=False, layout=layout
            )
        hidden_ND: Tensor = output.last_hidden_state[0]
        return hidden_ND[at]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits (T, V) at these hidden states."""
        with self.autocast():
            return self.rule(self.module.get_output_embeddings()(hidden_TD))

    def stream(self, packed: Packed) -> Tensor:
        """Hidden states (N, D) of a micro-batch (of this rank's part of it), which `at` reads."""
        own, layout = slice(None), packed.layout
        asked: Layout = layout
        if self.context is not None:
            own = self.context.own(len(packed.input_N))
            asked = ContextLayout(layout, self.context)
        if self.routing is not None and packed.role_N is not None:
            self.routing.role_N = packed.role_N[own]
        noise: AbstractContextManager[None] = nullcontext()
        if self.noise is not None and self.module.training:
            noise = noisy(self.module.get_input_embeddings(), row_lengths(layout)[own], self.noise)
        with noise:
            return self.hidden(packed.input_N[own], layout.positions_N[own], asked)

    def at(self, stream_ND: Tensor, at_T: Tensor, packed: Packed, read: Callable[..., tuple[Any, ...]]) -> Any:
        """What `read(states, which)` says of the states at these places, and which of the places they are.

        Trained tokens are predicted at `source_T` and stand at `place_T`.
        """
        if self.context is None:
            return read(stream_ND[at_T], slice(None))
        return self.context.joined(len(packed.input_N), stream_ND, at_T, read)

    def logp_at(
        self,
        states_TD: Tensor,
        target_T: Tensor,
        *,
        temperature: float,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(log p of the targets, one or several for each state, entropy or None) at these states."""
        head, rule = self.module.get_output_embeddings(), self.rule
        # Anything else (an adapter on the head, quantised weights, capped logits) computes its logits in its own way.
        plain = type(head) is nn.Linear and rule.cap is None
        with self.autocast():
            return chunked_logp(
                states_TD,
                target_T,
                Linear(head.weight, head.bias, linear) if plain else self.logits,
                vocabulary=self.vocabulary,
                temperature=temperature / rule.scale if plain else temperature,
                with_entropy=with_entropy,
                entropy_gradient=entropy_gradient,
            )

    def head_at(self, states_TD: Tensor) -> Tensor:
        """What the head (`models.heads`) says of these states, (T, K), float32 or wider."""
        score = self.module.score
        said_TK: Tensor = score(states_TD.to(score.weight.dtype))
        return said_TK

    def value_at(self, states_TD: Tensor) -> Tensor:
        """The same as a value, (T,), of a head with one output: what began as a reward model keeps its zero and unit.

        Its rewards are what the config makes of the raw numbers, so its values must be, too. A probability is not made:
        returns are not held to lie between 0 and 1.
        """
        value_T, facts = self.head_at(states_TD).squeeze(-1), reward_facts(self.module)
        return value_T if facts is None else (value_T - facts.mean) / facts.std

    def read(self, atoms: Sequence[Atom], ask: Ask) -> dict[str, Tensor]:
        """The asked columns of these atoms' trained tokens, (T,) or (T, K) each, from one pass; on the CPU."""
        packed, columns = self.packed(atoms), [name for name in ask.columns if name != "score"]
        stream_ND = self.stream(packed)

        def said(states_TD: Tensor, which: Tensor | slice) -> tuple[Tensor | None, ...]:
            found: dict[str, Tensor | None] = {}
            if ask.want & {"logp", "entropy"}:
                found["logp"], found["entropy"] = self.logp_at(
                    states_TD, packed.target_T[which], temperature=ask.temperature, with_entropy="entropy" in ask.want
                )
            if "value" in ask.want:
                found["value"] = self.value_at(states_TD)
            if "top_k" in ask.want:
                top = self.top_k_at(states_TD, ask.top_k, temperature=ask.temperature)
                found["top_k/logp"], found["top_k/ids"] = top
            return tuple(found[name] for name in columns)

        read = dict(zip(columns, self.at(stream_ND, packed.source_T, packed, said), strict=True))
        if "score" in ask.want:
            read["score"] = self.scores_in(stream_ND, packed)
        return {name: value_T.cpu() for name, value_T in read.items()}

    def top_k_at(self, states_TD: Tensor, k: int, *, temperature: float) -> tuple[Tensor, Tensor]:
        """(log p, ids) of the k most likely tokens at these states, each (T, k), the likeliest first; all of fewer."""
        pieces, k = [], min(k, self.vocabulary)
        for piece_TD in states_TD.split(TOP_K_ROWS):
            logp_TV = self.logits(piece_TD).to(torch.promote_types(piece_TD.dtype, torch.float32)) / temperature
            top = logp_TV.log_softmax(-1).topk(k, dim=-1)
            pieces.append((top.values, top.indices.to(torch.int32)))
        logps, ids = zip(*pieces, strict=True)
        return torch.cat(logps), torch.cat(ids)

    def scores_in(self, stream_ND: Tensor, packed: Packed) -> Tensor:
        """What the head says having read each trained token of a micro-batch, (T, K), from its hidden states.

        With a gate what that makes of it, too: (T, 1 + 2K), see `Gate.forward`.
        """
        if self.gate is not None:
            return self.gate(*self._gated(stream_ND, packed))  # type: ignore[no-any-return]
        if self.context is None:
            return self.head_at(stream_ND[packed.place_T])
        return self.at(stream_ND, packed.place_T, packed, lambda states_TD, _: (self.head_at(states_TD),))[0]  # type: ignore[no-any-return]

    def _gated(self, stream_ND: Tensor, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        prompt_T, positions_N = prompt_ends(packed), packed.layout.positions_N
        score_TK = self.head_at(stream_ND[packed.place_T])
        length_T = (positions_N[packed.place_T] - positions_N[prompt_T]).to(score_TK.dtype)
        return stream_ND[prompt_T].to(score_TK.dtype), score_TK, length_T

    def export(self, folder: Path) -> None:
        """Write the Hugging Face layout: config, safetensors, tokenizer and chat template.

        With an adapter, `folder` gets the merged weights and `folder/adapter` peft's own files; of routed adapters,
        which no weights can be merged from, the weights before them. A scalar model is
        written as a sequence classifier; a causal LM leaves its critic's head behind, and stops at `stop_ids`.
        """
        if text := template_of(self.tokenizer):  # transformers keeps unknown keys of a config
            setattr(self.module.config, TEMPLATE_LOCK, text)
        if self.routing is not None:
            setattr(self.module.config, ROUTED, {role: list(pair) for role, pair in self.routing.marks.items()})
        save_model(self.module, self.adapter, folder, self.stop_ids, merged=self.routing is None)
        self.tokenizer.save_pretrained(folder)
        if self.gate is not None:
            self.gate.export(folder)

    @property
    def precision(self) -> str:
        """What the forward pass computes in, by name: float32 or bfloat16."""
        return str(self.compute).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass, as a context."""
        if self.compute == torch.float32 or next(self.module.parameters()).dtype == torch.float64:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)


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
