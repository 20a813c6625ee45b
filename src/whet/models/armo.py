"""A gate: what each of several objectives counts for, decided by the prompt (ArmoRM, 2406.12845).

It reads the last hidden state of the prompt, weighs what the head says of the answer, and is saved beside the head.
What goes with the answer's length (or with another objective, verbosity say) is taken off every objective first; the
same numbers are trained, evaluated and used.

Legend: T places where an answer is read, K objectives, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from whet.formulas.reward import debiased, gated, slopes

FILE = "gate.safetensors"
LENGTH = "length"
"""What objectives may be debiased against beside one another: the tokens of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateFacts:
    """What a gate is, beside its numbers."""

    hidden: int
    """Width of its hidden layer; 0: it is linear."""
    temperature: float
    debias: str | None
    """`length`, or the objective that is taken off the others; None: nothing is."""


class Gate(nn.Module):
    """softmax(logits of the prompt / temperature) over the objectives; it begins with all of them alike."""

    slope_K: Tensor
    centre: Tensor

    def __init__(self, facts: GateFacts, objectives: Sequence[str], width: int) -> None:
        super().__init__()
        self.facts = facts
        self.place = None if facts.debias in (None, LENGTH) else objectives.index(facts.debias)
        self.first = nn.Linear(width, facts.hidden) if facts.hidden else None
        self.last = nn.Linear(facts.hidden or width, len(objectives))
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("slope_K", torch.zeros(len(objectives)))
        self.register_buffer("centre", torch.zeros(1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, state_TD: Tensor, score_TK: Tensor, length_T: Tensor) -> Tensor:
        """(T, 1 + 2K): the gated score, then what each objective says, then what each counts for.

        `state_TD` is the prompt's last hidden state, `length_T` the tokens of the answer up to where it is read.
        """
        hidden = rms_norm(state_TD, state_TD.shape[-1:])
        if self.first is not None:
            hidden = gelu(self.first(hidden))
        gate_TK = (self.last(hidden) / self.facts.temperature).softmax(-1)
        against_T = self._against(score_TK, length_T) - self.centre
        kept_TK = debiased(score_TK, against_T, slope_K=self.slope_K)
        total_T = gated(kept_TK, gate_TK, scale=self.log_scale.exp())
        return torch.cat([total_T[:, None], score_TK, gate_TK], dim=1)

    @torch.no_grad()
    def debias(self, score_NK: Tensor, length_N: Tensor) -> None:
        """Choose what is taken off, so that over these answers no objective goes with it any more."""
        if self.facts.debias is not None:
            against_N = self._against(score_NK, length_N)
            self.slope_K.copy_(slopes(score_NK, against_N))
            self.centre.copy_(against_N.mean())

    def _against(self, score_TK: Tensor, length_T: Tensor) -> Tensor:
        return length_T if self.place is None else score_TK[:, self.place]

    def export(self, folder: Path) -> None:
        """Write its numbers beside those of the model."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / FILE)


def load_gate(facts: GateFacts, objectives: Sequence[str], module: Any, where: str, revision: str | None) -> Gate:
    """The gate that was saved beside a model. Raises what transformers and safetensors raise where it is not there."""
    from transformers.utils.hub import cached_file

    gate = Gate(facts, objectives, module.score.weight.shape[1])
    gate.load_state_dict(load_file(str(cached_file(where, FILE, revision=revision))))
    return gate.to(module.score.weight.device)
