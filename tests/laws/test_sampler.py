"""Law 7: the sampler says of its tokens what the trainer says of them, whoever else is in the batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import whet.sampling.engine
from tests.laws.support import answers_of, logps_of, tiny_model, written
from whet.config import LoraConfig, ModelConfig, TrainConfig
from whet.errors import SamplerError
from whet.models.attention import Tree, TreeLayout
from whet.models.create import byte_tokenizer
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.models.matmul import ROWS
from whet.records import Completion, Ending, TokenRow, token_ids
from whet.sampling.base import Request, SamplingParams
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.forward import Plain, plan
from whet.sampling.kv_cache import Member, Slab
from whet.sampling.tickets import choose
from whet.training.engine import LocalTrainer

PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 17, 5, 2, 40, 9)]
STOP = frozenset(range(200, 230))
"""So many that an answer ends by itself after some nine tokens."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Weights far larger than at the start of training, so that attention and the head have opinions."""
    found = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        for p in found.module.parameters():
            p.mul_(8 if p.ndim == 2 else 1)
    return found


def requests(params: SamplingParams, *, each: int = 3) -> list[Request]:
    """Ragged prompts, `each` answers of each, of ragged budgets; equal prompts are not neighbours."""
    return [
        Request(prompt=prompt, seed=100 * place + sample, params=replace(params, max_tokens=params.max_tokens - sample))
        for sample in range(each)
        for place, prompt in enumerate(PROMPTS)
    ]


def rows(asked: Sequence[Request], answers: Sequence[Completion]) -> list[TokenRow]:
    return [
        TokenRow(
            tokens=token_ids(r.prompt + written(a)), trained=np.arange(len(r.prompt) + len(a.tokens)) >= len(r.prompt)
        )
        for r, a in zip(asked, answers, strict=True)
    ]


def logits_of(model: LanguageModel, tokens: Sequence[int]) -> torch.Tensor:
    """transformers' own logits (N, V), one sequence at a time."""
    model.module.config._attn_implementation = "sdpa"
    try:
        with torch.no_grad():
            return model.module(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        model.module.config._attn_implementation = "whet"


@pytest.fixture(params=["in front of each answer", "kept apart"])
def prompts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which prompts are cached, whatever would pay."""
    monkeypatch.setattr(whet.sampling.engine, "SHARED_TOKENS", 0 if request.param == "kept apart" else 10**9)


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("max_running", [1, 4, 64])
def test_sampler_and_trainer_agree(model: LanguageModel, temperature: float, max_running: int) -> None:
    asked = requests(SamplingParams(max_tokens=24, temperature=temperature, stop_ids=STOP))
    answers = answers_of(EmbeddedSampler(model, max_running=max_running), asked)
    trained = logps_of(LocalTrainer(model, TrainConfig()), rows(asked, answers), temperature=temperature)
    for answer, logps in zip(answers, trained, strict=True):
        assert answer.logprobs == pytest.approx(logps, abs=1e-5)


@pytest.mark.parametrize("changes", [{"top_p": 0.6}, {"top_k": 3}, {"top_p": 0.8, "top_k": 20, "temperature": 1.5}])
def test_a_truncated_distribution_is_the_one_reported(model: LanguageModel, changes: dict[str, float]) -> None:
    asked = requests(SamplingParams(**{"max_tokens": 12, "stop_ids": STOP, **changes}))
    for request, answer in zip(asked, answers_of(EmbeddedSampler(model, max_running=7), asked), strict=True):
        logits = logits_of(model, request.prompt + written(answer))[len(request.prompt) - 1 : -1]
        for at, (token, logp) in enumerate(zip(written(answer), answer.logprobs, strict=True)):
            assert logp == pytest.approx(math.log(nucleus(logits[at], **changes)[token]), abs=1e-5)


def nucleus(logits: torch.Tensor, temperature: float = 1, top_p: float = 1, top_k: int = 0) -> dict[int, float]:
    """By the book: sort, keep the top k, of those the fewest whose share reaches top_p, renormalise."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    ranked = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    total = sum(p[i] for i in ranked)
    kept: dict[int, float] = {}
    for i in ranked:
        if sum(kept.values()) < top_p * total:
            kept[i] = p[i]
    share = sum(kept.values())
    return {i: value / share for i, value in kept.items()}


def test_greedy_is_what_transformers_generates(model: LanguageModel) -> None:
    asked = requests(SamplingParams(max_tokens=20, temperature=0, stop_ids=STOP))
    answers = answers_of(EmbeddedSampler(model, max_running=5), asked)
    assert {answer.ending for answer in answers} == {Ending.STOP, Ending.LENGTH}
    model.module.config._attn_implementation = "sdpa"
    for request, answer in zip(asked, answers, strict=True):
        prompt = torch.tensor([request.prompt])
        settings = {"max_new_tokens": request.params.max_tokens, "do_sample": False, "eos_token_id": sorted(STOP)}
        generated = model.module.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert tuple(generated[0, len(request.prompt) :].tolist()) == written(answer)
    model.module.config._attn_implementation = "whet"


@pytest.mark.usefixtures("prompts")
def test_the_batch_changes_no_token(model: LanguageModel) -> None:
    """Slots fewer than requests, rows that leave and enter, another order, alone: the seed alone decides."""
    asked = requests(SamplingParams(max_tokens=30, temperature=1.0, stop_ids=STOP), each=5)
    expected = answers_of(EmbeddedSampler(model, max_running=len(asked)), asked)
    for max_running in (1, 2, 3, 8, 16):
        again = answers_of(EmbeddedSampler(model, max_running=max_running), asked)
        assert [written(a) for a in again] == [written(a) for a in expected]
    backwards = answers_of(EmbeddedSampler(model, max_running=6), asked[::-1])[::-1]
    assert [written(a) for a in backwards] == [written(a) for a in expected]
    for at in range(0, len(asked), 7):
        (alone,) = answers_of(EmbeddedSampler(model), [asked[at]])
        assert written(alone) == written(expected[at])
        assert alone.logprobs.tobytes() == expected[at].logprobs.tobytes()


def test_a_seed_is_one_answer_and_another_seed_another(model: LanguageModel) -> None:
    params = SamplingParams(max_tokens=20)
    asked = [Request(prompt=PROMPTS[1], seed=seed, params=params) for seed in (1, 2, 3, 1)]
    first, *others, again = [written(answer) for answer in answers_of(EmbeddedSampler(model), asked)]
    assert first == again and first not in others


def test_mixed_settings_stay_with_their_request(model: LanguageModel) -> None:
    settings = [SamplingParams(max_tokens=9, temperature=t, top_k=k) for t, k in ((0, None), (1, None), (0.7, 5))]
    asked = [Request(prompt=PROMPTS[2], seed=7, params=params) for params in settings]
    together = answers_of(EmbeddedSampler(model), asked)
    alone = [answers_of(EmbeddedSampler(model), [request])[0] for request in asked]
    assert [written(a) for a in together] == [written(a) for a in alone]


def test_endings_say_what_happened(model: LanguageModel) -> None:
    asked = requests(SamplingParams(max_tokens=9, stop_ids=STOP), each=8)
    answers = answers_of(EmbeddedSampler(model, max_running=11), asked)
    for request, answer in zip(asked, answers, strict=True):
        assert STOP.isdisjoint(written(answer)[:-1])
        stopped = written(answer)[-1] in STOP
        assert answer.ending is (Ending.STOP if stopped else Ending.LENGTH)
        assert stopped or len(written(answer)) == request.params.max_tokens
        assert len(written(answer)) <= request.params.max_tokens
    assert {answer.ending for answer in answers} == {Ending.STOP, Ending.LENGTH}


def test_a_prompt_is_computed_once(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    hidden = Plain.hidden

    def counting(self: Plain, input_N: torch.Tensor, *rest: object) -> torch.Tensor:
        computed.append(len(input_N))
        return hidden(self, input_N, *rest)

    sampler = EmbeddedSampler(model)
    monkeypatch.setattr(Plain, "hidden", counting)
    params = SamplingParams(max_tokens=3)
    asked = [Request(prompt=prompt, seed=seed, params=params) for seed in range(4) for prompt in PROMPTS]
    answers_of(sampler, asked)
    whole = -(-sum(map(len, PROMPTS)) // ROWS) * ROWS
    assert computed == [whole, len(asked), len(asked)]
    computed.clear()
    sampler.engine.max_running = 6  # one prompt's four answers at a time, and never two of four
    answers_of(sampler, asked)
    assert sum(computed) == sum(-(-len(prompt) // ROWS) * ROWS for prompt in PROMPTS) + 2 * len(asked)


def test_rows_that_outgrow_their_slab_change_nothing(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of few columns, so that rows move from one to the next again and again."""
    moves: list[int] = []
    take = Slab.take

    def counting(self: Slab, members: Sequence[Member]) -> None:
        moves.append(self.width)
        take(self, members)

    monkeypatch.setattr(Slab, "take", counting)
    asked = requests(SamplingParams(max_tokens=60, stop_ids=frozenset()), each=4)
    expected = [written(answer) for answer in answers_of(EmbeddedSampler(model), asked)]
    assert {64, 96} <= set(moves)
    assert [written(a) for a in answers_of(EmbeddedSampler(model, max_running=5), asked)] == expected


@pytest.mark.usefixtures("prompts")
def test_the_cache_stays_within_its_memory(model: LanguageModel) -> None:
    """Fewer rows at once, the same tokens; and one row where even that is more than there is."""
    asked = requests(SamplingParams(max_tokens=24, stop_ids=STOP), each=4)
    expected = [written(answer) for answer in answers_of(EmbeddedSampler(model), asked)]
    for kib in (160, 1):
        sampler = EmbeddedSampler(model, cache_gib=kib / 2**20)
        tickets = [sampler.engine.submit(request) for request in asked]
        found = {}
        while sampler.engine.busy:
            found.update(sampler.engine.step())
            slabs = sampler.engine._slabs.values()
            rows = len(sampler.engine._rows)
            assert sum(t.nbytes for slab in slabs for t in (*slab.keys, *slab.values)) <= kib * 2**10 or rows <= 1
        assert [written(found[ticket]) for ticket in tickets] == expected


def test_weights_and_adapters_are_the_trainer_s(tmp_path: Path) -> None:
    """As they are when somebody samples, not as they were when the sampler was made; an adapter's too."""
    model = tiny_model(dtype=torch.float32, lora=LoraConfig(rank=4))
    sampler, params = EmbeddedSampler(model), SamplingParams(max_tokens=12)
    assert sampler.engine.plan.plain
    for _ in range(2):
        with torch.no_grad():
            for p in model.module.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        asked = requests(params, each=1)
        answers = answers_of(sampler, asked)
        trained = logps_of(LocalTrainer(model, TrainConfig()), rows(asked, answers))
        for answer, logps in zip(answers, trained, strict=True):
            assert answer.logprobs == pytest.approx(logps, abs=1e-5)


def test_below_float32_the_plain_pass_rounds_as_the_module_does(model: LanguageModel) -> None:
    coarse = replace(model, compute=torch.bfloat16)
    found = plan(coarse)
    assert found.plain
    stream_N = torch.tensor(PROMPTS[4])
    layout = TreeLayout((Tree(0, (len(stream_N),)),), model.device)
    with torch.no_grad():
        exact = model.hidden(stream_N, layout.positions_N, layout)
        off = [
            (forward.hidden(stream_N, layout.positions_N, layout) - exact).abs().mean().item()
            for forward in (found.bind(coarse, len(stream_N)), coarse)
        ]
    assert 0 < off[0] < 1.5 * off[1]


def test_the_last_layer_computes_some_tokens_alone_to_the_same_bits(model: LanguageModel) -> None:
    forward = plan(model).bind(model, 64)
    assert isinstance(forward, Plain)
    stream_N, at = torch.tensor(PROMPTS[4]), torch.tensor([39, 0, 7, 20])
    layout, last, rows_seen = TreeLayout((Tree(0, (40,)),), model.device), forward.layers[-1], []
    with torch.no_grad():
        every = forward.hidden(stream_N, layout.positions_N, layout)
        forward.layers[-1] = replace(last, down=lambda x: (rows_seen.append(len(x)), last.down(x))[1])
        assert torch.equal(forward.hidden(stream_N, layout.positions_N, layout, at), every[at])
    assert rows_seen == [4]


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize(("temperature", "max_running"), [(0.0, 64), (1.0, 64), (1.0, 6)])
def test_an_answer_whose_logits_are_no_numbers_fails_alone(temperature: float, max_running: int) -> None:
    """Nor does it leave anything to whoever gets its place."""
    model = tiny_model(dtype=torch.float32)
    asked = requests(SamplingParams(max_tokens=12, temperature=temperature), each=4)
    with torch.no_grad():
        model.module.get_input_embeddings().weight[PROMPTS[4][-1]] = float("nan")  # only this prompt is so long
        model.module.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.module.lm_head.weight))
    for request, answer in zip(asked, answers_of(EmbeddedSampler(model, max_running=max_running), asked), strict=True):
        assert isinstance(answer, SamplerError) is (request.prompt == PROMPTS[4])


@pytest.mark.parametrize("changes", [{}, {"temperature": 2.0}, {"top_p": 0.7}])
def test_frequencies_are_the_distribution(model: LanguageModel, changes: dict[str, float]) -> None:
    """First tokens, and second tokens after the most frequent first one: no draw depends on the one before."""
    prompt = PROMPTS[1]
    params = SamplingParams(max_tokens=2, **changes)
    asked = [Request(prompt=prompt, seed=seed, params=params) for seed in range(5000)]
    answers = [written(answer) for answer in answers_of(EmbeddedSampler(model, max_running=5000), asked)]
    first = Counter(tokens[0] for tokens in answers)
    assert_drawn_from(first, logits_of(model, prompt)[-1], **changes)
    ((usual, _),) = first.most_common(1)
    second = Counter(tokens[1] for tokens in answers if tokens[0] == usual)
    assert_drawn_from(second, logits_of(model, (*prompt, usual))[-1], **changes)


def assert_drawn_from(seen: Counter[int], logits: torch.Tensor, **changes: float) -> None:
    """Pearson's statistic: its mean is the cells less one, its variance twice that. Five deviations are allowed.

    A cell is a run of neighbouring tokens, of which at least ten are to be expected.
    """
    count, kept = seen.total(), nucleus(logits, **changes)
    assert set(seen) <= set(kept)
    cells = [[0, 0.0]]
    for token in sorted(kept):
        if cells[-1][1] * count >= 10:
            cells.append([0, 0.0])
        cells[-1][0] += seen[token]
        cells[-1][1] += kept[token]
    statistic = sum((n - count * share) ** 2 / (count * share) for n, share in cells)
    assert len(cells) > 5
    assert statistic < len(cells) + 5 * math.sqrt(2 * len(cells))


def test_no_draw_leaves_the_support() -> None:
    """The smallest and the largest uniform number there is, with the ends of the vocabulary cut off."""
    torch.manual_seed(0)
    logits_SV = torch.randn(500, 50)
    logits_SV[:, :5] = logits_SV[:, -5:] = -1000.0
    for uniform in (0.0, 1 - 2**-53):
        uniform_S = torch.full((500,), uniform, dtype=torch.float64)
        tokens, logps = choose(logits_SV, SamplingParams(max_tokens=1, top_k=10), uniform_S)
        assert torch.isfinite(logps).all()
        assert ((tokens >= 5) & (tokens < 45)).all()


PLAIN = {"llama": True, "mistral": True, "qwen2": True, "phi3": False, "olmo2": False}
"""Which are made of the usual parts; the others run through their own modules."""


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize("kind", PLAIN)
def test_other_architectures_agree_too(kind: str, tmp_path: Path) -> None:
    """Grouped heads, tied and untied embeddings, biases, post-norms, a sliding window of 6 tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), max_position_embeddings=128, num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **shape,
    )  # fmt: skip
    if kind == "mistral":
        config.sliding_window = 6
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(5 if p.ndim == 2 else 1)
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(path=str(tmp_path)))
    asked = requests(SamplingParams(max_tokens=12), each=2)
    sampler = EmbeddedSampler(loaded, max_running=5)
    assert sampler.engine.plan.plain is PLAIN[kind]
    answers = answers_of(sampler, asked)
    trained = logps_of(LocalTrainer(loaded, TrainConfig()), rows(asked, answers))
    for request, answer, logps in zip(asked, answers, trained, strict=True):
        assert answer.logprobs == pytest.approx(logps, abs=2e-5)
        logp = logits_of(loaded, request.prompt + written(answer))[len(request.prompt) - 1 : -1].log_softmax(-1)
        own = [float(logp[at, token]) for at, token in enumerate(written(answer))]
        assert answer.logprobs == pytest.approx(own, abs=2e-5)
