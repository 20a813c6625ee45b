"""Law: a text tokenized word by word has the tokens that it has as a whole."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from whet.templates import words
from whet.templates.words import REGEX, Words, words_of

SPECIALS = ["<|im_start|>", "<|im_end|>", "<think>"]
PIECES = [
    *[" "] * 20, "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\x1c", "\x85", "\u180e",
    "\u200b", "\u0308", "e\u0301", "é", "\u212b", "'s", "'S", "'ſ", "don't", "a", "the", "Of", "BAR", "123", "4567",
    "٣", "½", "!", "...", "?!", "//", "/", "\\", "_", "-", "—", "”", "。", "日本", "ア", "한국", "\u1100\u1161", "😀",
    "👩\u200d👩", "\ufeff", "ก็", "ß", "ǅ", "ʰ", "`", "{", "<", "नमस्ते", *SPECIALS,
]  # fmt: skip
BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = ByteLevel(add_prefix_space=False, use_regex=True)


def split(regex: str) -> PreTokenizer:
    return Split(Regex(regex), "isolated")


CUTS = [Sequence([split(regex), BYTES]) for regex, cuts in REGEX.items() if cuts]
CUTS += [GPT2, Sequence([Digits(individual_digits=True), GPT2]), Sequence([*map(split, REGEX), BYTES])]


def texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 40))) for _ in range(count)]


def trained(cut: PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A byte-level BPE with merges of spaces, of letters, and of both."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = cut
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    made.train_from_iterator([text for text in texts(1, 300) if "<" not in text], trainer)
    return made


def of(backend: Tokenizer) -> Words | None:
    return words_of(SimpleNamespace(backend_tokenizer=backend))


def as_list(tokens: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(tokens, np.int32).tolist()
    return ids


def differing(found: Words, backend: Tokenizer) -> list[str]:
    """Texts that have other tokens word by word; half of the words are known from texts before."""
    given = texts(2, 2000)
    tokens = [*found.tokens(given[:1000]), *found.tokens(given[1000:])]
    whole = backend.encode_batch_fast(given, add_special_tokens=False)
    return [text for text, mine, right in zip(given, tokens, whole, strict=True) if as_list(mine) != right.ids]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_words_have_the_tokens_of_the_whole(cut: PreTokenizer, normalizer: normalizers.Normalizer | None) -> None:
    backend = trained(cut, normalizer)
    found = of(backend)
    assert found is not None
    assert differing(found, backend) == []


def test_what_stands_around_a_text_stands_around_its_words() -> None:
    backend = trained(GPT2)
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> <think> $A <|im_end|>", special_tokens=[(name, n) for n, name in enumerate(SPECIALS)]
    )
    found = of(backend)
    assert found is not None
    given = texts(3, 100)
    whole = backend.encode_batch_fast(given, add_special_tokens=True)
    assert [as_list(each) for each in found.tokens(given, special=True)] == [each.ids for each in whole]


def test_the_law_sees_a_wrong_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = trained(GPT2)
    found = of(backend)
    assert found is not None
    monkeypatch.setattr(words, "WORDS", re.compile(r" ?[^ ]*"))
    assert differing(found, backend)


def test_words_are_forgotten_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "KEPT", 1000)
    backend = trained(GPT2)
    found = of(backend)
    assert found is not None
    for seed in range(20):
        given = texts(seed, 20)
        whole = backend.encode_batch_fast(given, add_special_tokens=False)
        assert [as_list(each) for each in found.tokens(given)] == [each.ids for each in whole]
        assert sum(map(len, found._known)) <= 1000


def other(**changes: object) -> Tokenizer:
    backend = trained(GPT2)
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


def with_added(token: AddedToken) -> Tokenizer:
    backend = trained(GPT2)
    backend.add_special_tokens([token])
    return backend


UNSURE = {
    "no cut at spaces": other(pre_tokenizer=BYTES),
    "an expression of its own": other(pre_tokenizer=Sequence([split(r"\S+ \S+|\s+"), BYTES])),
    "one that is not known, and then one that is": other(pre_tokenizer=Sequence([split(r"\S+ \S+|\s+"), GPT2])),
    "a space in front": other(pre_tokenizer=ByteLevel(add_prefix_space=True)),
    "spaces that are letters": other(pre_tokenizer=pre_tokenizers.Metaspace()),
    "no pre-tokenizer": Tokenizer(models.BPE()),
    "a normalizer": other(normalizer=normalizers.Strip()),
    "a token with spaces": with_added(AddedToken("<a b>")),
    "a token that takes spaces": with_added(AddedToken("<a>", lstrip=True)),
    "chance": other(model=models.BPE(dropout=0.1)),
}


@pytest.mark.parametrize("why", UNSURE)
def test_other_tokenizers_get_whole_texts(why: str) -> None:
    assert of(UNSURE[why]) is None
