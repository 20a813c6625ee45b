"""Clients of models: judges and writers answer in text, reward models in numbers.

Behind a client is another process, an endpoint or a model beside the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from whet.records import Message, Reply

if TYPE_CHECKING:  # a scripted judge starts in a process of its own, and need not load all of a recipe's sections
    from whet.config.judge import ChatConfig
    from whet.config.rewards import ScorerConfig

Readable = Callable[[int, Reply], bool]
"""Whether the caller can parse the reply to a conversation, given by its number."""


class ChatClient(Protocol):
    """A client that answers conversations with text: a judge, a critic, a writer."""

    def chat(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int, readable: Readable | None = None
    ) -> list[Reply]:
        """One reply to each conversation, in order. A failure is a reply without a message, never invented text.

        A reply that is not `readable` to the caller is not cached.
        """

    def probabilities(
        self, conversations: Sequence[Sequence[Message]], options: Sequence[str]
    ) -> list[tuple[float, ...] | None]:
        """How likely each option is as the whole next message, of those alone (they sum to 1); None on failure.

        Raises `ConfigError` for a client without log-probabilities.
        """

    def close(self) -> None:
        """End its processes, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """What a reward model is to read: a conversation, and where in its last message a score is wanted."""

    messages: tuple[Message, ...]
    ends: tuple[int, ...]
    """Characters of the last message, ascending; its whole length for the message as such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReading:
    """The scores at a passage's ends, or why there are none."""

    scores: tuple[float, ...]
    failure: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of a model of several objectives: the score of each at the last end (in standard deviations of its ratings),
    and under `gate/NAME` its weight where a gate decides."""


class RewardModelClient(Protocol):
    """A reward model, of answers or of their steps: it scores whole conversations."""

    def read(self, passages: Sequence[Passage]) -> list[ScoreReading]:
        """One reading of each passage, in order: a reward, or the probability that what was read so far is right."""


class Models(Protocol):
    """Creates the clients of the models that rewards need."""

    def chat(self, config: ChatConfig) -> ChatClient:
        """The client that a recipe describes."""

    def scorer(self, config: ScorerConfig, *, steps: bool) -> RewardModelClient:
        """A reward model, of answers or of `steps`; it is loaded at the first request."""
