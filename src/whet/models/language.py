"""A language model at work: one forward pass for training, reference, evaluation and sampling.

The module is a Hugging Face causal LM whose attention is ours (`models.attention`); the head sees only the
positions that it is asked about. Weights stay in float32; with `compute` bfloat16 the forward pass is autocast.

Legend: N tokens of a packed stream, T trained tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whet.formulas.logprobs import Linear, chunked_logp
from whet.models.attention import Layout, pick_backend
from whet.models.heads import SCORE, is_scalar
from whet.models.pack import Packed
from whet.models.products import linear
from whet.models.quantize import is_quantised, save_dequantised


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

    @property
    def vocabulary(self) -> int:
        """V, rows of the output head."""
        return int(self.module.get_output_embeddings().weight.shape[0])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; tied ones once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @property
    def backend(self) -> str:
        """The attention backend for training."""
        return pick_backend(self.device)

    def hidden(self, input_N: Tensor, positions_N: Tensor, layout: Layout) -> Tensor:
        """Last hidden states (N, D) of a packed stream."""
        with self.autocast():
            decoder = self.module.get_decoder()
            output = decoder(input_ids=input_N[None], position_ids=positions_N[None], use_cache=False, layout=layout)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits (T, V) at these hidden states."""
        with self.autocast():
            logits: Tensor = self.module.get_output_embeddings()(hidden_TD)
        return logits

    def stream(self, packed: Packed) -> Tensor:
        """Hidden states (N, D) of a micro-batch; trained tokens are predicted at `source_T` and stand at `place_T`."""
        return self.hidden(packed.input_N, packed.layout.positions_N, packed.layout)

    def logp_at(
        self,
        states_TD: Tensor,
        target_T: Tensor,
        *,
        temperature: float,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(log p of the targets, entropy or None) at these states."""
        head = self.module.get_output_embeddings()
        with self.autocast():
            return chunked_logp(
                states_TD,
                target_T,
                # Anything else (an adapter on the head, quantised weights) computes its logits in its own way.
                Linear(head.weight, head.bias, linear) if type(head) is nn.Linear else head,
                vocabulary=self.vocabulary,
                temperature=temperature,
                with_entropy=with_entropy,
                entropy_gradient=entropy_gradient,
            )

    def value_at(self, states_TD: Tensor) -> Tensor:
        """What the scalar head (`models.heads`) says of these states, (T,), float32 or wider."""
        score = self.module.score
        values: Tensor = score(states_TD.to(score.weight.dtype)).squeeze(-1)
        return values

    def logp(self, packed: Packed, *, temperature: float, with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """(log p, entropy or None) of the trained tokens of a micro-batch."""
        states_TD = self.stream(packed)[packed.source_T]
        return self.logp_at(states_TD, packed.target_T, temperature=temperature, with_entropy=with_entropy)

    def values(self, packed: Packed) -> Tensor:
        """Value of the state before each trained token of a micro-batch."""
        return self.value_at(self.stream(packed)[packed.source_T])

    def scores(self, packed: Packed) -> Tensor:
        """What the scalar head says having read each trained token of a micro-batch."""
        return self.value_at(self.stream(packed)[packed.place_T])

    @contextmanager
    def as_reference(self) -> Iterator[LanguageModel]:
        """This model with its adapter switched off: the weights that training started from."""
        assert self.adapter is not None, "only a model with an adapter holds its own reference"
        with self.adapter.disable_adapter():
            yield self

    def export(self, folder: Path) -> None:
        """Write the Hugging Face layout: config, safetensors, tokenizer and chat template.

        With an adapter, `folder` gets the merged weights and `folder/adapter` peft's own files. A scalar model is
        written as a sequence classifier with one label; a causal LM leaves its critic's head behind.
        """
        if self.adapter is None:
            self.module.save_pretrained(folder, state_dict=_published(self.module, self.module.state_dict()))
        else:
            self.adapter.save_pretrained(folder / "adapter")
            (save_dequantised if is_quantised(self.module) else _save_merged)(self.adapter, folder)
        self.tokenizer.save_pretrained(folder)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass, as a context."""
        if self.compute == torch.float32 or next(self.module.parameters()).dtype == torch.float64:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)


def _save_merged(adapter: Any, folder: Path) -> None:
    """Merge, save under the base model's own parameter names, and take the merge back out."""
    snapshot = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    adapter.merge_adapter()
    try:
        state = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in adapter.get_base_model().state_dict().items()
            if ".lora_" not in name
        }
        base = adapter.get_base_model()
        base.save_pretrained(folder, state_dict=_published(base, state))
    finally:
        adapter.unmerge_adapter()
        with torch.no_grad():  # unmerging subtracts in floating point; the saved run must go on bit for bit
            for name, p in adapter.named_parameters():
                p.copy_(snapshot[name])


def _published(module: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module's own files: tied ones once, and nothing that its class does not know."""
    left_out = set(module.all_tied_weights_keys or {}) | (set() if is_scalar(module) else {f"{SCORE}.weight"})
    return {name: tensor for name, tensor in state.items() if name not in left_out}
