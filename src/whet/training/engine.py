"""The trainer on one machine: rows cut into micro-batches, gradients summed, steps applied.

It multiplies and adds, and knows no algorithm. How a step is cut is a matter of memory and speed and never changes the
gradient, because weights were written over the whole step. So the cut is a pure function of the rows and the budget,
which several processes can evaluate alike, and a pass for which memory runs out can be repeated in smaller ones. What
was found out about the machine is kept for the rest of the stage.
"""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from whet.config import TrainConfig
from whet.errors import RunError, TrainingError
from whet.models.language import Ask, LanguageModel, Want
from whet.records import Atom, Column, Metric, TokenRow, add_metrics
from whet.training.base import REFERENCE, Batch, Objective, OptimResult, Outputs, Tally
from whet.training.checkpoint import read_tensors, write_tensors
from whet.training.offload import offload, on_device
from whet.training.optim import Optimizers, whole

T = TypeVar("T")
CACHED_TOKENS = 2048
"""Tokens whose activations stay in a CPU's cache: micro-batches of 1,024 to 4,096 are the fastest for models of 0.4 to
60 million parameters (docs/benchmarks.md). The value of `auto` without a plan for a GPU."""
CPU_MESSAGE = "DefaultCPUAllocator: can't allocate memory"
"""The CPU's allocator has no exception class of its own."""


class TokenBudget:
    """Most tokens of a micro-batch: what the recipe says, and less once that did not fit."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.retries = 0

    def fill(self, costs: Sequence[int]) -> Iterator[list[int]]:
        """Indices in order, in runs within the budget as it is by then; one that alone exceeds it stands alone."""
        chosen: list[int] = []
        used = 0
        for i, cost in enumerate(costs):
            if chosen and used + cost > self.tokens:
                yield chosen
                chosen, used = [], 0
            chosen.append(i)
            used += cost
        if chosen:
            yield chosen

    def shrink(self, tokens: int, parts: int) -> None:
        """Halve: a micro-batch of so many tokens did not fit. A `TrainingError` if it had one part only."""
        if parts < 2:
            raise TrainingError(
                f"out of memory in a micro-batch of {tokens:,} tokens that cannot be cut further; set "
                "train.gradient_checkpointing, or lower the longest row (max_length, max_tokens) or the rows of a group"
            )
        self.tokens = min(self.tokens, tokens // 2)
        self.retries += 1
        logging.getLogger(__name__).warning(
            "out of memory in a micro-batch of %s tokens; going on with at most %s", tokens, self.tokens
        )


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
                self._shrink(micro, len(micro) if objective.compares else sum(len(atom.rows) for atom in micro))
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


# ---------------------------------------------------------------------------------- micro-batches


def microbatches(atoms: Sequence[Atom], budget: TokenBudget, *, together: bool) -> Iterator[list[Atom]]:
    """The rows that weigh anything, in micro-batches within the budget; a row is never cut.

    Rows that an objective compares stay `together`; any other atom is cut where it exceeds the budget, and the prompt
    that its rows share is computed once for each cut. Similar lengths go together, which saves padding in attention;
    ties keep their order, so the cut is deterministic.
    """
    heavy = [atom for atom in atoms if any(row.columns["weight"].any() for row in atom.rows)]
    pieces = heavy if together else [piece for atom in heavy for piece in _cut(atom, budget.tokens)]
    pieces.sort(key=lambda atom: max(len(row.tokens) for row in atom.rows))
    for chosen in budget.fill([atom.cost for atom in pieces]):
        yield [pieces[i] for i in chosen]


def most_uncut(atoms: Sequence[Atom], *, together: bool) -> int:
    """Most tokens of what no micro-batch cuts: an atom, or a row of it."""
    return max(atom.cost if together else max(len(row.tokens) for row in atom.rows) for atom in atoms)


def share_prompts(rows: Sequence[TokenRow], budget_tokens: int) -> list[list[int]]:
    """Indices of rows that begin with the same shared prompt, in groups that cost at most `budget_tokens` if they can.

    Groups of similar length stand next to one another; the order depends on the rows alone.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        by_prompt.setdefault(row.prompt, []).append(i)
    groups = []
    for prompt, indices in by_prompt.items():
        runs = _fill([rows[i] for i in indices], budget_tokens if prompt else 1)
        groups += [[indices[k] for k in run] for run in runs]
    return sorted(groups, key=lambda group: max(len(rows[i].tokens) for i in group))


def as_batch(atoms: Sequence[Atom], like: Tensor) -> Batch:
    """The rows' columns as tensors: numbers in the precision of `like`, whole numbers as they are."""
    rows = [row for atom in atoms for row in atom.rows]
    counts_R = np.array([row.trained_count for row in rows])
    columns = {name: _tensor([row.columns[name] for row in rows], like) for name in rows[0].columns}
    row_T = torch.from_numpy(np.repeat(np.arange(len(rows)), counts_R))
    atom_R = torch.from_numpy(np.repeat(np.arange(len(atoms)), [len(atom.rows) for atom in atoms]))
    return Batch(
        weight_T=columns.pop("weight"),
        row_T=row_T.to(like.device),
        rows=len(rows),
        atom_R=atom_R.to(like.device),
        columns=columns,
    )


def out_of_memory(error: Exception) -> bool:
    """Whether an allocator said no, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_MESSAGE in str(error)


def attempt(work: Callable[[], T]) -> T | None:
    """What `work` returns, or None if memory ran out; by then everything that it held has been released."""
    try:
        return work()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    # Only here, behind the `except`, are the frames gone that hold the graph.
    gc.collect()
    torch.cuda.empty_cache()
    return None


def _tensor(columns: Sequence[Column], like: Tensor) -> Tensor:
    values = torch.from_numpy(np.concatenate(columns))
    return values.to(like.device, like.dtype if values.is_floating_point() else torch.long)


def _cut(atom: Atom, budget_tokens: int) -> list[Atom]:
    if atom.cost <= budget_tokens:
        return [atom]
    return [Atom(rows=tuple(atom.rows[k] for k in run)) for run in _fill(atom.rows, budget_tokens)]


def _fill(rows: Sequence[TokenRow], budget_tokens: int) -> Iterator[list[int]]:
    """Runs of rows of one prompt that cost at most the budget with it; at least one row is in each."""
    budget = TokenBudget(budget_tokens - rows[0].shared)
    return budget.fill([len(row.tokens) - row.shared for row in rows])
