"""Merging: formulas by hand, and models that come out as their formula says or are refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.laws.support import SHAPE
from whet.config import LoraConfig, MergeInput, MergeStage, ModelConfig
from whet.errors import ModelError
from whet.formulas.constants import Bound
from whet.formulas.merge import linear, slerp, task_arithmetic, ties
from whet.models.load import load_model
from whet.models.merge import merge_models


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


BASE = vector(1, 1, 1, 1)


def test_means_and_task_vectors_by_hand() -> None:
    left, right = vector(2, 0, 1, 1), vector(1, 4, 1, 3)
    torch.testing.assert_close(linear(BASE, [left, right], [1, 3]), vector(1.25, 3, 1, 2.5))
    torch.testing.assert_close(task_arithmetic(BASE, [left, right], [1, -0.5], scale=2), vector(3, -4, 1, -1))


def test_slerp_goes_along_the_arc() -> None:
    """Between orthogonal unit vectors a third of the way is 30 degrees; on one line it is the straight one."""
    found = slerp(BASE, [vector(1, 0), vector(0, 1)], [2, 1])
    torch.testing.assert_close(found, vector(math.cos(math.pi / 6), math.sin(math.pi / 6)))
    torch.testing.assert_close(slerp(BASE, [vector(1, 0), vector(3, 0)], [1, 1]), vector(2, 0))
    torch.testing.assert_close(slerp(BASE, [vector(1, 0), vector(-1, 0)], [3, 1]), vector(0.5, 0))
    assert not slerp(BASE, [vector(0, 0), vector(0, 0)], [1, 1]).any()


def test_ties_trims_elects_and_merges_by_hand() -> None:
    """Differences (3, -2, .1, 1) and (-1, -4, .2, 0): half of each is kept, (3, -2) and (-1, -4); signs +, -."""
    left, right = BASE + vector(3, -2, 0.1, 1), BASE + vector(-1, -4, 0.2, 0)
    torch.testing.assert_close(ties(BASE, [left, right], [1, 1], density=0.5), BASE + vector(3, -3, 0, 0))
    torch.testing.assert_close(
        ties(BASE, [left, right], [1, 3], density=0.5, scale=2), BASE + vector(0, -7, 0, 0)
    )  # -1 outvotes 3 by its weight only where 3 < 3 x 1 does not hold: they cancel, and no sign is elected


def export(folder: Path, seed: int, **changes: object) -> MergeInput:
    config = ModelConfig(path="whet:tiny", create=SHAPE.model_copy(update={"seed": seed, **changes}))
    load_model(config).export(folder)
    return MergeInput(path=str(folder))


def test_a_soup_is_the_mean_of_its_models_and_stops_where_they_do(tmp_path: Path) -> None:
    inputs = [export(tmp_path / str(seed), seed) for seed in (0, 1)]
    merged = merge_models(inputs, None, linear, {258}, tmp_path)
    merged.export(tmp_path / "soup")
    found, *states = (
        load_model(ModelConfig(path=str(tmp_path / name))).module.state_dict() for name in ("soup", "0", "1")
    )
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    assert (tmp_path / "soup" / "chat_template.jinja").read_text() == (
        tmp_path / "0" / "chat_template.jinja"
    ).read_text()


@pytest.mark.parametrize("method", [task_arithmetic, Bound(ties, density=1.0)])
def test_the_only_task_vector_gives_the_model_itself(method: object, tmp_path: Path) -> None:
    base, model = (export(tmp_path / str(seed), seed) for seed in (0, 1))
    merged = merge_models([model], base, method, (), tmp_path)  # type: ignore[arg-type]
    for name, tensor in load_model(model.alone()).module.state_dict().items():
        torch.testing.assert_close(merged.module.state_dict()[name], tensor)


def test_an_adapter_goes_into_its_base_as_an_export_says(tmp_path: Path) -> None:
    base = export(tmp_path / "base", 0)
    tuned = load_model(base.alone(), lora=LoraConfig(rank=2))
    for name, p in tuned.parameters.items():
        torch.manual_seed(len(name))
        torch.nn.init.normal_(p, std=0.1)
    tuned.export(tmp_path / "tuned")
    added = base.model_copy(update={"adapter": tmp_path / "tuned" / "adapter"})
    found = merge_models([added], None, linear, (), tmp_path / "sums").module.state_dict()
    for name, tensor in load_model(ModelConfig(path=str(tmp_path / "tuned"))).module.state_dict().items():
        torch.testing.assert_close(found[name], tensor)
    wrong = export(tmp_path / "wide", 0, hidden_size=48).model_copy(update={"adapter": added.adapter})
    with pytest.raises(ModelError, match=r"adapter: is no adapter of .*wide"):
        merge_models([wrong], None, linear, (), tmp_path / "sums")


def test_what_does_not_belong_together_is_refused_by_name(tmp_path: Path) -> None:
    inputs = [export(tmp_path / "a", 0), export(tmp_path / "b", 0, intermediate_size=64)]
    with pytest.raises(ModelError, match=r"b: intermediate_size is 64 and that of .*a 48; only models of one shape"):
        merge_models(inputs, None, linear, (), tmp_path)
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages }}\n")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    del config["whet_template"]  # as a published model, which says nothing of its template
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"b: its chat template is not that of .*a \(line 1 is '\{\{ messages"):
        merge_models(inputs, None, linear, (), tmp_path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": {"kind": "slerp"}, "inputs": ["a", "b", "c"]}, "slerp is between two inputs"),
        ({"method": {"kind": "ties"}}, "base goes with method"),
        ({"base": "a"}, "base goes with method"),
        ({"model": {"path": "a"}}, "model has no effect on a merge"),
        ({"inputs": [{"path": "a", "weight": 0}]}, "must add up to more than 0"),
        ({"method": {"kind": "slerp", "density": 0.5}}, "density"),
    ],
)
def test_a_merge_that_means_nothing_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        MergeStage.model_validate({"kind": "merge", "inputs": ["a", "b"], **changes})
