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
from whet.pipeline import reference
from whet.pipeline.stage import Interrupted
from whet.records import TokenRow

ROWS = [row for atom in random_atoms(groups=3, rows=2) for row in atom.rows][:5]


class Pass:
    """Five rows or fewer in files of two, under a model that adds the tokens up."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reference, "CHUNK_ROWS", 2)
        self.folder, self.stopped = folder / "pass", False

    def read(self, rows: Sequence[TokenRow] = ROWS) -> list[int]:
        """Do it; the sizes of the chunks that the model had to read. What comes of it is right in any case."""
        asked: list[int] = []

        def model(chunk: Sequence[TokenRow]) -> Tensor:
            asked.append(len(chunk))
            return torch.tensor([float(sum(row.tokens)) for row in chunk])

        context: Any = SimpleNamespace(stopped=lambda: self.stopped)
        found = torch.cat(list(reference.cached_forward(context, self.folder, rows, model)))
        assert found.tolist() == [float(sum(row.tokens)) for row in rows]
        return asked


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


def test_other_rows_are_read_again_and_nothing_stale_stays(kept: Pass) -> None:
    kept.read()
    assert kept.read(ROWS[1:4]) == [2, 1]
    assert sorted(path.name for path in kept.folder.iterdir()) == ["00000.safetensors", "00001.safetensors"]
    first, *others = ROWS[1:4]
    assert kept.read([replace(first, tokens=(first.tokens[0] + 1, *first.tokens[1:])), *others]) == [2]
    assert kept.read(ROWS[2:4]) == [2] and kept.read(ROWS[2:4]) == []
    assert [path.name for path in kept.folder.iterdir()] == ["00000.safetensors"]


def test_asked_to_stop_it_keeps_what_it_has(kept: Pass) -> None:
    kept.read()
    (kept.folder / "00001.safetensors").unlink()
    kept.stopped = True
    with pytest.raises(Interrupted):
        kept.read()
    kept.stopped = False
    assert kept.read() == [2]
