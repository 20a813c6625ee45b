"""Rewards of how an answer is written: its layout, length, language and repetitions. They do not judge it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from whet.config.strict import Strict


class RewardBase(Strict):
    """A named part of the reward: `weight` times what it returns is added to the score."""

    kind: str
    name: str | None = None
    weight: float = 1.0
    counts_tokens: ClassVar[bool] = False
    """Whether it counts the tokens of answers, which rows of a file lack."""
    asks_right: ClassVar[bool] = False
    """Whether it asks which answers are right, so that another reward must say it."""

    grades_steps: ClassVar[bool] = False
    """Whether it may grade the steps of an answer, which `credit: process` and `step_weight` need."""

    def check_length(self, max_tokens: int) -> None:
        """Raise `ValueError` where answers of at most `max_tokens` make no sense to it."""

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of its kind alone: keyword arguments of the function or class of `envs.rewards` that grades."""
        shared = {"verifies", *RewardBase.model_fields}
        return {key: getattr(self, key) for key in type(self).model_fields if key not in shared}

    @property
    def says_right(self) -> bool:
        """Whether its value says which answers are right: 1 is right."""
        return False


class FormatReward(RewardBase):
    """1 if the completion has a layout of thinking and answer (DeepSeek-R1)."""

    kind: Literal["format"]
    form: Literal["strict", "soft", "think", "open_r1", "tags"] = "strict"
    """strict: `<think>...</think><answer>...</answer>` and nothing else; soft: these tags in this order; think: TRL's;
    open_r1: each tag on its line; tags: a quarter for each of those."""


class LanguageReward(RewardBase):
    """The share of words in one script: language consistency (DeepSeek-R1)."""

    kind: Literal["language"]
    script: Literal["LATIN", "CYRILLIC", "ARABIC", "CJK", "DEVANAGARI", "GREEK", "HANGUL", "HEBREW", "THAI"] = "LATIN"
    thinking: bool = True
    """Whether the thinking counts too."""


class OverlongReward(RewardBase):
    """Soft overlong punishment (DAPO eq. 13): 0 up to `max_tokens - cache_tokens`, then down to -1."""

    counts_tokens = True
    kind: Literal["overlong"]
    cache_tokens: int = Field(ge=1)

    def check_length(self, max_tokens: int) -> None:
        """A cache of all tokens would punish every answer."""
        if self.cache_tokens > max_tokens:
            raise ValueError(
                f"rewards.overlong.cache_tokens is {self.cache_tokens}, more than sampling.max_tokens "
                f"({max_tokens}): every answer would be punished; lower it"
            )


class CosineReward(RewardBase):
    """Right answers the better the shorter, wrong ones the better the longer, along a cosine (Yeo et al. 2025).

    Needs a reward that judges. Where that one adds to the score as well, give it weight 0 to have the paper's.
    """

    counts_tokens = asks_right = True
    kind: Literal["cosine"]
    right: tuple[float, float] = (2.0, 1.0)
    """Of a right answer without tokens, and of one with `max_tokens`."""
    wrong: tuple[float, float] = (-10.0, 0.0)
    exceeded: float = -10.0
    """Of an answer that was cut off."""


class LengthReward(RewardBase):
    """1 for an answer of more than `above_tokens`, else 0: something to watch, or the cost of a constraint."""

    counts_tokens = True
    kind: Literal["length"]
    above_tokens: int = Field(ge=0)


class GroupLengthReward(RewardBase):
    """Between +0.5 for the shortest and -0.5 for the longest answer to a prompt, at most 0 for wrong ones (Kimi k1.5).

    Needs a reward that judges.
    """

    counts_tokens = asks_right = True
    kind: Literal["group_length"]


class RepetitionReward(RewardBase):
    """Minus the share of an answer's n-grams of tokens that were there before."""

    counts_tokens = True
    kind: Literal["repetition"]
    ngram: int = Field(40, ge=1)
