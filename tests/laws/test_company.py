"""An answer is the same bits in whatever company it is written: requests that arrive, join, leave and are given up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest
import torch

from tests.laws.support import tiny_model, written
from whet.config import ModelConfig
from whet.errors import SamplerError
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.models.matmul import library, use_library
from whet.records import Completion
from whet.sampling.base import Request, SamplingParams, run, sample_all
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.engine import Engine
from whet.sampling.tickets import Ticket


@pytest.fixture(params=["mkl", "onednn", "mixed"])
def _products(request: pytest.FixtureRequest) -> Iterator[None]:
    """Either library of products."""
    before = library()
    use_library(request.param)
    yield
    use_library(before)


def requests(draw: random.Random, *, vocabulary: int, count: int = 18) -> list[Request]:
    """Prompts of 1 to 140 tokens, some asked for several times or longer, kept apart or not; ragged answers."""
    prompts = [tuple(draw.randrange(vocabulary) for _ in range(draw.randint(1, 140))) for _ in range(count // 4)]
    prompts += [prompt + tuple(draw.randrange(vocabulary) for _ in range(draw.randint(1, 80))) for prompt in prompts]
    return [
        Request(
            prompt=draw.choice(prompts),
            seed=seed,
            params=SamplingParams(max_tokens=draw.randint(1, 70), temperature=draw.choice((0.0, 0.7, 1.0))),
            samples=draw.choice((1, 8)),
            goes_on=draw.random() < 0.7,
        )
        for seed in range(count)
    ]


def bits(answer: Completion | SamplerError) -> tuple[bytes, bytes]:
    assert isinstance(answer, Completion)
    return answer.tokens.tobytes(), answer.logprobs.tobytes()


def drive(engine: Engine, asked: list[Request], draw: random.Random) -> dict[int, tuple[bytes, bytes]]:
    """The bits of each answer: requests arrive in any order, a few at a time, and some are given up on the way."""
    order = draw.sample(range(len(asked)), len(asked))
    at_once, given_up = draw.choice((1, 3, 24)), set(draw.sample(order, min(4, len(order) // 3)))
    tickets: dict[Ticket, int] = {}
    found = {}
    while order or engine.busy:
        for _ in range(draw.randint(0, at_once)):
            if order:
                number = order.pop()
                tickets[engine.submit(asked[number])] = number
        for ticket, number in list(tickets.items()):
            if number in given_up and draw.random() < 0.1:
                engine.cancel(ticket)
                del tickets[ticket]
        for ticket, answer in engine.step():
            found[tickets.pop(ticket)] = bits(answer)
    assert not tickets
    return found


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("path", ["tiny", "whet:demo"])
def test_company_changes_no_bit(path: str) -> None:
    model = tiny_model(dtype=torch.float32) if path == "tiny" else load_model(ModelConfig(path=path))
    draw = random.Random(path)
    asked = requests(draw, vocabulary=model.vocabulary)
    alone = [bits(run(EmbeddedSampler(model).sample(request))) for request in asked]
    for max_running in (3, 64):
        found = drive(Engine(model, max_running=max_running, cache_bytes=2**28), asked, draw)
        assert len(found) >= len(asked) - 4
        assert found == {number: alone[number] for number in found}


def test_nor_with_two_threads() -> None:
    model, draw, threads = tiny_model(dtype=torch.float32), random.Random(2), torch.get_num_threads()
    asked = requests(draw, vocabulary=model.vocabulary, count=6)
    torch.set_num_threads(2)
    try:
        alone = [bits(run(EmbeddedSampler(model).sample(request))) for request in asked]
        found = drive(Engine(model, max_running=4, cache_bytes=2**28), asked, draw)
    finally:
        torch.set_num_threads(threads)
    assert found == {number: alone[number] for number in found}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(dtype=torch.float32)


LONG = Request(prompt=(1, 2, 3), seed=1, params=SamplingParams(max_tokens=100))
SHORT = Request(prompt=(4, 5), seed=2, params=SamplingParams(max_tokens=8))


def test_a_request_that_is_cancelled_in_mid_decode_frees_its_place(model: LanguageModel) -> None:
    sampler = EmbeddedSampler(model, max_running=1)
    expected = run(sampler.sample(SHORT))

    async def work() -> tuple[Completion, int]:
        long = asyncio.create_task(sampler.sample(LONG))
        while not sampler.engine._rows or sampler.engine.steps < 5:
            await asyncio.sleep(0)
        short = asyncio.create_task(sampler.sample(SHORT))
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return await short, sampler.engine.steps

    answer, steps = run(work())
    assert bits(answer) == bits(expected)
    assert steps < 100 and not sampler.engine.busy


def test_an_engine_that_fails_fails_everybody_and_the_next_request_is_answered(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, step = EmbeddedSampler(model, max_running=2), Engine.step

    def failing(self: Engine) -> object:
        if self.steps == 3:
            raise MemoryError("no memory for a step")
        return step(self)

    expected = run(sampler.sample(SHORT))
    monkeypatch.setattr(Engine, "step", failing)
    found = run(sample_all(sampler, [LONG, SHORT, LONG, SHORT]))
    assert [str(each) for each in found] == ["the sampling engine failed: MemoryError: no memory for a step"] * 4
    monkeypatch.setattr(Engine, "step", step)
    assert bits(run(sampler.sample(SHORT))) == bits(expected)


def test_prompts_are_computed_once_for_requests_that_come_later(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    prefill = Engine._prefill

    def counting(self: Engine, prompts: list[object], entries: object) -> None:
        computed.append(len(prompts))
        prefill(self, prompts, entries)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "_prefill", counting)
    for samples in (1, 8):
        engine = Engine(model, max_running=8, cache_bytes=2**28)
        prompt = tuple(range(3, 83))
        for seed in range(4):
            engine.submit(Request(prompt=prompt, seed=seed, params=SamplingParams(max_tokens=20), samples=samples))
            engine.step()
        while engine.busy:
            engine.step()
        assert computed == [1]
        computed.clear()


def test_a_later_turn_reads_what_an_earlier_one_computed_and_says_the_same(model: LanguageModel) -> None:
    """Until the weights change, by whoever; a beginning that was forgotten is computed again."""
    sampler, tokens = EmbeddedSampler(model), tuple(token % 100 for token in range(300))
    known: list[int] = []
    find = sampler.engine._prefixes.find
    sampler.engine._prefixes.find = lambda tokens: (known.append((found := find(tokens)).tokens), found)[1]  # type: ignore[method-assign]
    params, expected = SamplingParams(max_tokens=6), {}
    for length in (64, 65, 100, 170, 300):
        request = Request(prompt=tokens[:length], seed=length, params=params, goes_on=True)
        expected[length] = bits(run(EmbeddedSampler(model).sample(request)))
        assert bits(run(sampler.sample(request))) == expected[length]
    assert known == [0, 0, 64, 96, 160]
    sampler.engine._prefixes._most = 100
    for length in (65, 300, 170):
        request = Request(prompt=tokens[:length], seed=length, params=params, goes_on=True)
        assert bits(run(sampler.sample(request))) == expected[length]
    known.clear()
    request = Request(prompt=tokens[:65], seed=1, params=params, goes_on=True)
    weight = next(iter(model.parameters.values()))
    for change in (lambda: None, lambda: weight.mul_(1), lambda: None, lambda: sampler.publish(5)):
        with torch.no_grad():
            change()
        run(sampler.sample(request))
    assert known[1:] == [0, 64, 0]


def test_weights_are_not_published_in_the_middle_of_an_answer(model: LanguageModel) -> None:
    sampler = EmbeddedSampler(model)
    sampler.engine.submit(LONG)
    with pytest.raises(SamplerError, match="published while requests are running"):
        sampler.publish(1)
    assert sampler.version == 0
    sampler.engine.clear()
    sampler.publish(1)
    assert run(sampler.sample(SHORT)).version == 1


def test_plain_code_samples_inside_a_running_event_loop(model: LanguageModel) -> None:
    async def notebook() -> tuple[int, ...]:
        return written(run(EmbeddedSampler(model).sample(SHORT)))

    assert asyncio.run(notebook()) == written(run(EmbeddedSampler(model).sample(SHORT)))
