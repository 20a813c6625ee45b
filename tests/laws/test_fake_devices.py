"""The same law as `test_devices` under torch's `FakeTensorMode`: tensors on "cuda" by name, without numbers.

So what asks for the device by its name (chunks, one width of slabs) goes the GPU's way, and torch itself refuses
operations on two devices. A torch that was built without CUDA allows no more than passes without a graph: to record
one asks for a device guard, whose absence ends the process at once (not with an exception), so backward passes are
under `meta` in `test_devices`. It also switches autocast off for "cuda", so all is in float32. Indexing, copies between
devices and reading back ask for that guard, too, or have no numbers; `Guardless` gives them by other operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from tests.laws.support import SHAPE, answers_of, random_atoms
from tests.laws.test_devices import GRPO
from whet.algorithms.sft import CrossEntropy
from whet.config import LoraConfig, ModelConfig, TrainConfig
from whet.models import language
from whet.models.language import LanguageModel
from whet.models.load import load_skeleton
from whet.records import Completion
from whet.sampling import engine
from whet.sampling.base import Request, SamplingParams
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.tickets import EagerStep
from whet.sampling.weight_sync import base_weights
from whet.training.base import Objective
from whet.training.engine import LocalTrainer

CUDA = torch.device("cuda", 0)
SCALARS = (Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__)


class Mixed(Exception):
    """An index on another device than what it is an index of, which torch would carry over without a word."""


class Guardless(TorchFunctionMode):
    """What needs a device guard or a number, without: read back are ones, where it is indices zeros.

    A question is answered with yes at every fourth time, so that loops end, but not at once.
    """

    read = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, of = kwargs or {}, args[0] if args else None
        if not isinstance(of, FakeTensor):
            return function(*args, **kwargs)
        if function in SCALARS:
            self.read += 1
            return self.read % 4 == 3 if of.dtype == torch.bool else 1.0 if of.is_floating_point() else 0
        if function in (Tensor.numpy, Tensor.tolist):
            with unset_fake_temporarily():
                return getattr(torch.full(of.shape, of.is_floating_point(), dtype=of.dtype), function.__name__)()
        if function is Tensor.to and not (args[1:] and isinstance(args[1], Tensor)):
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type != of.device.type:
                return torch.empty(of.shape, dtype=dtype or of.dtype, device=device)
        if function in INSTEAD:
            return INSTEAD[function](*args, **kwargs)
        return function(*args, **kwargs)


def indexed(of: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What is left to index once slices and numbers are looked up, and the tensors to index it by."""
    dim, indices = 0, list[Tensor | None]()
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, Tensor | list):
            where = part.device.type if isinstance(part, Tensor) else "cpu"
            if where != of.device.type:
                raise Mixed(f"a tensor of {of.device} by an index of {where}")
            boolean = isinstance(part, Tensor) and part.dtype == torch.bool
            part = torch.zeros(1, dtype=torch.long, device=of.device) if boolean else torch.as_tensor(part)
            indices += [None] * (dim - len(indices)) + [part]
            dim += 1
        elif part is Ellipsis:
            dim = of.dim() - (len(key) - 1 - sum(each is None for each in key))  # with nothing but slices behind it
        elif part is None:
            of, dim = of.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            of, dim = torch.ops.aten.slice.Tensor(of, dim, part.start, part.stop, part.step or 1), dim + 1
        else:
            of = of.select(dim, int(part))
    return of, indices


def get(of: Tensor, key: Any) -> Tensor:
    view, indices = indexed(of, key)
    return torch.ops.aten.index.Tensor(view, indices) if indices else view


def put(of: Tensor, key: Any, value: Any) -> None:
    view, indices = indexed(of, key)
    given = value if isinstance(value, Tensor) else torch.full((), value, dtype=of.dtype, device=of.device)
    if indices:
        torch.ops.aten.index_put_.default(view, indices, given)


INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.equal: lambda *_: True,
    Tensor.nonzero: lambda of: torch.zeros(1, of.dim(), dtype=torch.long, device=of.device),
    Tensor.new_tensor: lambda of, data, dtype=None: torch.tensor(data, dtype=dtype or of.dtype, device=of.device),
    Tensor.copy_: lambda of, other: of.expand(torch.broadcast_shapes(of.shape, other.shape)),
    Tensor.__getitem__: get,
    Tensor.__setitem__: put,
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engine, "step_of", lambda forward, device, plain: EagerStep(forward))  # no CUDA graphs
    monkeypatch.setattr(language, "pick_backend", lambda _: "masked")  # flex is compiled
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Guardless():
        yield


def model(lora: LoraConfig | None = None) -> LanguageModel:
    """On the GPU, without gradients: a graph would end the process."""
    with unset_fake_temporarily():
        made = load_skeleton(ModelConfig(path="whet:tiny", create=SHAPE), lora=lora)
    moved: dict[int, Tensor] = {}
    for part in made.module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in moved:
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                    is_parameter = held is part._parameters
                    moved[id(tensor)] = nn.Parameter(there, requires_grad=False) if is_parameter else there
                held[name] = tensor if tensor is None else moved[id(tensor)]
    return replace(made, device=CUDA)


def test_the_law_refuses_what_is_on_two_devices(gpu: None) -> None:
    there, here = torch.ones(3, 4, device=CUDA), torch.ones(3, 4)
    for wrong in (
        lambda: there + here,
        lambda: torch.where(here > 0, there, 0.0),
        lambda: there[torch.tensor([0, 1])],
        lambda: there[[0, 1]],
        lambda: here[torch.zeros(1, dtype=torch.long, device=CUDA)],
        lambda: there.gather(0, torch.zeros(1, 4, dtype=torch.long)),
    ):
        with pytest.raises((Mixed, RuntimeError)):
            wrong()
    assert (there[:, 1:][torch.tensor([0], device=CUDA)] * 2.0).device == CUDA
    assert there.cpu().tolist() == [[1.0] * 4] * 3 and there[0].to("cpu").device.type == "cpu"


@pytest.mark.parametrize(("lora", "objective"), [(None, CrossEntropy()), (None, GRPO), (LoraConfig(rank=2), GRPO)])
def test_the_passes_of_a_training_step(gpu: None, lora: LoraConfig | None, objective: Objective) -> None:
    config = TrainConfig.model_validate({"microbatch_tokens": 60, "lr": 1e-3})
    trainer = LocalTrainer(model(lora), config, {} if lora else {"reference": model()})
    assert trainer.evaluate(random_atoms(), objective)
    rows = [row for atom in random_atoms() for row in atom.rows]
    read = trainer.forward(rows, "logp", "entropy", "top_k", top_k=3, frozen="reference")
    assert [len(column) for column in read["logp"]] == [row.trained_count for row in rows]


@pytest.mark.parametrize("how", [{}, {"top_p": 0.9, "top_k": 5, "temperature": 0.7}, {"temperature": 0}])
def test_sampling_and_handing_over(gpu: None, how: dict[str, Any]) -> None:
    sampler = EmbeddedSampler(model(), max_running=4)
    prompts = [tuple(range(5, 105)), tuple(range(9, 12))] * 3
    params = SamplingParams(max_tokens=5, **how)
    requests = [Request(prompt=prompt, seed=i, samples=3, params=params) for i, prompt in enumerate(prompts)]
    assert all(isinstance(each, Completion) for each in answers_of(sampler, requests))
    sampler.publish(1)
    assert answers_of(sampler, requests[:1])[0].version == 1
    assert all(weight.device == CUDA for _, weight in base_weights(model(LoraConfig(rank=2))))
