"""What a frozen model says of all rows is computed once: again where something changed, and never from stale files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.laws.support import random_atoms
from whet.errors import RunError
from whet.pipeline import passes
from whet.pipeline.stage import Interrupted
from whet.records import TokenRow
from whet.training.checkpoint import save_generation

ROWS = [row for atom in random_atoms(groups=3, rows=2) for row in atom.rows][:5]


class Pass:
    """Five rows or fewer in files of two, under a model that is a folder with one file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(passes, "CHUNK_ROWS", 2)
        self.root, self.folder, self.stopped = folder, folder / "pass", False
        (folder / "model").mkdir()
        self.retrain("first")

    def retrain(self, weights: str) -> None:
        (self.root / "model" / "weights").write_text(weights)

    def read(self, rows: Sequence[TokenRow] = ROWS, *, trained: bool = True) -> list[int]:
        """Do it; the sizes of the chunks that the model had to read. What comes of it is right in any case."""
        asked: list[int] = []

        def model(chunk: Sequence[TokenRow]) -> Tensor:
            asked.append(len(chunk))
            return torch.tensor([float(sum(row.tokens)) for row in chunk])

        context: Any = SimpleNamespace(checkpoints=self.root / "checkpoints", stopped=lambda: self.stopped)
        where = str(self.root / "model")
        found = torch.cat(list(passes.kept_pass(context, self.folder, rows, model, model=where, trained=trained)))
        assert found.tolist() == [float(sum(row.tokens)) for row in rows]
        return asked

    def save_a_checkpoint(self) -> None:
        save_generation(self.root / "checkpoints", 1, {}, lambda folder: None, keep=1)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pass:
    return Pass(tmp_path, monkeypatch)


def test_it_is_computed_once_and_only_what_is_missing_or_damaged_again(kept: Pass) -> None:
    assert kept.read() == [2, 2, 1]
    assert kept.read() == []
    (kept.folder / "00002.safetensors").unlink()
    assert kept.read() == [1]
    (kept.folder / "00000.safetensors").write_bytes(b"cut off")
    assert kept.read() == [2]
    save_file({"said": load_file(kept.folder / "00001.safetensors")["said"] + 1}, kept.folder / "00001.safetensors")
    assert kept.read() == [2], "whole, but not as it was written"


def test_other_rows_or_another_model_are_read_again_and_nothing_stale_stays(kept: Pass) -> None:
    kept.read()
    assert kept.read(ROWS[1:4]) == [2, 1]
    assert sorted(path.name for path in kept.folder.iterdir()) == [
        "00000.safetensors", "00001.safetensors", "key.json",
    ]  # fmt: skip
    first, *others = ROWS[1:4]
    assert kept.read([replace(first, tokens=(first.tokens[0] + 1, *first.tokens[1:])), *others]) == [2, 1]
    kept.retrain("second one")
    assert kept.read(ROWS[1:4]) == [2, 1] and kept.read(ROWS[1:4]) == []
    (kept.folder / "key.json").unlink()
    assert kept.read(ROWS[1:4]) == [2, 1], "files that nobody knows the rows of"


def test_once_there_is_a_checkpoint_the_model_is_the_one_that_the_run_began_with(kept: Pass) -> None:
    kept.read()
    kept.save_a_checkpoint()
    kept.retrain("second one")
    assert kept.read() == [] == kept.read()
    with pytest.raises(RunError, match=r"the pass rows are not those that this run began with; put the data back"):
        kept.read(ROWS[:4])
    assert kept.read() == [], "and nothing is lost by it"


def test_a_model_that_no_checkpoint_has_must_stay_what_it_was(kept: Pass) -> None:
    kept.read(trained=False)
    kept.save_a_checkpoint()
    assert kept.read(trained=False) == []
    kept.retrain("second one")
    with pytest.raises(RunError, match=r"model: is not the model that this run began with; put it back"):
        kept.read(trained=False)


def test_asked_to_stop_it_keeps_what_it_has(kept: Pass) -> None:
    kept.read()
    (kept.folder / "00001.safetensors").unlink()
    kept.stopped = True
    with pytest.raises(Interrupted):
        kept.read()
    kept.stopped = False
    assert kept.read() == [2]
