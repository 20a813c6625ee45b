"""Stop strings: found on the text however tokens cut it, and what was sampled stays as it was sampled."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import ClassVar

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.laws.support import answers_of, written
from tests.laws.test_company import bits, drive
from whet.config import ModelConfig
from whet.errors import ModelError, SamplerError
from whet.models.language import LanguageModel
from whet.models.load import load_model
from whet.models.marks import completing, stop_table
from whet.records import Completion, Ending
from whet.sampling.base import Request, SamplingParams
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.engine import Engine
from whet.sampling.weight_sync import complete

STOPS = ("1", "=2", "</answer>", "0\n", "é")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model(ModelConfig(path="whet:demo"))


def asked(model: LanguageModel, stop: tuple[str, ...], count: int = 24) -> list[Request]:
    draw = random.Random(3)
    prompts = [model.tokenizer.encode(f"{draw.randrange(99)}+{draw.randrange(99)}=") for _ in range(count // 3)]
    return [
        Request(
            prompt=draw.choice(prompts),
            seed=seed,
            params=SamplingParams(max_tokens=draw.randint(1, 40), temperature=draw.choice((0.0, 1.0)), stop=stop),
            samples=draw.choice((1, 8)),
        )
        for seed in range(count)
    ]


def first_complete(tokenizer: PreTrainedTokenizerFast, tokens: list[int], stops: tuple[str, ...]) -> int | None:
    """Where the text of the tokens first holds a stop string, found by decoding again and again."""
    texts = (tokenizer.decode(tokens[:count]) for count in range(1, len(tokens) + 1))
    return next((at for at, text in enumerate(texts, start=1) if any(stop in text for stop in stops)), None)


@pytest.mark.parametrize("stops", [("ab",), ("</answer>", "answer"), ("aab", "ba", "aaaa"), ("\n\n", "é>", " the ")])
def test_the_table_finds_what_decoding_finds(model: LanguageModel, stops: tuple[str, ...]) -> None:
    tokenizer, draw = model.tokenizer, random.Random(0)
    table = stop_table(tokenizer, model.vocabulary, stops)
    likely = sorted({token for stop in stops for token in tokenizer.encode(stop + stop[::-1])})
    found = []
    for _ in range(200):
        tokens = [draw.choice(likely) if draw.random() < 0.7 else draw.randrange(256) for _ in range(12)]
        found.append(first_complete(tokenizer, tokens, stops))
        assert completing(table, tokens) == found[-1]
    assert any(found)


def test_a_string_is_found_inside_a_token_and_across_tokens_of_a_sentencepiece_vocabulary() -> None:
    pieces = ["<unk>", "▁the", "</", "answer", ">", ">\n", "▁", "<0xC3>", "<0xA9>", "a</answer>b"]
    backend = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

    class Spelled:
        """The tokenizer's tables, with an encoding of the strings that the test names."""

        backend_tokenizer = backend
        added_tokens_decoder: ClassVar[dict[int, object]] = {}
        get_vocab = staticmethod(backend.get_vocab)

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": {"</answer>": [2, 3, 4], " the": [1], "é": [7, 8], "odd": [1]}[text]}

    tokenizer = Spelled()
    table = stop_table(tokenizer, len(pieces) + 3, ("</answer>", "é"))  # a head may have more rows than tokens
    assert completing(table, [1, 2, 3, 4]) == 4
    assert completing(table, [2, 2, 3, 5, 1]) == 4  # the last token holds more than the string
    assert completing(table, [6, 9, 1]) == 2
    assert completing(table, [7, 6, 8, 7, 8]) == 5
    assert completing(table, [2, 3, 1, 4, 11]) is None
    assert completing(stop_table(tokenizer, len(pieces), (" the",)), [1]) == 1
    with pytest.raises(ModelError, match="does not spell 'odd'"):
        stop_table(tokenizer, len(pieces), ("odd",))


def test_an_answer_is_cut_after_the_string_and_is_the_same_bits_until_then(model: LanguageModel) -> None:
    whole = answers_of(EmbeddedSampler(model), asked(model, ()))
    stopped = answers_of(EmbeddedSampler(model), asked(model, STOPS))
    endings = set()
    for long, short in zip(whole, stopped, strict=True):
        assert isinstance(long, Completion) and isinstance(short, Completion)
        at = first_complete(model.tokenizer, list(written(long)), STOPS)
        kept = len(long.tokens) if at is None else at
        assert bits(short) == (long.tokens[:kept].tobytes(), long.logprobs[:kept].tobytes())
        assert short.ending is (Ending.LENGTH if at is None else Ending.STOP_STRING)
        endings.add(short.ending)
    assert len(endings) == 2


def test_and_in_any_company(model: LanguageModel) -> None:
    draw = random.Random(8)
    mixed = [r if n % 3 else replace(r, params=replace(r.params, stop=())) for n, r in enumerate(asked(model, STOPS))]
    alone = [bits(answer) for request in mixed for answer in answers_of(EmbeddedSampler(model), [request])]
    for max_running in (3, 64):
        found = drive(Engine(model, max_running=max_running, cache_bytes=2**28), mixed, draw)
        assert len(found) >= len(mixed) - 4
        assert found == {number: alone[number] for number in found}


def test_a_stop_token_ends_a_turn_whatever_string_it_completes(model: LanguageModel) -> None:
    request = asked(model, STOPS)[0]
    (answer,) = answers_of(EmbeddedSampler(model), [request])
    ids = frozenset({written(answer)[-1]})
    (again,) = answers_of(EmbeddedSampler(model), [replace(request, params=replace(request.params, stop_ids=ids))])
    assert again.ending is Ending.STOP and written(again)[-1] in ids


def test_what_vllm_wrote_is_ended_by_the_same_rule(model: LanguageModel) -> None:
    tokens = model.tokenizer.encode("4+5=9</answer>")
    request = Request(prompt=(1,), seed=0, params=SamplingParams(max_tokens=99, stop=("</answer>",)))

    def came(tokens: list[int]) -> Completion:
        return complete(request, tokens, [-1.0] * len(tokens), model=model, version=1, why="stop")

    assert came(tokens).ending is Ending.STOP_STRING
    with pytest.raises(SamplerError, match="1 tokens after a stop string"):
        came([*tokens, 7])
    with pytest.raises(SamplerError, match=r"ended a completion after \d+ of 99 tokens: stop"):
        came(tokens[:-1])


def test_no_empty_string() -> None:
    with pytest.raises(ValueError, match="no empty string"):
        SamplingParams(max_tokens=1, stop=("",))
