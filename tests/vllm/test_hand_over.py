"""Handed over is used: after `publish` vLLM computes with the new weights, and one that does not is found out."""

from __future__ import annotations

import pytest

import whet.sampling.vllm
from tests.laws.support import answers_of
from tests.vllm.conftest import disturb, largest_gap
from whet.errors import SamplerError
from whet.sampling.base import Request, SamplingParams
from whet.sampling.vllm import VllmSampler

LONG = tuple(n * 7 % 250 for n in range(300))
"""Longer than two blocks of vLLM's cache, so that it is shared and kept."""
ASKED = [Request(prompt=LONG, seed=seed, params=SamplingParams(max_tokens=12)) for seed in range(4)]
TOLERANCE = 1e-3
WRONG = 0.1
"""Old weights, or a cache that was filled with them, are off by more."""


def test_what_is_handed_over_is_used(sampler: VllmSampler) -> None:
    for version in (3, 4, 9):
        disturb(sampler.model)
        assert largest_gap(sampler.model, ASKED, answers_of(sampler, ASKED)) > WRONG
        sampler.publish(version)
        answers = answers_of(sampler, ASKED)
        assert largest_gap(sampler.model, ASKED, answers) < TOLERANCE
        assert {answer.version for answer in answers} == {version} == {sampler.version}


def test_the_cache_is_of_the_new_weights(sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    answers_of(sampler, ASKED)
    disturb(sampler.model)
    sampler.publish(1)
    assert largest_gap(sampler.model, ASKED, answers_of(sampler, ASKED)) < TOLERANCE
    disturb(sampler.model)
    monkeypatch.setattr(sampler._engine, "reset_prefix_cache", lambda: True)  # a reset that does nothing is seen above
    sampler.publish(2)
    assert largest_gap(sampler.model, ASKED, answers_of(sampler, ASKED)) > WRONG
    monkeypatch.setattr(sampler._engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(SamplerError, match="prefix cache"):
        sampler.publish(3)


def test_weights_that_did_not_arrive_are_found_out(sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little changed: here by less than any log-probability would show."""
    (worker,) = sampler._engine.collective_rpc(lambda worker: worker)
    monkeypatch.setattr(worker, "reload_weights", lambda **_: None)
    disturb(sampler.model, size=1e-7)
    with pytest.raises(SamplerError, match="still has another"):
        sampler.publish(5)
    assert sampler.version == 0


def test_a_tied_head_that_stayed_behind_is_found_out(sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whet.sampling.vllm, "repack_tied_head", lambda module: None)
    disturb(sampler.model)
    with pytest.raises(SamplerError, match="on a probe"):
        sampler.publish(5)
