"""A day with a GPU in ten minutes: `python -m benchmarks.gpu [--device cpu --tiny] [--only laws|speed]`.

First the laws that a CPU cannot check, as passed or failed with the number that was compared: attention by each
backend against the dense mask, recorded decoding against the trainer, gradients in bfloat16 and however they are cut,
and where vLLM and TRL are installed the hand-over to vLLM and a GRPO step beside TRL's (`benchmarks.grpo_step`).

Then everything that is to be fast. Each is a share of a limit that is measured in the same run: training of a large
matrix product in the same precision (its model FLOP/s utilisation, MFU; attention is not counted, as for a small
context), decoding of a copy of memory.

A JSON line for each on stdout, then a table on stderr. Exit code 1: a law failed; 3: there is no GPU.

`--device cpu --tiny` runs the same code on a model of nothing, to show that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from benchmarks.grpo_step import beside_trl
from benchmarks.limits import products_flops
from benchmarks.make_model import Shape, make
from whet.algorithms.policy_loss import policy_loss
from whet.algorithms.sft import CrossEntropy, weigh
from whet.config import ModelConfig, PolicyConfig, SamplingConfig, TrainConfig
from whet.launch.memory import footprint, settle
from whet.models.attention import AGREEMENT, AttentionCall, Tree, TreeLayout, largest_gap, pick_backend
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.records import Atom, Completion, TokenRow
from whet.sampling.base import Request, SamplingParams, run, sample_all
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.weight_sync import PROBE_TOLERANCE
from whet.training.base import Objective
from whet.training.engine import LocalTrainer

NO_GPU = 3
"""Exit code."""
Said = TypeVar("Said", "Law", "Line")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything."""

    shape: Shape
    product: int
    """Side of the square matrices whose product is the limit."""
    copied: int
    """Bytes of the copy that is the other limit."""
    prompts: int
    group: int
    prompt: int
    answer: int
    side_by_side: tuple[int, ...]
    """Sequences that are decoded at once."""


FULL = Size(
    shape=Shape(151936, 1024, 28, 16, 8, 3072, True), product=8192, copied=2**32, prompts=16, group=16, prompt=512,
    answer=256, side_by_side=(1, 64, 512),
)  # fmt: skip
SMALL = Size(
    shape=Shape(300, 32, 2, 4, 2, 64, True), product=64, copied=2**16, prompts=4, group=4, prompt=24, answer=12,
    side_by_side=(1,),
)  # fmt: skip
"""Of the laws' gradients, whatever the model."""
COARSE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""How far gradients of another cut may be, relative to their norm."""
TINY = Size(
    shape=Shape(300, 32, 2, 4, 2, 64, True), product=64, copied=2**16, prompts=2, group=3, prompt=20, answer=8,
    side_by_side=(1, 3),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One measurement: what, how much of it in a second, and which share of the limit that is."""

    name: str
    seconds: float
    rate: float
    unit: str
    share: float | None = None
    peak_gib: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The device, what is measured on it, and its own limits."""

    device: torch.device
    size: Size
    folder: Path
    dtype: torch.dtype
    flops: float
    """Floating-point operations per second of a large product."""
    bandwidth: float
    """Bytes read and written per second by a large copy."""

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        """The median time of a call, after a warm-up, which also compiles."""
        return _seconds(self.device, work, repeats)

    def load(self) -> tuple[ModelConfig, LanguageModel]:
        """The model of this size."""
        config = ModelConfig(path=str(self.folder), device=self.device.type)
        return config, load_model(config)

    def peak_gib(self) -> float | None:
        """Most memory since the last call, in GiB; a CPU does not say."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """What must be true; `passed` is None where it was not tried, and `note` says why."""

    name: str
    passed: bool | None
    found: float | None = None
    at_most: float | None = None
    note: str = ""


def laws(bench: Bench) -> Iterator[Law]:
    """Those that a CPU cannot check, or checks in its own way."""
    backend = "flash" if bench.device.type == "cpu" else "flex"
    attention_gap = partial(largest_gap, backend, bench.device)
    yield _law(f"attention: {backend} = dense mask, forward and backward", AGREEMENT, attention_gap)
    model = bench.load()[1]
    tolerance = PROBE_TOLERANCE[model.compute]
    decoded = "decoding, recorded where it can be = the trainer's log-probabilities"
    yield _law(decoded, tolerance, partial(_decoded, model))
    yield _law("gradient: one micro-batch = many", COARSE[model.compute], partial(_cut, model))
    exact = load_model(ModelConfig(path=str(bench.folder), device=bench.device.type, dtype="float32"))
    yield _law("gradient: in this precision = in float32 (1 - cosine)", 0.02, partial(_precision, model, exact))
    if bench.device.type == "cuda":
        yield _law("bytes at the peak, planned by used or the reverse", 1.3, partial(_memory, bench))
    yield _law("hand-over to vLLM: its probe = the trainer", tolerance, partial(_vllm, model), needs="vllm")
    beside = partial(beside_trl, bench.folder, bench.device)
    yield _law("a GRPO step, seconds by TRL's", 1.0, beside, needs="trl")


def _law(name: str, at_most: float, check: Callable[[], float], needs: str = "") -> Law:
    if needs and importlib.util.find_spec(needs) is None:
        return Law(name=name, passed=None, note=f"not tried: {needs} is not installed")
    try:
        found = check()
    except Exception as error:  # noqa: BLE001  one that cannot run must not keep the others from running
        return Law(name=name, passed=False, at_most=at_most, note=f"{type(error).__name__}: {error}"[:300])
    return Law(name=name, passed=found <= at_most, found=found, at_most=at_most)


def _decoded(model: LanguageModel) -> float:
    """Between what the engine says of its greedy tokens and what the trainer says of them."""
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(3, model.vocabulary) for _ in range(length)) for length in (7, 40, 90)]
    params = SamplingParams(max_tokens=24, temperature=0)
    sampler = EmbeddedSampler(model, max_running=4)
    requests = [Request(prompt=prompt, seed=0, params=params) for prompt in prompts]
    written = [each for each in run(sample_all(sampler, requests)) if isinstance(each, Completion)]
    assert len(written) == len(prompts), "an answer failed"
    rows = [
        TokenRow(tokens=(*prompt, *each.tokens.tolist()), trained=(False,) * len(prompt) + (True,) * len(each.tokens))
        for prompt, each in zip(prompts, written, strict=True)
    ]
    trainer = LocalTrainer(model, TrainConfig())
    read = trainer.forward(rows, "logp", temperature=1.0)["logp"]
    return max(float(abs(ours - each.logprobs).max()) for ours, each in zip(read, written, strict=True))


def _gradient(model: LanguageModel, microbatch_tokens: int) -> torch.Tensor:
    """All of it as one vector, in float64 on the host."""
    trainer = LocalTrainer(model, TrainConfig(microbatch_tokens=microbatch_tokens))
    trainer.forward_backward(
        _groups(SMALL, SMALL.prompt), policy_loss(PolicyConfig(), temperature=1.0, kl_coefficient=0.0)
    )
    gradient = torch.cat([p.grad.flatten().cpu().double() for p in model.parameters.values() if p.grad is not None])
    trainer.optimizers.zero_grad()
    return gradient


def _cut(model: LanguageModel) -> float:
    whole, pieces = _gradient(model, 10**6), _gradient(model, 64)
    return float((whole - pieces).norm() / whole.norm())


def _precision(model: LanguageModel, exact: LanguageModel) -> float:
    return 1 - float(torch.cosine_similarity(_gradient(model, 10**6), _gradient(exact, 10**6), dim=0))


def _memory(bench: Bench) -> float:
    """How far the plan of a step is from what it takes."""
    config, model = bench.load()
    train = TrainConfig(lr=1e-6, microbatch_tokens=8192)
    trainer = LocalTrainer(model, train)
    bench.peak_gib()
    trainer.forward_backward(_rows(bench.size), CrossEntropy())
    trainer.optim_step(1.0)
    used, planned = torch.cuda.max_memory_allocated(), footprint("", config, train, None).peak
    return max(used / planned, planned / used)


def _vllm(model: LanguageModel) -> float:
    """0 where vLLM's own check of a hand-over passes, twice."""
    from whet.sampling.vllm import VllmSampler

    sampler = VllmSampler(model, max_running=4, cache_gib=1.0)
    sampler.publish(1)
    return 0.0


def measure(bench: Bench) -> Iterator[Line]:
    """All of it, the quickest first."""
    product = 2 * bench.size.product**3
    precision = str(bench.dtype).removeprefix("torch.")
    yield Line(
        name=f"matrix product, {precision}", seconds=product / bench.flops, rate=bench.flops / 1e12, unit="TFLOP/s"
    )
    yield Line(name="copy", seconds=2 * bench.size.copied / bench.bandwidth, rate=bench.bandwidth / 1e9, unit="GB/s")
    yield from attention(bench)
    config, model = bench.load()
    yield from training(bench, config, model)
    yield from decoding(bench, model)


def attention(bench: Bench) -> Iterator[Line]:
    """Forward and backward over groups of answers to shared prompts, by each backend."""
    size, heads = bench.size, bench.size.shape.heads
    tree = Tree(size.prompt, (size.answer,) * size.group)
    head = size.shape.hidden // heads
    for backend in dict.fromkeys((pick_backend(bench.device), "masked")):
        layout = TreeLayout((tree, tree), bench.device, backend)
        shapes = [(1, count, layout.tokens, head) for count in (heads, size.shape.kv_heads, size.shape.kv_heads)]
        query, key, value = (torch.randn(s, device=bench.device, dtype=bench.dtype, requires_grad=True) for s in shapes)

        def work(
            layout: TreeLayout = layout, q: torch.Tensor = query, k: torch.Tensor = key, v: torch.Tensor = value
        ) -> None:
            layout.attend(q, k, v, AttentionCall(layer=0, scale=head**-0.5, window=None)).sum().backward()

        seen = 2 * (size.prompt**2 / 2 + size.group * (size.answer * size.prompt + size.answer**2 / 2))
        took = bench.seconds(work)
        # Four operations forward for each pair seen, and 2.5 times that backward.
        rate = 3.5 * 4 * seen * heads * head / took
        yield Line(
            name=f"attention, {backend}", seconds=took, rate=rate / 1e12, unit="TFLOP/s", share=rate / bench.flops,
            peak_gib=bench.peak_gib(), note=f"{layout.tokens:,} tokens",
        )  # fmt: skip


def training(bench: Bench, config: ModelConfig, model: LanguageModel) -> Iterator[Line]:
    """A step of SFT on ragged rows, and of GRPO with short and long prompts."""
    size = bench.size
    tokens = settle(TrainConfig(), config, SamplingConfig(), reference=False)
    train = TrainConfig(lr=1e-6, microbatch_tokens=tokens)
    trainer = LocalTrainer(model, train)
    planned = footprint("", config, train, None)
    grpo = policy_loss(PolicyConfig(), temperature=1.0, kl_coefficient=0.0)
    works: dict[str, tuple[list[Atom], Objective]] = {
        "SFT, ragged": (_rows(size), CrossEntropy()),
        "GRPO, short prompts": (_groups(size, size.prompt // 8), grpo),
        "GRPO, prompts as they are": (_groups(size, size.prompt), grpo),
    }
    for name, (atoms, objective) in works.items():

        def step(atoms: list[Atom] = atoms, objective: Objective = objective) -> None:
            trainer.forward_backward(atoms, objective)
            trainer.optim_step(1.0)

        took = bench.seconds(step)
        tokens, trained = sum(a.cost for a in atoms), sum(row.trained_count for a in atoms for row in a.rows)
        rows = sum(len(row.tokens) for a in atoms for row in a.rows)
        yield Line(
            name=name, seconds=took, rate=rows / took, unit="tok/s", peak_gib=bench.peak_gib(),
            share=products_flops(model, tokens, trained) / took / bench.flops,
            note=f"{rows:,} tokens, {tokens:,} computed, micro-batches of {train.microbatch_tokens:,}, "
            f"planned {planned.peak / 2**30:.2f} GiB",
        )  # fmt: skip


def decoding(bench: Bench, model: LanguageModel) -> Iterator[Line]:
    """Greedy answers to prompts that differ, so many side by side."""
    size, draw = bench.size, random.Random(0)
    config = model.module.config
    weights = sum(p.numel() for p in model.module.parameters()) * torch.finfo(bench.dtype).bits // 8
    for count in size.side_by_side:
        sampler = EmbeddedSampler(model, max_running=count)
        prompts = [tuple(draw.randrange(3, model.vocabulary) for _ in range(size.prompt)) for _ in range(count)]
        params = SamplingParams(max_tokens=size.answer, temperature=0)
        requests = [Request(prompt=prompt, seed=0, params=params) for prompt in prompts]
        took = bench.seconds(lambda sampler=sampler, requests=requests: run(sample_all(sampler, requests)))
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bench.dtype.itemsize
        read = size.answer * (weights + count * cached * (size.prompt + size.answer / 2))
        yield Line(
            name=f"decoding, {count} at once", seconds=took, rate=count * size.answer / took, unit="tok/s",
            share=read / took / bench.bandwidth, peak_gib=bench.peak_gib(), note="share of the copy's bandwidth",
        )  # fmt: skip


def _rows(size: Size) -> list[Atom]:
    """Rows of SFT between half and one and a half times prompt and answer, all trained."""
    draw, whole = random.Random(0), size.prompt + size.answer
    rows = []
    for _ in range(size.prompts * 2):
        length = draw.randint(whole // 2, whole * 3 // 2)
        rows.append(TokenRow(tokens=_tokens(draw, size, length), trained=(False,) + (True,) * (length - 1)))
    return list(weigh(rows))


def _groups(size: Size, prompt: int) -> list[Atom]:
    """Groups of ragged answers, with the columns of a policy gradient."""
    draw, atoms = random.Random(0), []
    for _ in range(size.prompts):
        asked, rows = _tokens(draw, size, prompt), []
        for _ in range(size.group):
            length = min(2 * size.answer, max(4, round(draw.expovariate(1 / (0.75 * size.answer)))))
            numbers = {"weight": 1e-4, "advantage": draw.uniform(-1, 1), "sampler_logp": -8.0}
            rows.append(
                TokenRow(
                    tokens=asked + _tokens(draw, size, length),
                    trained=(False,) * prompt + (True,) * length,
                    shared=prompt,
                    columns={name: (number,) * length for name, number in numbers.items()},
                )
            )
        atoms.append(Atom(rows=tuple(rows)))
    return atoms


def _tokens(draw: random.Random, size: Size, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(3, size.shape.vocabulary) for _ in range(count))


def _seconds(device: torch.device, work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _limits(device: torch.device, size: Size, dtype: torch.dtype) -> tuple[float, float]:
    left, right = (torch.randn(size.product, size.product, device=device, dtype=dtype) for _ in range(2))
    product = _seconds(device, lambda: left @ right)
    source = torch.ones(size.copied // 4, device=device)
    target = torch.empty_like(source)
    copy = _seconds(device, lambda: target.copy_(source))
    return 2 * size.product**3 / product, 2 * size.copied / copy


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="what whet reaches on one GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, to see that everything runs")
    parser.add_argument("--only", choices=("laws", "speed"), help="one half of it")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("no GPU: torch sees no CUDA device; --device cpu --tiny shows that the script runs\n")
        return NO_GPU
    device, size = torch.device(chosen.device), TINY if chosen.tiny else FULL
    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu"
    table = [f"{name}, torch {torch.__version__}", f"{'':32}{'seconds':>10}{'rate':>12} {'':8}{'share':>6}{'GiB':>8}"]
    with tempfile.TemporaryDirectory(prefix="whet-gpu-") as folder:
        make(Path(folder), size.shape)
        flops, bandwidth = _limits(device, size, dtype)
        bench = Bench(
            device=device, size=size, folder=Path(folder), dtype=dtype, flops=flops, bandwidth=bandwidth
        )  # fmt: skip
        checked = [] if chosen.only == "speed" else [_said(name, law) for law in laws(bench)]
        for line in () if chosen.only == "laws" else measure(bench):
            _said(name, line)
            share = "" if line.share is None else f"{line.share:.0%}"
            peak = "" if line.peak_gib is None else f"{line.peak_gib:.1f}"
            table.append(
                f"{line.name:32}{line.seconds:>10.4f}{line.rate:>12,.1f} {line.unit:8}{share:>6}{peak:>8}  {line.note}"
            )
    words = {True: "passed", False: "FAILED", None: "  -   "}
    for law in checked:
        found = "" if law.found is None else f"{law.found:.2g} (at most {law.at_most:g})"
        table.append(f"{words[law.passed]}  {law.name}: {found}{law.note}")
    sys.stderr.write("\n".join(table) + "\n")
    return int(any(law.passed is False for law in checked))


def _said(device: str, each: Said) -> Said:
    sys.stdout.write(json.dumps({"device": device, **asdict(each)}) + "\n")
    sys.stdout.flush()
    return each


if __name__ == "__main__":
    sys.exit(main())
