"""The trainer on one machine: micro-batches in, gradients summed, steps applied.

It multiplies and adds, and knows no algorithm. The weights of the rows were written over the whole step, so how
the atoms are cut into micro-batches is a matter of memory and speed and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from whet.config import TrainConfig
from whet.errors import RunError
from whet.models.language import Ask, LanguageModel, Want
from whet.records import Atom, Column, Metric, TokenRow, add_metrics
from whet.training.base import REFERENCE, Objective, OptimResult, Outputs, Tally
from whet.training.batch import CACHED_TOKENS, TokenBudget, as_batch, attempt, microbatches, parts, share_prompts
from whet.training.checkpoint import read_tensors, write_tensors
from whet.training.offload import offload, on_device
from whet.training.optim import Optimizers, whole

T = TypeVar("T")


class LocalTrainer:
    """`Trainer` over a model in this process."""

    def __init__(
        self,
        model: LanguageModel,
        config: TrainConfig,
        frozen: Mapping[str, LanguageModel] | None = None,
        tokens: int = CACHED_TOKENS,
    ) -> None:
        """`frozen` models are read and never trained, by name; an adapter's base is its own `reference`.

        A micro-batch has at most `tokens` where the recipe leaves it to the machine (`auto`).
        """
        self.model = model
        self.model.module.eval()  # a dropout acts in `forward_backward` alone, also before the first one
        self.config = config
        self.frozen = dict(frozen or {})
        self.moved: set[str] = set()  # frozen models that no longer are what the stage started from
        asked = config.microbatch_tokens
        self.budget = TokenBudget(tokens if asked == "auto" else asked)
        self.together = 1  # processes that compute a micro-batch, for each of which `auto` chooses tokens
        self.optimizers = Optimizers(model.parameters, config)
        self.offloaded = set(self.frozen) & set(config.offload)
        for name in self.offloaded:
            offload(self.frozen[name].module)

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

    def optim_step(self, lr_factor: float | None) -> OptimResult:
        """Clip and apply the summed gradient; a gradient that is not finite is thrown away instead."""
        grads = [p.grad for p in self.model.parameters.values() if p.grad is not None]
        norm = float(whole(torch.nn.utils.get_total_norm(grads))) if grads else 0.0
        if lr_factor is None:
            self.optimizers.zero_grad()
            return OptimResult(applied=False, grad_norm=norm)
        if not math.isfinite(norm):
            named = ((name, p.grad) for name, p in self.model.parameters.items() if p.grad is not None)
            first = next((name for name, grad in named if not whole(grad).isfinite().all()), "all parameters together")
            self.optimizers.zero_grad()
            return OptimResult(applied=False, grad_norm=norm, not_finite=first)
        if self.config.clip_norm is not None and norm > self.config.clip_norm:
            torch._foreach_mul_(grads, self.config.clip_norm / norm)
        self.optimizers.step(lr_factor)
        return OptimResult(applied=True, grad_norm=norm)

    def forward(
        self, rows: Sequence[TokenRow], *want: Want, temperature: float = 1.0, frozen: str | None = None, top_k: int = 0
    ) -> dict[str, list[Column]]:
        """The wanted columns of each row from one pass, under the weights as they are or those of a frozen model."""
        ask = Ask(frozenset(want), temperature=temperature, top_k=top_k)
        with self._under(frozen) as model:
            read = self._read(model, rows, ask)
        return {name: [row[name].numpy() for row in read] for name in ask.columns}

    def update_frozen(self, name: str, decay: float) -> None:
        """Move a frozen copy by an EMA: `decay` of itself plus the rest of the weights; an adapter has no copy."""
        assert name in self.frozen, "the reference of a LoRA run is the model with its adapter off"
        copies = dict(self.frozen[name].module.named_parameters())
        with torch.no_grad():
            for key, p in self.model.parameters.items():
                if key in copies:
                    copies[key].lerp_(p.to(copies[key].device), 1 - decay)
        self.moved.add(name)

    def save(self, folder: Path) -> None:
        """Trainable weights, optimizer state and moved frozen models as tensors, and what else `load` needs."""
        write_tensors(folder, self._state())
        self._note(folder)

    def _note(self, folder: Path) -> None:
        noted = {"asked": self.config.microbatch_tokens, "microbatch_tokens": self.budget.tokens // self.together}
        (folder / "trainer.json").write_text(json.dumps({**noted, "precision": self.model.precision}))

    def _state(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor of a checkpoint, by file."""
        moved = {name: self.frozen[name].module.named_parameters() for name in self.moved}
        return {
            "weights": {name: p.detach() for name, p in self.model.parameters.items()},
            "optimizer": self.optimizers.state(),
            **{name: {key: p.detach() for key, p in named} for name, named in moved.items()},
        }

    def load(self, folder: Path) -> None:
        """Continue from `save`, bit for bit. Raises `RunError` where this machine computes in another precision."""
        noted = json.loads((folder / "trainer.json").read_text())
        if noted["precision"] != self.model.precision:  # `dtype: auto`, on another machine
            raise RunError(
                f"{folder}: written in {noted['precision']}, and here the model computes in {self.model.precision}; "
                f"go on with model.dtype: {noted['precision']} and --accept model.dtype, or --restart the stage"
            )
        found = read_tensors(folder, ["weights", "optimizer", *self.frozen], self._like)
        with torch.no_grad():
            for name, p in self.model.parameters.items():
                p.copy_(found["weights"][name])
            for name in self.frozen.keys() & found.keys():
                for key, p in self.frozen[name].module.named_parameters():
                    p.copy_(found[name][key])
                self.moved.add(name)
        self.optimizers.load_state(found.get("optimizer", {}))
        # Another cut rounds differently: what was chosen or found out holds until the recipe asks for something else.
        if noted["asked"] == self.config.microbatch_tokens:
            self.budget.tokens = noted["microbatch_tokens"] * self.together

    def _like(self, kind: str, name: str) -> Tensor | None:
        """The tensor whose shards one of a checkpoint is to have; None: it is read whole."""
        return None

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
        for micro in self._in_step(microbatches(atoms, self.budget, together=objective.compares)):
            reached: set[int] = set()
            found = attempt(partial(self._backward, micro, objective, owed, reached))
            if found is None:
                self._shrink(micro, parts(micro, together=objective.compares))
                found = self._accumulate(micro, objective, [p for p in owed if id(p) not in reached])
            metrics = add_metrics(metrics, found)
        return metrics

    def _backward(
        self, atoms: Sequence[Atom], objective: Objective, owed: Sequence[nn.Parameter], reached: set[int]
    ) -> dict[str, Metric]:
        """One micro-batch forward and backward; notes in `reached` which parameters have got their gradient."""
        hooks = [p.register_post_accumulate_grad_hook(lambda p: reached.add(id(p))) for p in owed]
        try:
            loss, tallies = self._pass(self.model, partial(self._run, atoms, objective))
            if owed:
                loss.backward(inputs=owed)
            return {name: Metric(float(tally.total), float(tally.weight)) for name, tally in tallies.items()}
        finally:
            for hook in hooks:
                hook.remove()

    # ------------------------------------------------- what several ranks do otherwise (`training.sharded`)

    def _pass(self, model: LanguageModel, work: Callable[[], T]) -> T:
        """Compute with a model."""
        return work()

    def _in_step(self, batches: Iterator[T]) -> Iterator[T]:
        """The passes of one command."""
        return batches

    def _shrink(self, micro: Sequence[Atom], pieces: int) -> None:
        """Memory ran out in this micro-batch, which has so many parts; it is repeated in smaller ones."""
        self.budget.shrink(sum(atom.cost for atom in micro), pieces)

    # -------------------------------------------------------------------------------------------------------

    def _run(self, atoms: Sequence[Atom], objective: Objective) -> tuple[Tensor, Mapping[str, Tally]]:
        """The objective over one forward pass of these atoms, which computes only what it needs."""
        packed, needs = self.model.packed(atoms), objective.needs
        stream_ND = self.model.stream(packed)
        read = partial(self.model.at, stream_ND, packed.source_T, packed)
        value_T = read(lambda states_TD, _: (self.model.value_at(states_TD),))[0] if "value" in needs else None
        score_TK = self.model.scores_in(stream_ND, packed) if "score" in needs else None
        scalar_T = score_TK[:, 0] if value_T is None and score_TK is not None else value_T
        wide = stream_ND.new_empty(0, dtype=torch.promote_types(stream_ND.dtype, torch.float32))
        batch, target_T, top_k_TK = as_batch(atoms, wide), packed.target_T, None
        if "top_k" in needs:
            target_T = torch.cat([target_T[:, None], batch.columns["top_k/ids"]], -1)
        if scalar_T is None or "logp" in needs:
            logp_T, entropy_T = read(
                lambda states_TD, which: self.model.logp_at(
                    states_TD,
                    target_T[which],
                    temperature=objective.temperature,
                    with_entropy="entropy" in needs,
                    entropy_gradient="entropy_grad" in needs,
                )
            )
            if "top_k" in needs:
                logp_T, top_k_TK = logp_T[:, 0], logp_T[:, 1:]
        else:
            logp_T, entropy_T = torch.full_like(scalar_T, math.nan), None
        outputs = Outputs(logp_T=logp_T, entropy_T=entropy_T, value_T=value_T, top_k_TK=top_k_TK, score_TK=score_TK)
        return objective(outputs, batch)

    @contextmanager
    def _under(self, name: str | None) -> Iterator[LanguageModel]:
        """The model to read: the trained one, a frozen one by name, or an adapter's base as the `reference`."""
        if name is None:
            yield self.model
        elif name in self.frozen:
            model = self.frozen[name]
            with on_device(model.module, model.device) if name in self.offloaded else nullcontext():
                yield model
        else:
            assert name == REFERENCE and self.model.adapter is not None, f"no frozen model is named {name}"
            with self.model.adapter.disable_adapter():
                yield self.model

    @torch.no_grad()
    def _read(self, model: LanguageModel, rows: Sequence[TokenRow], ask: Ask) -> list[dict[str, Tensor]]:
        """The asked columns of each row, from passes in which rows share prompts."""
        found: dict[int, dict[str, Tensor]] = {}
        groups = share_prompts(rows, self.budget.tokens)
        atoms = [Atom(rows=tuple(rows[i] for i in group)) for group in groups]
        for chosen in self._in_step(self.budget.fill([atom.cost for atom in atoms])):
            micro, indices = [atoms[a] for a in chosen], [i for a in chosen for i in groups[a]]
            read = attempt(partial(self._pass, model, partial(model.read, micro, ask)))
            if read is None:
                self._shrink(micro, len(indices))
                pieces = self._read(model, [rows[i] for i in indices], ask)
            else:
                counts = [rows[i].trained_count for i in indices]
                split = {name: value_T.split(counts) for name, value_T in read.items()}
                pieces = [{name: split[name][k] for name in split} for k in range(len(indices))]
            found |= dict(zip(indices, pieces, strict=True))
        return [found[i] for i in range(len(rows))]
