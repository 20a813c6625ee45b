"""No operation mixes devices: what would fail, or wait for the host, on a GPU, found without one.

The model is on torch's `meta` device, which has shapes and no numbers, and everything else on the host; every operation
that torch is asked for goes through a mode that refuses a host tensor beside one of the device. What is read back from
the device is ones, indices are zeros. So the engine and the trainer run as they do on a GPU, backward included.
(Tensors on "cuda" under `FakeTensorMode` do not get so far in a torch without CUDA: `test_fake_devices`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.laws.support import SHAPE, answers_of, random_atoms
from whet.algorithms.policy_loss import policy_loss
from whet.algorithms.sft import CrossEntropy
from whet.config import LoraConfig, ModelConfig, PolicyConfig, TrainConfig
from whet.formulas import logprobs
from whet.models import language
from whet.models.language import LanguageModel
from whet.models.load import load_skeleton
from whet.records import Completion
from whet.sampling.base import Request, SamplingParams
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.engine import Engine
from whet.sampling.weight_sync import base_weights
from whet.training.base import Objective
from whet.training.engine import LocalTrainer

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
"""From one device to the other on purpose."""
META = torch.device("meta")


class Mixed(Exception):
    """An operation on both devices."""


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of host and device together, and answers what is read back.

    With ones, where it is indices zeros; a question with yes at every fourth time, so that loops end, but not at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [each for each in tensors if each.is_meta]
        # A number of the host, which has no dimensions, goes along as an argument.
        here = [each for each in tensors if not each.is_meta and each.dim()]
        if there and here and function not in COPIES:
            shown = ", ".join(f"{each.device.type}{tuple(each.shape)}" for each in tensors)
            raise Mixed(f"{function}: {shown}")
        if there and (answer := self._answer(function, args, kwargs)) is not None:
            self.read += 1
            return answer
        return function(*args, **kwargs)

    def _answer(self, function: Any, args: Any, kwargs: Any) -> Any:
        of = args[0]
        if function is aten._local_scalar_dense.default:
            return self.read % 4 == 3 if of.dtype == torch.bool else 1.0 if of.is_floating_point() else 0
        if function is aten.equal.default:
            return True
        if function is aten.nonzero.default:
            return torch.zeros(1, of.dim(), dtype=torch.long, device=META)
        if function is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.full(of.shape, float(of.is_floating_point()), dtype=kwargs.get("dtype") or of.dtype)
        return of.fill_(of.is_floating_point()) if function is aten.copy_.default and not of.is_meta else None


class OneDeviceIndex(TorchFunctionMode):
    """Refuses what torch carries to the other device without a word: an index."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            for key in args[1] if isinstance(args[1], tuple) else (args[1],):
                where = key.device if isinstance(key, Tensor) else torch.device("cpu")
                if isinstance(key, Tensor | list) and where != args[0].device:
                    raise Mixed(f"{function.__name__}: a tensor of {args[0].device} by an index of {where}")
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of devices by name, for one more that has no kernels of its own."""
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "meta", 2**10)
    monkeypatch.setattr(language, "pick_backend", lambda _: "masked")
    get_torch_obj_rule_map()  # the compiler lists torch's functions once, and must not list this one
    enabled, adamw = torch.is_autocast_enabled, torch.optim.AdamW
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device != "meta" and enabled(device))
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **of: adamw(groups, **{**of, "fused": False}))


@pytest.fixture
def watch(_as_a_gpu: None) -> Iterator[OneDevice]:
    with OneDevice() as mode, OneDeviceIndex():
        yield mode


def model(lora: LoraConfig | None = None) -> LanguageModel:
    return replace(load_skeleton(ModelConfig(path="whet:tiny", create=SHAPE), lora=lora), device=META)


there, here = torch.ones(3, 4, device="meta"), torch.ones(3, 4)
GRPO = policy_loss(PolicyConfig(), temperature=1.0, kl_coefficient=0.1)
WRONG: list[Callable[[], object]] = [
    lambda: there + here,
    lambda: there[torch.tensor([0, 1])],
    lambda: there[[0, 1]],
    lambda: torch.where(here > 0, there, 0.0),
    lambda: there.index_put_((torch.tensor([0]),), torch.ones(4, device=META)),
    lambda: here[torch.zeros(1, dtype=torch.long, device=META)],
    lambda: there.gather(0, torch.zeros(1, 4, dtype=torch.long)),
]


@pytest.mark.parametrize("work", WRONG)
def test_the_law_refuses(watch: OneDevice, work: Callable[[], object]) -> None:
    with pytest.raises(Mixed):
        work()


def test_the_law_allows_numbers_and_copies(watch: OneDevice) -> None:
    assert float((there * 2.0 * torch.tensor(3.0)).sum()) == 1
    assert there[0].cpu().tolist() == [1, 1, 1, 1]
    assert here.to(META).is_meta and watch.read == 2


@pytest.mark.parametrize(
    ("train", "objective"),
    [({}, CrossEntropy()), ({}, GRPO), ({"lora": {"rank": 2}}, GRPO), ({"optimizer": "muon"}, GRPO)],
)
def test_a_training_step(watch: OneDevice, train: dict[str, Any], objective: Objective) -> None:
    config = TrainConfig.model_validate({"microbatch_tokens": 60, "lr": 1e-3, **train})
    trainer = LocalTrainer(model(config.lora), config, {} if config.lora else {"reference": model()})
    for _ in range(2):
        trainer.forward_backward(random_atoms(), objective)
        assert trainer.optim_step(1.0).applied
    rows = [row for atom in random_atoms() for row in atom.rows]
    read = trainer.forward(rows, "logp", "entropy", "top_k", top_k=3, frozen="reference")
    assert [len(column) for column in read["logp"]] == [row.trained_count for row in rows]


def test_an_offloaded_optimizer_and_a_moved_reference(watch: OneDevice) -> None:
    """Parameters themselves cannot be laid down here: torch lets no `meta` parameter have data on the host."""
    trainer = LocalTrainer(model(), TrainConfig(offload=["optimizer"], lr=1e-3), {"reference": model()})
    for _ in range(2):
        trainer.forward_backward(random_atoms(), CrossEntropy())
        trainer.optim_step(1.0)
        trainer.update_frozen("reference", 0.5)
    assert {each.device.type for each in trainer.optimizers.state().values()} == {"cpu"}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("how", [{}, {"top_p": 0.9, "top_k": 5, "temperature": 0.7}, {"temperature": 0}])
def test_sampling_and_handing_over(
    watch: OneDevice, wide: bool, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "one_width", wide)  # as on a GPU
    sampler = EmbeddedSampler(model(), max_running=4)
    prompts = [tuple(range(5, 105)), tuple(range(9, 12))] * 3
    params = SamplingParams(max_tokens=5, **how)
    requests = [Request(prompt=prompt, seed=i, samples=3, params=params) for i, prompt in enumerate(prompts)]
    assert all(isinstance(each, Completion) for each in answers_of(sampler, requests))
    sampler.publish(1)
    assert answers_of(sampler, requests[:1])[0].version == 1
    assert all(weight.is_meta for _, weight in base_weights(model(LoraConfig(rank=2))))
