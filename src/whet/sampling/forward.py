"""The forward pass while sampling: the module's own, or the same written plainly.

A step of decoding computes few tokens, so what a small model waits for is not arithmetic but thousands of calls:
half of a step in transformers' modelling code. Most decoders are made of the same parts (Llama, Mistral, Qwen2,
Qwen3 and their kin): a norm, attention with rotary positions, a norm, a gated layer. `Plain` says that once, over the
module's own tensors, in a third of the calls. Whether a model is of this kind is seen from the names of its parts,
and believed only after a probe that both ways must answer alike; every other architecture runs through its module.

Weights are read once for all requests that run together: on a CPU they are copied in the order in which products read
them (`models.matmul.product`), and below float32 they are cast. The trainer's own tensors never change meanwhile.

Legend: N tokens of the stream, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.errors import ModelError
from whet.models.attention import AttentionCall, Layout, Tree, TreeLayout
from whet.models.language import LanguageModel
from whet.models.matmul import product
from whet.sampling.kv_cache import LayerShape

DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
SILU = {"SiLU", "SiLUActivation"}
FIXED_ROTARY = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose angles depend on a token's position alone."""
TABLE = 1024
"""Positions whose angles are computed together."""
PROBE_TOLERANCE = 1e-3
"""Largest difference of hidden states scaled to unit size; a part that is missing is off by far more."""
COARSE_TOLERANCE = 0.1
"""The same below float32."""

Product = Callable[[Tensor], Tensor]


class Forward(Protocol):
    """What the sampler needs of a model; `LanguageModel` has it, and so has `Plain`."""

    def hidden(self, input_N: Tensor, positions_N: Tensor, layout: Layout, at: Tensor | slice = slice(None)) -> Tensor:
        """Last hidden states (T, size) `at` these tokens of a packed stream."""

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits (T, V) at these hidden states."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the layers of a model ask for attention, and whether `Plain` computes what its module does."""

    calls: tuple[AttentionCall, ...]
    shapes: tuple[LayerShape, ...]
    """What each layer keeps of a token."""
    plain: bool

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, in all layers."""
        return sum(shape.bytes for shape in self.shapes)

    def bind(self, model: LanguageModel, positions: int, bound: Forward | None = None) -> Forward:
        """The forward pass over the weights as they are now, or as they were `bound`, for positions below this."""
        if isinstance(bound, Plain):
            bound.reach(positions)
            return bound
        return Plain(model, self.calls, positions) if self.plain else model


def plan(model: LanguageModel) -> Plan:
    """Looks at a model's parts, and asks it and `Plain` the same."""
    probe_N = (torch.arange(2, 14, device=model.device) * 7) % model.vocabulary
    recorder = _Recorder(TreeLayout((Tree(0, (len(probe_N),)),), model.device, model.backend))
    positions_N = recorder.inner.positions_N
    model.module.eval()
    if model.routing is not None:
        model.routing.role_N = None
    with torch.no_grad():
        expected = model.hidden(probe_N, positions_N, recorder)
        calls = tuple(recorder.calls)
        if not _usual(model.decoder):
            return Plan(calls, tuple(recorder.shapes), plain=False)
        try:
            computed = Plain(model, calls, len(probe_N)).hidden(probe_N, positions_N, recorder.inner)
        except (ModelError, RuntimeError, AttributeError):
            return Plan(calls, tuple(recorder.shapes), plain=False)
    gap = (_unit(computed) - _unit(expected)).abs().max().item()
    close = gap < (PROBE_TOLERANCE if model.compute == torch.float32 else COARSE_TOLERANCE)
    return Plan(calls, tuple(recorder.shapes), plain=close)


class Plain:
    """The usual decoder over a module's own weights."""

    def __init__(self, model: LanguageModel, calls: tuple[AttentionCall, ...], positions: int) -> None:
        decoder, head = model.decoder, model.module.get_output_embeddings()
        self.autocast, self.rule = model.autocast, model.rule
        with model.autocast():
            cast = partial(_product, dtype=model.compute)
            self.layers = [_Layer.of(layer, call, cast) for layer, call in zip(decoder.layers, calls, strict=True)]
            self.head = cast(head)
            self.embedding, self.norm = decoder.embed_tokens.weight, _Norm.of(decoder.norm)
        self._narrows = model.routing is None  # a route has a role for each token of the stream
        self._angles = decoder.rotary_emb
        self.reach(positions)

    def reach(self, positions: int) -> None:
        """Be ready for positions below this."""
        with self.autocast():
            # In pieces of one size: the last few numbers of a tensor may be rounded in another way than the others.
            at = torch.arange(-(-positions // TABLE) * TABLE, device=self.embedding.device)
            pieces = [self._angles(self.embedding[:1, None], piece[None]) for piece in at.split(TABLE)]
            cos, sin = (torch.cat(halves, 1) for halves in zip(*pieces, strict=True))
        half = cos.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # turning is then x cos + (x, halves swapped) sin
        self.rotary = torch.cat((cos, sin), -1)[0, :, None]

    def hidden(self, input_N: Tensor, positions_N: Tensor, layout: Layout, at: Tensor | slice = slice(None)) -> Tensor:
        """Last hidden states (T, size) `at` these tokens of a stream; the others end at the last layer's attention."""
        with self.autocast():
            x = F.embedding(input_N, self.embedding)
            cos, sin = self.rotary.index_select(0, positions_N).chunk(2, -1)
            for layer in self.layers:
                seen = layer.norm(x)
                turned, value = layer.look(seen).split(layer.widths, -1)
                turned = turned.view(len(x), -1, layer.head_size)
                if layer.head_norm is not None:
                    turned = layer.head_norm(turned)
                turned = torch.addcmul(turned * cos, turned.roll(layer.head_size // 2, -1), sin).transpose(0, 1)[None]
                query, key = turned[:, : layer.heads], turned[:, layer.heads :]
                value = value.view(len(x), -1, layer.head_size).transpose(0, 1)[None]
                if torch.is_autocast_enabled(x.device.type):
                    query, key = query.to(value.dtype), key.to(value.dtype)
                seen = layout.attend(query, key, value, layer.call).reshape(len(x), -1)
                if self._narrows and layer is self.layers[-1]:
                    x, seen, at = x[at], seen[at], slice(None)
                x += layer.out(seen)
                seen = layer.second_norm(x)
                gate, up = layer.gate_and_up(seen).chunk(2, -1)
                x += layer.down(layer.activation(gate).mul_(up))
            return self.norm(x)[at]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits (T, V) at these hidden states."""
        with self.autocast():
            return self.rule(self.head(hidden_TD))


@dataclass(frozen=True, slots=True)
class _Norm:
    """x / sqrt(mean(x^2) + eps) * weight, in five calls."""

    weight: Tensor
    eps: Tensor

    @classmethod
    def of(cls, module: Any) -> _Norm:
        eps = module.eps if isinstance(module, nn.RMSNorm) else module.variance_epsilon
        return cls(module.weight, torch.tensor(eps, dtype=module.weight.dtype, device=module.weight.device))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * inverse).mul_(self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """The weights of one layer and how it asks for attention."""

    call: AttentionCall
    heads: int
    head_size: int
    norm: _Norm
    look: Product
    """Queries, keys and values (H + 2 K) D."""
    widths: tuple[int, int]
    """Of queries and keys, and of values."""
    head_norm: _Norm | None
    """Of queries and keys in one (H + K, D)."""
    out: Product
    second_norm: _Norm
    gate_and_up: Product
    down: Product
    activation: Product

    @classmethod
    def of(cls, layer: Any, call: AttentionCall, cast: Callable[..., Product]) -> _Layer:
        attention, gated = layer.self_attn, layer.mlp
        size = int(attention.head_dim)
        heads, keys = (projection.out_features // size for projection in (attention.q_proj, attention.k_proj))
        head_norm = None
        if _parts(attention) >= HEAD_NORMS:
            of_query, of_key = _Norm.of(attention.q_norm), _Norm.of(attention.k_norm)
            weights = (of_query.weight.expand(heads, size), of_key.weight.expand(keys, size))
            head_norm = _Norm(torch.cat(weights), of_query.eps)
        return cls(
            call=call,
            heads=heads,
            head_size=size,
            norm=_Norm.of(layer.input_layernorm),
            look=cast(attention.q_proj, attention.k_proj, attention.v_proj),
            widths=((heads + keys) * size, int(attention.v_proj.out_features)),
            head_norm=head_norm,
            out=cast(attention.o_proj),
            second_norm=_Norm.of(layer.post_attention_layernorm),
            gate_and_up=cast(gated.gate_proj, gated.up_proj),
            down=cast(gated.down_proj),
            activation=_activation(gated),
        )


class _Recorder:
    """Notes how each layer asks for attention, and what its keys and values weigh."""

    def __init__(self, inner: TreeLayout) -> None:
        self.inner = inner
        self.calls: list[AttentionCall] = []
        self.shapes: list[LayerShape] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        self.calls.append(call)
        self.shapes.append(LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype))
        return self.inner.attend(query, key, value, call)


def _activation(gated: Any) -> Product:
    """The layer's own, or one that rounds every number alike wherever it stands.

    torch computes the last few numbers of each thread's share in another way than the others (up to 31 of them). With
    one or two threads, rows in multiples of four and a width in multiples of 16 there are none.
    """
    whole = torch.get_num_threads() <= 2 and gated.gate_proj.out_features % 16 == 0
    return _silu if type(gated.act_fn).__name__ in SILU and not whole else gated.act_fn


def _silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return x.div_(x.neg().exp_().add_(1)) if x.dtype.itemsize >= 4 else F.silu(x)


def _product(*modules: Any, dtype: torch.dtype) -> Product:
    """Linear layers of one input as one function; one with an adapter, or quantised, is called as it is.

    Where `matmul.product` copies weights they are copied as one.
    """
    plain = all(type(module) is nn.Linear for module in modules)
    weights = [module.weight for module in modules]
    copied = plain and dtype == torch.float32 and all(w.device.type == "cpu" and w.dtype == dtype for w in weights)
    if len(modules) > 1 and not (copied and len({module.bias is None for module in modules}) == 1):
        each = [_product(module, dtype=dtype) for module in modules]
        return lambda x: torch.cat([product(x) for product in each], -1)
    if not plain:
        return modules[0]  # type: ignore[no-any-return]
    dtype = torch.float64 if weights[0].dtype == torch.float64 else dtype
    biases = [module.bias.to(dtype) for module in modules if module.bias is not None]
    return product(torch.cat(weights).to(dtype), torch.cat(biases) if biases else None)


def _usual(decoder: Any) -> bool:
    """Whether a decoder has the parts that `Plain` computes, and no others."""
    if _parts(decoder) != DECODER or type(decoder.embed_tokens) is not nn.Embedding:
        return False
    rotary = decoder.rotary_emb.rope_type  # by kind of layer in some models
    if not isinstance(rotary, str) or rotary not in FIXED_ROTARY:
        return False
    return all(
        _parts(layer) == LAYER and _parts(layer.self_attn) - HEAD_NORMS == ATTENTION and _parts(layer.mlp) == GATED
        for layer in decoder.layers
    )


def _parts(module: Any) -> set[str]:
    return set(dict(module.named_children()))


def _unit(hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden.float(), hidden.shape[-1:])
