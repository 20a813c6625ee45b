"""The work that is timed: the same rows, prompts and lengths for whoever does it. No torch.

Lengths are drawn once for a piece of work and shuffled for each step, so every step costs the same and medians mean
something. `ragged` answers are drawn from an exponential distribution, from 4 tokens up to twice the nominal length
(their mean is about 0.7 of it); ragged rows of SFT and answers that are compared are uniform between half and one and
a half times.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["sft", "reward", "dpo", "grpo", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One line of the benchmark. Answers are counted in tokens; a text has a token for each byte."""

    name: str
    kind: Kind
    model: str
    peers: tuple[str, ...]
    rows: int
    """SFT: rows of a step; GRPO and reward models: prompts; decoding: requests."""
    answer: int
    ragged: bool
    group: int = 1
    prompt: tuple[int, int] = (15, 15)
    """Least and most bytes of a prompt's text (decoding: tokens)."""
    steps: int = 5
    arrivals: int = 0
    """Decoding: requests that come at each step of the sampler (whet alone); 0: all of them at once."""

    def lengths(self, step: int) -> list[int]:
        """Tokens of each answer of this step, group after group."""
        draw = random.Random(self.name)
        count = self.rows * self.group
        if not self.ragged:
            found = [self.answer] * count
        elif self.kind in ("sft", "reward", "dpo"):
            found = [draw.randint(self.answer // 2, self.answer * 3 // 2) for _ in range(count)]
        else:
            drawn = [draw.expovariate(1 / (0.75 * self.answer)) for _ in range(count)]
            found = [min(2 * self.answer, max(4, round(length))) for length in drawn]
        random.Random(f"{self.name}/{step}").shuffle(found)
        return found

    def questions(self, step: int) -> list[str]:
        """The text of each prompt."""
        draw = random.Random(f"{self.name}/questions/{step}")
        return [_fill(f"What is {draw.randrange(100, 1000)}+{draw.randrange(100, 1000)}?", draw, *self.prompt)
                for _ in range(self.rows)]  # fmt: skip

    def answers(self, step: int) -> list[str]:
        """The text of each answer to be trained on, group after group."""
        draw = random.Random(f"{self.name}/answers/{step}")
        return [_fill("", draw, length, length) for length in self.lengths(step)]

    def token_prompts(self, step: int, vocabulary: int) -> list[list[int]]:
        """Prompts of random tokens, for decoding; their lengths are the same in every step."""
        draw, size = random.Random(f"{self.name}/tokens/{step}"), random.Random(f"{self.name}/sizes")
        return [[draw.randrange(3, vocabulary) for _ in range(size.randint(*self.prompt))] for _ in range(self.rows)]


def _fill(text: str, draw: random.Random, low: int, high: int) -> str:
    """The text, brought to a length between these by words put in front."""
    length = max(draw.randint(low, high), len(text))
    words = ""
    while len(words) < length:
        words += draw.choice(WORDS) + " "
    return words[: length - len(text)] + text


WORDS = ("the", "sum", "is", "found", "by", "adding", "each", "column", "and", "taking", "over", "what", "carries")


def _grpo(name: str, **changes: object) -> Work:
    usual = {"kind": "grpo", "model": "small", "peers": ("trl",), "rows": 8, "group": 8, "answer": 64, "ragged": False}
    return Work(name=name, **{**usual, **changes})  # type: ignore[arg-type]


def _reward(name: str, **changes: object) -> Work:
    usual = {"kind": "reward", "model": "small", "peers": ("trl",), "rows": 8, "group": 2, "answer": 88, "ragged": True}
    return Work(name=name, **{**usual, **changes})  # type: ignore[arg-type]


def _decode(name: str, **changes: object) -> Work:
    usual = {
        "kind": "decode",
        "model": "small",
        "peers": ("generate", "cb", "vllm"),
        "rows": 64,
        "answer": 64,
        "ragged": False,
    }
    return Work(name=name, **{**usual, "prompt": (8, 128), **changes})  # type: ignore[arg-type]


WORKS = {
    work.name: work
    for work in (
        Work(name="sft", kind="sft", model="small", peers=("trl",), rows=16, answer=88, ragged=True),
        _reward("reward", prompt=(88, 88)),
        _reward("reward-long-prompt", prompt=(352, 352)),
        _reward("dpo", kind="dpo", prompt=(88, 88)),
        _reward("dpo-long-prompt", kind="dpo", prompt=(352, 352)),
        _grpo("grpo"),
        _grpo("grpo-ragged", ragged=True, peers=("trl", "trl-cb")),
        _grpo("grpo-long-prompt", rows=4, group=16, prompt=(238, 238), steps=3),
        _decode("decode"),
        _decode("decode-ragged", ragged=True),
        _decode("decode-many", rows=192, peers=("generate",), steps=3),
        _decode("decode-mixed", rows=192, peers=("generate",), steps=3, arrivals=1),
        Work(name="sft-base60", kind="sft", model="base60", peers=("trl",), rows=8, answer=88, ragged=True, steps=3),
        _grpo("grpo-base60", model="base60", rows=4, group=4, answer=32, steps=3),
        _decode("decode-base60", model="base60", answer=32, steps=3),
        _decode("decode-base60-ragged", model="base60", answer=32, ragged=True, steps=3),
        Work(name="sft-wide", kind="sft", model="wide", peers=("trl",), rows=8, answer=256, ragged=True, steps=3),
    )
}
"""By name. The models are those of `make_model.SHAPES`."""
