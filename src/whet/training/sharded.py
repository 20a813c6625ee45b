"""The trainer on one of several ranks: FSDP2 around the same forward pass, gradients summed and never averaged.

Every rank does the same commands in the same order on rows of its own (`training.group` cuts them). What ranks must
agree on is agreed here: the number of passes (a rank with fewer adds passes of weight 0), the norm and whether it is
finite. Nothing is repeated when memory runs out, since one rank cannot repair an exchange half-way: the group is
started again with smaller micro-batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from whet.errors import ModelError
from whet.files import digest_file
from whet.models.architecture import layers_of, text_config
from whet.models.context import ContextRanks
from whet.models.language import Ask, LanguageModel, Want
from whet.records import Atom, Column, Metric, TokenRow
from whet.training.base import Objective
from whet.training.checkpoint import write_shards
from whet.training.engine import LocalTrainer
from whet.training.group import RankOutOfMemory
from whet.training.optim import Optimizers, whole

T = TypeVar("T")


class Pass(nn.Module):
    """A model's passes as the forward of one module, since FSDP gathers parameters around a module's forward alone."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.module, self.gate = model.module, model.gate

    def forward(self, work: Callable[[], T]) -> T:
        """Whatever computes with the model."""
        return work()


def shard(model: LanguageModel, mesh: DeviceMesh) -> Pass:
    """Spread a model's parameters over the ranks: each layer by itself, all the rest (ties included) together.

    Everything is gathered for its pass and given up behind it, so that no pass sees what an update has made old.
    """
    for layer in layers_of(model.module):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole_pass = Pass(model)
    fully_shard(whole_pass, mesh=mesh, reshard_after_forward=True)
    for part in whole_pass.modules():
        if isinstance(part, FSDPModule):  # weights were written over the whole step, so gradients are summed
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            part.set_reduce_scatter_unused_params(True)  # an expert that no token of this rank was sent to
    return whole_pass


class ShardedTrainer(LocalTrainer):
    """A `LocalTrainer` whose parameters, gradients and optimizer state are spread over the ranks of a mesh."""

    def __init__(
        self,
        local: LocalTrainer,
        mesh: DeviceMesh,
        *,
        context: ContextRanks | None = None,
        most_tokens: int | None = None,
    ) -> None:
        """Takes the trainer's models over. `most_tokens`: no micro-batch may have more, since memory ran out before.

        Raises `ModelError` where the models cannot be computed by the ranks of a `context` together.
        """
        vars(self).update(vars(local))
        if context is not None:
            self.model = _together(self.model, context)
            self.frozen = {name: _together(model, context) for name, model in self.frozen.items()}
            self.together = context.size if self.config.microbatch_tokens == "auto" else 1
            self.budget.tokens *= self.together
        self._most_tokens = most_tokens
        self._limit()
        self._blank = _without_content(self.model)
        models = (self.model, *self.frozen.values())
        self._passes = {id(model.module): shard(model, mesh) for model in models}
        self.optimizers = Optimizers(self.model.parameters, self.config)
        self._idle: Callable[[], object] = _nothing_to_do

    # ------------------------------------------------------------------------------------------- commands

    def forward_backward(
        self, atoms: Sequence[Atom], objective: Objective, idle: Atom | None = None
    ) -> dict[str, Metric]:
        """Add the gradient of this rank's atoms; `idle` is what it computes, at weight 0, while others have more."""
        self._idle = partial(self._backward, _weightless(idle), objective, list(self.model.parameters.values()), set())
        with self._randomness():
            return super().forward_backward(atoms, objective)

    def evaluate(self, atoms: Sequence[Atom], objective: Objective, idle: Atom | None = None) -> dict[str, Metric]:
        """The metrics of this rank's atoms."""
        self._idle = partial(self._backward, _weightless(idle), objective, (), set())
        return super().evaluate(atoms, objective)

    def forward(
        self,
        rows: Sequence[TokenRow],
        *want: Want,
        temperature: float = 1.0,
        frozen: str | None = None,
        top_k: int = 0,
        idle: TokenRow | None = None,
    ) -> dict[str, list[Column]]:
        """The wanted columns of this rank's rows, of which there may be none."""
        ask = Ask(frozenset(want), temperature=temperature, top_k=top_k)
        with self._under(frozen) as model:
            if idle is not None:
                work = partial(model.read, [Atom(rows=(replace(idle, shared=0),))], ask)
                self._idle = partial(self._pass, model, work)
            read = self._read(model, rows, ask)
        return {name: [row[name].numpy() for row in read] for name in ask.columns}

    def save(self, folder: Path) -> None:
        """This rank's shards; the first rank notes the rest."""
        write_shards(folder, self._state())
        if dist.get_rank() == 0:
            self._note(folder)

    def load(self, folder: Path) -> None:
        """Continue from what any number of ranks saved."""
        super().load(folder)
        self._limit()

    def export(self, folder: Path) -> None:
        """The whole model, written by the first rank, which holds it on the host meanwhile."""
        gathered: list[nn.Parameter] = []
        for p in _parameters(self.model):
            full = whole(p.detach())
            if dist.get_rank() == 0:
                gathered.append(nn.Parameter(full.cpu(), requires_grad=False))
        if dist.get_rank() == 0:
            memo = {id(blank): full for blank, full in zip(_parameters(self._blank), gathered, strict=True)}
            _copied(self._blank, memo, torch.device("cpu")).export(folder)

    def gather(self, path: Path) -> str:
        """The trainable weights as one safetensors file, written by the first rank; its SHA-256, on the others ''."""
        full = {}
        for name, p in self.model.parameters.items():
            tensor = whole(p.detach())
            if dist.get_rank() == 0:
                full[name] = tensor.cpu()
        if dist.get_rank() != 0:
            return ""
        save_file(full, path)
        return digest_file(path).sha256

    # --------------------------------------------------------------- what `LocalTrainer` leaves to the ranks

    def _pass(self, model: LanguageModel, work: Callable[[], T]) -> T:
        result: T = self._passes[id(model.module)](work)
        return result

    def _in_step(self, batches: Iterator[T]) -> Iterator[T]:
        own = list(batches)
        passes = torch.tensor(len(own))
        dist.all_reduce(passes, dist.ReduceOp.MAX)
        yield from own
        for _ in range(int(passes) - len(own)):
            self._idle()

    def _backward(
        self, atoms: Sequence[Atom], objective: Objective, owed: Sequence[nn.Parameter], reached: set[int]
    ) -> dict[str, Metric]:
        loss, tallies = self._pass(self.model, partial(self._run, atoms, objective))
        if owed:
            loss.backward()
        return {name: Metric(float(tally.total), float(tally.weight)) for name, tally in tallies.items()}

    def _shrink(self, micro: Sequence[Atom], pieces: int) -> None:
        super()._shrink(micro, pieces)
        raise RankOutOfMemory(self.budget.tokens)

    def _like(self, kind: str, name: str) -> Tensor | None:
        if kind in self.frozen:
            there: Tensor = self.frozen[kind].module.get_parameter(name)
            return there
        return self.model.parameters.get(name if kind == "weights" else name.rpartition(":")[0])

    def _limit(self) -> None:
        if self._most_tokens is not None:
            self.budget.tokens = min(self.budget.tokens, self._most_tokens)

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        """Dropout and noise of its own on each rank; the generators that all ranks have in common go on alike."""
        drawn = int(torch.randint(2**62, ()))
        dropout = self.config.lora is not None and self.config.lora.dropout > 0
        random = dropout or bool(self.model.noise)
        with torch.random.fork_rng() if random else nullcontext():
            if random:
                torch.manual_seed(drawn + dist.get_rank())
            yield


def _nothing_to_do() -> None:
    raise AssertionError("a rank has fewer passes than another, and was given nothing to compute meanwhile")


def _together(model: LanguageModel, context: ContextRanks) -> LanguageModel:
    if model.gate is not None:
        raise ModelError(f"{model.name}: machine.trainer.context does not go with a gate; set it to 1")
    config = text_config(model.module.config)
    heads = config.num_attention_heads
    context.require(heads, getattr(config, "num_key_value_heads", None) or heads, model.name)
    return replace(model, context=context)


def _weightless(idle: Atom | None) -> list[Atom]:
    return [] if idle is None else [Atom(rows=tuple(row.with_columns(weight=0.0) for row in idle.rows))]


def _parameters(model: LanguageModel) -> list[nn.Parameter]:
    """All of them, in an order that each rank has; tied ones once."""
    return [*model.module.parameters(), *(model.gate.parameters() if model.gate is not None else ())]


def _without_content(model: LanguageModel) -> LanguageModel:
    """A copy whose parameters have shapes alone: what an export fills."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in _parameters(model)}
    return _copied(model, memo, model.device)


def _copied(model: LanguageModel, memo: dict[int, Any], device: torch.device) -> LanguageModel:
    module, adapter, gate = copy.deepcopy((model.module, model.adapter, model.gate), memo)
    return replace(model, module=module, adapter=adapter, gate=gate, device=device)
