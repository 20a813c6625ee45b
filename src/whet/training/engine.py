"""The trainer on one machine: micro-batches in, gradients summed, steps applied.

It multiplies and adds, and knows no algorithm. The weights of the rows were written over the whole step, so how
the atoms are cut into micro-batches is a matter of memory and speed and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from whet.config import TrainConfig
from whet.models.language import LanguageModel
from whet.models.pack import Packed, pack
from whet.records import Atom, Metric, TokenRow, add_metrics
from whet.training.base import Batch, Objective, OptimResult, Outputs, Tally
from whet.training.memory import CACHED_TOKENS, Budget, attempt
from whet.training.offload import lay_down, visiting
from whet.training.optim import Optimizers


class LocalTrainer:
    """`Trainer` over a model in this process."""

    def __init__(self, model: LanguageModel, config: TrainConfig, reference: LanguageModel | None = None) -> None:
        self.model = model
        self.config = config
        self.reference = reference
        self.renewed = False  # whether the reference still is what the stage started from
        self.budget = Budget(CACHED_TOKENS if config.microbatch_tokens == "auto" else config.microbatch_tokens)
        self.optimizers = Optimizers(model.parameters, config)
        self.reference_away = reference is not None and "reference" in config.offload
        if reference is not None and self.reference_away:
            lay_down(reference.module)

    def forward_backward(self, atoms: Sequence[Atom], objective: Objective) -> dict[str, Metric]:
        """Add the gradient of the weighted sum of losses; returns the objective's metrics over all rows.

        `oom_retries` counts the micro-batches for which memory ran out and that were repeated in smaller ones.
        """
        before = self.budget.retries
        self.model.module.train()
        metrics = self._accumulate(atoms, objective, list(self.model.parameters.values()))
        self.model.module.eval()
        return {**metrics, "oom_retries": Metric(float(self.budget.retries - before))}

    def evaluate(self, atoms: Sequence[Atom], objective: Objective) -> dict[str, Metric]:
        """The objective's metrics over all rows, without a gradient."""
        with torch.no_grad():
            return self._accumulate(atoms, objective, [])

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

        def under(model: LanguageModel) -> list[tuple[float, ...]]:
            return _flat(self._read(model, rows, lambda packed: model.logp(packed, temperature=temperature)[0]))

        if not reference:
            return under(self.model)
        if self.reference is not None:
            there = visiting(self.reference.module, self.reference.device) if self.reference_away else nullcontext()
            with there:
                return under(self.reference)
        with self.model.as_reference() as frozen:
            return under(frozen)

    def entropies(self, rows: Sequence[TokenRow], *, temperature: float) -> list[tuple[float, ...]]:
        """Entropy of the distribution that predicts each of a row's trained tokens."""

        def read(packed: Packed) -> Tensor:
            _, entropy_T = self.model.logp(packed, temperature=temperature, with_entropy=True)
            assert entropy_T is not None
            return entropy_T

        return _flat(self._read(self.model, rows, read))

    def renew_reference(self, keep: float) -> None:
        """The reference becomes `keep` of itself plus the rest of the weights; not for adapters, which have no copy."""
        assert self.reference is not None, "the reference of a LoRA run is the model with its adapter off"
        frozen = dict(self.reference.module.named_parameters())
        with torch.no_grad():
            for name, p in self.model.parameters.items():
                if name in frozen:
                    frozen[name].lerp_(p.to(frozen[name].device), 1 - keep)
        self.renewed = True

    def values(self, rows: Sequence[TokenRow]) -> list[tuple[float, ...]]:
        """The value of the state before each of a row's trained tokens; the model must have a scalar head."""
        return _flat(self._read(self.model, rows, self.model.values))

    def scores(self, rows: Sequence[TokenRow]) -> list[tuple[tuple[float, ...], ...]]:
        """All that the head says having read each of a row's trained tokens; the model must have one."""
        return [tuple(map(tuple, read_TK.tolist())) for read_TK in self._read(self.model, rows, self.model.scores)]

    def save(self, folder: Path) -> None:
        """Trainable weights and optimizer state, as safetensors."""
        save_file({name: p.detach() for name, p in self.model.parameters.items()}, folder / "weights.safetensors")
        save_file(self.optimizers.state(), folder / "optimizer.safetensors")
        if self.renewed and self.reference is not None:
            moved = {name: p.detach() for name, p in self.reference.module.named_parameters()}
            save_file(moved, folder / "reference.safetensors")
        (folder / "trainer.json").write_text(
            json.dumps({"model": self.model.name, "microbatch_tokens": self.budget.tokens})
        )

    def load(self, folder: Path) -> None:
        """Continue from `save`, bit for bit."""
        weights = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, p in self.model.parameters.items():
                p.copy_(weights[name])
        self.optimizers.load_state(load_file(folder / "optimizer.safetensors"))
        if (folder / "reference.safetensors").exists() and self.reference is not None:
            self.reference.module.load_state_dict(load_file(folder / "reference.safetensors"), strict=False)
            self.renewed = True
        # Another cut rounds differently, so what was chosen or found out when the stage began holds to its end.
        self.budget.tokens = json.loads((folder / "trainer.json").read_text())["microbatch_tokens"]

    def export(self, folder: Path) -> None:
        """The model in the Hugging Face layout."""
        self.model.export(folder)

    def _accumulate(
        self, atoms: Sequence[Atom], objective: Objective, owed: Sequence[nn.Parameter]
    ) -> dict[str, Metric]:
        """Add the atoms' gradient to the parameters that it is owed to (to none: metrics only).

        A backward pass adds to each parameter once, its whole share. So where memory runs out half-way, repeating
        the micro-batch in smaller ones for the parameters that were not reached completes it exactly.
        """
        metrics: dict[str, Metric] = {}
        for micro in microbatches(atoms, self.budget):
            reached: set[int] = set()
            found = attempt(partial(self._backward, micro, objective, owed, reached))
            if found is None:
                self.budget.shrink(sum(atom.cost for atom in micro), len(micro))
                found = self._accumulate(micro, objective, [p for p in owed if id(p) not in reached])
            metrics = add_metrics(metrics, found)
        return metrics

    def _backward(
        self, atoms: Sequence[Atom], objective: Objective, owed: Sequence[nn.Parameter], reached: set[int]
    ) -> dict[str, Metric]:
        """One micro-batch forward and backward; notes in `reached` which parameters have got their gradient."""
        hooks = [p.register_post_accumulate_grad_hook(lambda p: reached.add(id(p))) for p in owed]
        try:
            loss, tallies = self._run(atoms, objective)
            if owed:
                loss.backward(inputs=owed)
            return {name: Metric(float(tally.total), float(tally.weight)) for name, tally in tallies.items()}
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self, atoms: Sequence[Atom], objective: Objective) -> tuple[Tensor, Mapping[str, Tally]]:
        """The objective over what one forward pass says of these atoms, and nothing that it does not ask for."""
        packed, needs = pack(atoms, self.model.device, self.model.backend), objective.needs
        stream_ND = self.model.stream(packed)
        states_TD = stream_ND[packed.source_T]
        value_T = self.model.value_at(states_TD) if "value" in needs else None
        score_TK = self.model.scores_in(stream_ND, packed) if "score" in needs else None
        scalar_T = score_TK[:, 0] if value_T is None and score_TK is not None else value_T
        if scalar_T is None or "logp" in needs:
            logp_T, entropy_T = self.model.logp_at(
                states_TD,
                packed.target_T,
                temperature=objective.temperature,
                with_entropy="entropy" in needs,
                entropy_gradient="entropy_grad" in needs,
            )
        else:
            logp_T, entropy_T = torch.full_like(scalar_T, math.nan), None
        outputs = Outputs(logp_T=logp_T, entropy_T=entropy_T, value_T=value_T, score_TK=score_TK)
        return objective(outputs, as_batch(atoms, logp_T))

    @torch.no_grad()
    def _read(self, model: LanguageModel, rows: Sequence[TokenRow], read: Callable[[Packed], Tensor]) -> list[Tensor]:
        """What `read` says of each row's trained tokens (its first axis), from passes in which rows share prompts."""
        found: dict[int, Tensor] = {}
        groups = share_prompts(rows, self.budget.tokens)
        atoms = [Atom(rows=tuple(rows[i] for i in group)) for group in groups]
        for chosen in self.budget.fill([atom.cost for atom in atoms]):
            micro, indices = [atoms[a] for a in chosen], [i for a in chosen for i in groups[a]]
            read_T = attempt(partial(_read_once, model, micro, read))
            if read_T is None:
                self.budget.shrink(sum(atom.cost for atom in micro), len(indices))
                pieces = self._read(model, [rows[i] for i in indices], read)
            else:
                counts = [rows[i].trained_count for i in indices]
                pieces = list(torch.split(read_T, counts))
            found |= dict(zip(indices, pieces, strict=True))
        return [found[i] for i in range(len(rows))]


def _flat(read: Sequence[Tensor]) -> list[tuple[float, ...]]:
    return [tuple(value_T.tolist()) for value_T in read]


def _read_once(model: LanguageModel, atoms: Sequence[Atom], read: Callable[[Packed], Tensor]) -> Tensor:
    return read(pack(atoms, model.device, model.backend)).cpu()


def microbatches(atoms: Sequence[Atom], budget: Budget) -> Iterator[list[Atom]]:
    """The atoms that weigh anything, cut into micro-batches within the budget (an atom is never split).

    Similar lengths go together, which saves padding in attention; ties keep their order, so it is deterministic.
    """
    heavy = [atom for atom in atoms if any(weight for row in atom.rows for weight in row.columns["weight"])]
    heavy.sort(key=lambda atom: max(len(row.tokens) for row in atom.rows))
    for chosen in budget.fill([atom.cost for atom in heavy]):
        yield [heavy[i] for i in chosen]


def share_prompts(rows: Sequence[TokenRow], budget_tokens: int) -> list[list[int]]:
    """Indices of rows that begin with the same shared prompt, in groups that cost at most `budget_tokens` if they can.

    Groups of similar length stand next to one another; the order depends on the rows alone.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        by_prompt.setdefault(row.tokens[: row.shared], []).append(i)
    groups = []
    for prompt, indices in by_prompt.items():
        budget = Budget(budget_tokens - len(prompt) if prompt else 1)
        groups += [
            [indices[k] for k in run] for run in budget.fill([len(rows[i].tokens) - len(prompt) for i in indices])
        ]
    return sorted(groups, key=lambda group: max(len(rows[i].tokens) for i in group))


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
