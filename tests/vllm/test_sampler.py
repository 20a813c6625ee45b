"""The sampler's laws hold for vLLM: its tokens, log-probabilities, seeds and endings are what the door promises."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.laws.support import answers_of, written
from tests.laws.test_sampler import assert_drawn_from, logits_of
from tests.vllm.conftest import largest_gap
from whet.errors import ConfigError
from whet.records import Ending
from whet.sampling.base import Request, SamplingParams
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.tickets import truncate
from whet.sampling.vllm import PREFILL_TOKENS, VllmSampler

PROMPTS = [tuple(n * 7 % 250 for n in range(length)) for length in (1, 17, 5, 2, 40, 9, 130, 300)]
STOP = frozenset(range(40, 80))
TOLERANCE = 1e-3


def requests(params: SamplingParams, *, each: int = 3) -> list[Request]:
    """Ragged prompts, `each` answers of each, of ragged budgets; equal prompts are not neighbours."""
    return [
        Request(prompt=prompt, seed=2**62 + 100 * place + n, params=replace(params, max_tokens=params.max_tokens - n))
        for n in range(each)
        for place, prompt in enumerate(PROMPTS)
    ]


def test_greedy_tokens_are_the_embedded_sampler_s(sampler: VllmSampler) -> None:
    asked = requests(SamplingParams(max_tokens=24, temperature=0, stop_ids=STOP), each=2)
    ours, theirs = answers_of(EmbeddedSampler(sampler.model), asked), answers_of(sampler, asked)
    assert [written(a) for a in theirs] == [written(a) for a in ours]
    assert [a.ending for a in theirs] == [a.ending for a in ours]
    for own, other in zip(ours, theirs, strict=True):
        assert other.logprobs == pytest.approx(own.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_log_probabilities_are_the_trainer_s(sampler: VllmSampler, temperature: float) -> None:
    asked = requests(SamplingParams(max_tokens=24, temperature=temperature))
    assert largest_gap(sampler.model, asked, answers_of(sampler, asked), temperature=temperature) < TOLERANCE


@pytest.mark.parametrize("cut", [{"top_p": 0.7}, {"top_k": 5}])
def test_truncated_log_probabilities_are_those_of_what_was_sampled_from(
    sampler: VllmSampler, cut: dict[str, float]
) -> None:
    params = SamplingParams(max_tokens=8, **cut)
    asked = requests(params)
    for request, answer in zip(asked, answers_of(sampler, asked), strict=True):
        logits = logits_of(sampler.model, (*request.prompt, *written(answer)))[len(request.prompt) - 1 : -1]
        logp = truncate(logits, top_p=params.top_p, top_k=params.top_k).log_softmax(-1)
        expected = [float(logp[at, token]) for at, token in enumerate(answer.tokens)]
        assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_frequencies_are_the_distribution(sampler: VllmSampler) -> None:
    asked = [Request(prompt=PROMPTS[1], seed=seed, params=SamplingParams(max_tokens=1)) for seed in range(2000)]
    first = Counter(int(answer.tokens[0]) for answer in answers_of(sampler, asked))
    assert_drawn_from(first, logits_of(sampler.model, PROMPTS[1])[-1])


def test_a_seed_is_one_answer_whoever_else_is_in_the_batch(sampler: VllmSampler) -> None:
    asked = requests(SamplingParams(max_tokens=20, stop_ids=STOP))
    expected = [written(answer) for answer in answers_of(sampler, asked)]
    assert [written(answer) for answer in answers_of(sampler, asked[::-1])][::-1] == expected
    for at in range(0, len(asked), 5):
        (alone,) = answers_of(sampler, [asked[at]])
        assert written(alone) == expected[at]
    params = SamplingParams(max_tokens=20)
    other = answers_of(sampler, [Request(prompt=PROMPTS[1], seed=seed, params=params) for seed in range(3)])
    assert len({written(answer) for answer in other}) == 3


def test_more_prompts_than_are_computed_at_once(sampler: VllmSampler) -> None:
    params = SamplingParams(max_tokens=3)
    prompts = [tuple((n * 7 + first) % 250 for n in range(300)) for first in range(2 * PREFILL_TOKENS // 300)]
    asked = [Request(prompt=prompt, seed=seed, params=params) for seed, prompt in enumerate(prompts)]
    assert largest_gap(sampler.model, asked, answers_of(sampler, asked)) < TOLERANCE


def test_endings_say_what_happened(sampler: VllmSampler) -> None:
    asked = requests(SamplingParams(max_tokens=9, stop_ids=STOP), each=6)
    answers = answers_of(sampler, asked)
    for request, answer in zip(asked, answers, strict=True):
        stopped = answer.tokens[-1] in STOP
        assert STOP.isdisjoint(answer.tokens[:-1])
        assert answer.ending is (Ending.STOP if stopped else Ending.LENGTH)
        assert stopped or len(answer.tokens) == request.params.max_tokens
        assert len(answer.tokens) == len(answer.logprobs) <= request.params.max_tokens
    assert {answer.ending for answer in answers} == {Ending.STOP, Ending.LENGTH}


def test_only_the_request_s_stop_tokens_end_it(sampler: VllmSampler) -> None:
    """The model's own end of turn is a token like any other, where it is not asked for."""
    chat = tuple(sampler.model.tokenizer.apply_chat_template([{"role": "user", "content": "1+2"}], return_dict=False))
    end = sampler.model.tokenizer.eos_token_id
    asked = [Request(prompt=chat, seed=seed, params=SamplingParams(max_tokens=60)) for seed in range(8)]
    answers = answers_of(sampler, asked)
    assert {len(answer.tokens) for answer in answers} == {60}
    assert any(end in answer.tokens[:-1] for answer in answers)


def test_a_temperature_that_vllm_would_raise_is_refused(sampler: VllmSampler) -> None:
    with pytest.raises(ConfigError, match=r"0\.005"):
        answers_of(sampler, requests(SamplingParams(max_tokens=5, temperature=0.005)))


def test_the_process_is_left_as_it_was(sampler: VllmSampler) -> None:
    before = torch.random.get_rng_state()
    answers_of(sampler, requests(SamplingParams(max_tokens=4)))
    sampler.publish(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
