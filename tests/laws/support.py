"""A small model in float64, and random atoms, for laws about numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from whet.config import CreateConfig, LoraConfig, ModelConfig, TrainConfig
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.records import Atom, Completion, TokenRow
from whet.sampling.base import Request, TokenSampler, run, sample_all
from whet.training.engine import LocalTrainer

SHAPE = CreateConfig(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, max_length=128)


def answers_of(sampler: TokenSampler, requests: Sequence[Request]) -> list[Any]:
    """The completion, or the error, of each request, all of them awaited together."""
    return run(sample_all(sampler, requests))


def written(answer: Completion) -> tuple[int, ...]:
    """Its tokens."""
    return tuple(answer.tokens.tolist())


def tiny_model(*, dtype: torch.dtype = torch.float64, lora: LoraConfig | None = None, seed: int = 0) -> LanguageModel:
    """Random weights, the same for the same seed."""
    torch.manual_seed(seed)
    model = load_model(ModelConfig(path="whet:tiny", create=SHAPE.model_copy(update={"seed": seed})), lora=lora)
    if dtype == torch.float64:
        _widen_norms(model.module)
    return replace(model, module=model.module.to(dtype))


def tiny_trainer(
    *, microbatch_tokens: int = 10_000, dtype: torch.dtype = torch.float64, **train: object
) -> LocalTrainer:
    """A trainer of the tiny model without gradient clipping."""
    given = {"microbatch_tokens": microbatch_tokens, "clip_norm": None, "lr": 1e-3, **train}
    config = TrainConfig.model_validate(given)
    return LocalTrainer(tiny_model(dtype=dtype, lora=config.lora), config)


def random_atoms(groups: int = 4, rows: int = 3, *, seed: int = 0) -> list[Atom]:
    """Groups of answers to one prompt, of unequal lengths, with every column that an objective may ask for."""
    draw = random.Random(seed)
    atoms = []
    for _ in range(groups):
        prompt = tuple(draw.randrange(200) for _ in range(draw.randrange(1, 9)))
        atoms.append(Atom(rows=tuple(_row(prompt, draw) for _ in range(rows))))
    return atoms


def logps_of(
    trainer: LocalTrainer, rows: Sequence[TokenRow], *, temperature: float = 1.0, frozen: str | None = None
) -> list[tuple[float, ...]]:
    """log p of each row's trained tokens, as plain numbers."""
    return [tuple(x.tolist()) for x in trainer.forward(rows, "logp", temperature=temperature, frozen=frozen)["logp"]]


def values_of(trainer: LocalTrainer, rows: Sequence[TokenRow]) -> list[tuple[float, ...]]:
    """The value before each of a row's trained tokens, as plain numbers."""
    return [tuple(x.tolist()) for x in trainer.forward(rows, "value")["value"]]


def scores_of(trainer: LocalTrainer, rows: Sequence[TokenRow]) -> list[tuple[tuple[float, ...], ...]]:
    """All outputs of the head at each of a row's trained tokens, as plain numbers."""
    return [tuple(map(tuple, x.tolist())) for x in trainer.forward(rows, "score")["score"]]


def gradients(trainer: LocalTrainer) -> dict[str, torch.Tensor]:
    """A copy of the gradient of every parameter; clears them."""
    found = {name: p.grad.clone() for name, p in trainer.model.parameters.items() if p.grad is not None}
    trainer.optimizers.zero_grad()
    return found


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over all parameters."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def _widen_norms(module: torch.nn.Module) -> None:
    """transformers' norms round to float32 inside; laws to 1e-12 need them in float64 throughout."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Qwen3RMSNorm":
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)


def _row(prompt: tuple[int, ...], draw: random.Random) -> TokenRow:
    length = draw.randrange(1, 20)
    answer = tuple(draw.randrange(200) for _ in range(length))
    trained = (*(draw.random() < 0.8 for _ in range(length - 1)), True)
    count = sum(trained)

    def numbers(scale: float) -> tuple[float, ...]:
        return tuple(draw.uniform(-scale, scale) for _ in range(count))

    return TokenRow(
        tokens=prompt + answer,
        trained=(False,) * len(prompt) + trained,
        shared=len(prompt),
        columns={
            "weight": tuple(draw.random() for _ in range(count)),
            "advantage": numbers(2),
            "old_logp": tuple(-5.5 + x for x in numbers(0.3)),
            "ref_logp": tuple(-5.5 + x for x in numbers(0.3)),
            "sampler_logp": numbers(1),
            "positive": tuple(abs(x) for x in numbers(2)),
        },
    )
