"""The loop over examples: updates that were thrown away are counted in a row, stopped in between or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, nan
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.laws.support import random_atoms, tiny_trainer
from whet.algorithms.sequence_sums import add_constant
from whet.algorithms.sft import CrossEntropy
from whet.algorithms.supervised import supervised
from whet.config import TrainConfig
from whet.config.loading import load_recipe
from whet.data.mixture import Blend, epoch_order
from whet.errors import TrainingError
from whet.launch import world
from whet.launch.main import run_recipe
from whet.records import Atom, Step
from whet.training.base import Batch, Outputs, Tally


def steps(weights: Iterator[float], **resumed: object) -> Iterator[Step]:
    """Six steps; each takes the next weight for all of its tokens."""

    def weigh(batch: list[Atom]) -> list[Atom]:
        return [add_constant(atom, "weight", weight) for weight in [next(weights)] for atom in batch]

    loop = partial(supervised, tiny_trainer(dtype=torch.float32), random_atoms(), weigh, CrossEntropy())
    return loop(TrainConfig(batch_size=2, steps=6), seed=0, **resumed)  # type: ignore[arg-type]


def test_three_in_a_row_end_it_and_a_good_one_between_begins_anew() -> None:
    assert [s.metrics["skipped"] for s in steps(iter([nan, nan, 1.0, nan, nan, 1.0]))] == [1, 1, 0, 1, 1, 0]
    with pytest.raises(TrainingError, match=r"step 4: an update was skipped, .* not finite; .*, 3 steps in a row"):
        list(steps(iter([1.0, nan, nan, nan])))


@dataclass(frozen=True, kw_only=True)
class Scaled(CrossEntropy):
    """Cross-entropy times a column."""

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        nll_T = -outputs.logp_T * batch.columns["scale"]
        count = batch.weight_T.new_tensor(len(nll_T))
        return (batch.weight_T * nll_T).sum(), {"loss": Tally(total=nll_T.detach().sum(), weight=count)}


def test_an_update_that_is_skipped_names_the_layer_and_the_examples() -> None:
    trainer, atoms = tiny_trainer(dtype=torch.float32), random_atoms()
    first, *_ = epoch_order(Blend((len(atoms),)), 0, 0)
    scaled = [add_constant(atom, "scale", inf if place == first else 1.0) for place, atom in enumerate(atoms)]

    def weigh(batch: Sequence[Atom]) -> list[Atom]:
        return [add_constant(atom, "weight", 1.0) for atom in batch]

    step = next(supervised(trainer, scaled, weigh, Scaled(), TrainConfig(batch_size=2, steps=6), seed=0))
    layer = next(iter(trainer.model.parameters))
    assert step.notes == (
        f"an update was skipped, the gradient of {layer} was not finite; the loss of example {first + 1} is not",
    )


def test_a_run_that_goes_on_remembers_how_many_there_were() -> None:
    loop = steps(iter([1.0, nan, nan]))
    *_, last = (next(loop) for _ in range(3))
    with pytest.raises(TrainingError, match="step 4"):
        next(steps(iter([nan]), start=3, state=last.state))


def test_a_stage_that_never_samples_starts_no_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("SFT samples nothing")

    monkeypatch.setitem(world.SAMPLERS, "embedded", refused)
    (tmp_path / "sft.yaml").write_text(
        'name: sft\nmodel: "whet:demo"\nstages: {sft: {kind: sft, data: {generate: arithmetic}, train: {steps: 1}}}\n'
    )
    run_recipe(load_recipe(tmp_path / "sft.yaml", [f"out={tmp_path / 'run'}"]), quiet=True)
    assert (tmp_path / "run" / "stages" / "01-sft" / "model").is_dir()
