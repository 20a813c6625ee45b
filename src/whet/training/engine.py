"""The trainer on one machine: micro-batches in, gradients summed, steps applied.

It multiplies and adds, and knows no algorithm. The weights of the rows were written over the whole step, so how
the atoms are cut into micro-batches is a matter of memory and speed and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whet.config import TrainConfig
from whet.models.language import LanguageModel
from whet.models.pack import pack
from whet.records import Atom, Metric, TokenRow, add_metrics
from whet.training.base import Batch, Objective, OptimResult, Outputs, Tally
from whet.training.optim import Optimizers


class LocalTrainer:
    """`Trainer` over a model in this process."""

    def __init__(self, model: LanguageModel, config: TrainConfig, reference: LanguageModel | None = None) -> None:
        self.model = model
        self.config = config
        self.reference = reference
        self.optimizers = Optimizers(model.parameters, config)

    def forward_backward(self, atoms: Sequence[Atom], objective: Objective) -> dict[str, Metric]:
        """Add the gradient of the weighted sum of losses; returns the objective's metrics over all rows."""
        self.model.module.train()
        metrics: dict[str, Metric] = {}
        for micro in microbatches(atoms, self.config.microbatch_tokens):
            loss, tallies = self._run(micro, objective)
            loss.backward()  # type: ignore[no-untyped-call]
            metrics = add_metrics(metrics, _to_metrics(tallies))
        self.model.module.eval()
        return metrics

    def evaluate(self, atoms: Sequence[Atom], objective: Objective) -> dict[str, Metric]:
        """The objective's metrics over all rows, without a gradient."""
        metrics: dict[str, Metric] = {}
        with torch.no_grad():
            for micro in microbatches(atoms, self.config.microbatch_tokens):
                _, tallies = self._run(micro, objective)
                metrics = add_metrics(metrics, _to_metrics(tallies))
        return metrics

    def optim_step(self, lr: float, *, muon_lr: float = 0.0) -> OptimResult:
        """Clip and apply the summed gradient; a gradient that is not finite is thrown away instead."""
        grads = [p.grad for p in self.model.parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        if not math.isfinite(norm):
            self.optimizers.zero_grad()
            return OptimResult(applied=False, grad_norm=norm)
        if self.config.clip_norm is not None and norm > self.config.clip_norm:
            torch._foreach_mul_(grads, self.config.clip_norm / norm)
        self.optimizers.step(lr=lr, muon_lr=muon_lr)
        return OptimResult(applied=True, grad_norm=norm)

    def logprobs(
        self, rows: Sequence[TokenRow], *, temperature: float, reference: bool = False
    ) -> list[tuple[float, ...]]:
        """log p of each row's trained tokens; with `reference` under the weights that the stage started from."""
        if not reference:
            return self._logprobs(self.model, rows, temperature)
        if self.reference is not None:
            return self._logprobs(self.reference, rows, temperature)
        with self.model.as_reference() as frozen:
            return self._logprobs(frozen, rows, temperature)

    def save(self, folder: Path) -> None:
        """Trainable weights and optimizer state, as safetensors."""
        save_file({name: p.detach() for name, p in self.model.parameters.items()}, folder / "weights.safetensors")
        save_file(self.optimizers.state(), folder / "optimizer.safetensors")
        (folder / "trainer.json").write_text(json.dumps({"model": self.model.name}))

    def load(self, folder: Path) -> None:
        """Continue from `save`, bit for bit."""
        weights = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, p in self.model.parameters.items():
                p.copy_(weights[name])
        self.optimizers.load_state(load_file(folder / "optimizer.safetensors"))

    def export(self, folder: Path) -> None:
        """The model in the Hugging Face layout."""
        self.model.export(folder)

    def _run(self, atoms: Sequence[Atom], objective: Objective) -> tuple[Tensor, Mapping[str, Tally]]:
        packed = pack(atoms, self.model.device, self.model.backend)
        logp_T, entropy_T = self.model.logp(
            packed, temperature=objective.temperature, with_entropy="entropy" in objective.needs
        )
        return objective(Outputs(logp_T=logp_T, entropy_T=entropy_T), as_batch(atoms, logp_T))

    def _logprobs(self, model: LanguageModel, rows: Sequence[TokenRow], temperature: float) -> list[tuple[float, ...]]:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        found: dict[int, tuple[float, ...]] = {}
        with torch.no_grad():
            for chosen in _fill([len(rows[i].tokens) for i in order], self.config.microbatch_tokens):
                indices = [order[i] for i in chosen]
                packed = pack([Atom(rows=(rows[i],)) for i in indices], model.device, model.backend)
                logp_T, _ = model.logp(packed, temperature=temperature)
                pieces = logp_T.split([rows[i].trained_count for i in indices])
                found |= {i: tuple(piece.tolist()) for i, piece in zip(indices, pieces, strict=True)}
        return [found[i] for i in range(len(rows))]


def microbatches(atoms: Sequence[Atom], budget_tokens: int) -> Iterator[list[Atom]]:
    """The atoms that weigh anything, cut into micro-batches of at most `budget_tokens` (an atom is never split).

    Similar lengths go together, which saves padding in attention; ties keep their order, so it is deterministic.
    """
    heavy = [atom for atom in atoms if any(weight for row in atom.rows for weight in row.columns["weight"])]
    heavy.sort(key=lambda atom: max(len(row.tokens) for row in atom.rows))
    for chosen in _fill([atom.cost for atom in heavy], budget_tokens):
        yield [heavy[i] for i in chosen]


def as_batch(atoms: Sequence[Atom], like: Tensor) -> Batch:
    """The rows' columns as tensors of the precision of `like`."""
    rows = [row for atom in atoms for row in atom.rows]
    counts = torch.tensor([row.trained_count for row in rows])
    columns = {
        name: torch.tensor([value for row in rows for value in row.columns[name]], dtype=like.dtype, device=like.device)
        for name in rows[0].columns
    }
    return Batch(
        weight_T=columns.pop("weight"),
        row_T=torch.repeat_interleave(torch.arange(len(rows)), counts).to(like.device),
        rows=len(rows),
        atom_R=torch.tensor([i for i, atom in enumerate(atoms) for _ in atom.rows]).to(like.device),
        columns=columns,
    )


def _fill(costs: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in order, in runs whose costs stay within the budget; one that alone exceeds it stands alone."""
    chosen: list[int] = []
    used = 0
    for i, cost in enumerate(costs):
        if chosen and used + cost > budget:
            yield chosen
            chosen, used = [], 0
        chosen.append(i)
        used += cost
    if chosen:
        yield chosen


def _to_metrics(tallies: Mapping[str, Tally]) -> dict[str, Metric]:
    return {name: Metric(float(tally.total), float(tally.weight)) for name, tally in tallies.items()}
