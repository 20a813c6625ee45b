"""A model on this machine that answers conversations: template, sampler and trainer behind the door of a chat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from whet.errors import DataError, SamplerError
from whet.records import Ending, Message, Reply, TokenRow, token_ids
from whet.sampling.base import Request, SamplingParams, TokenSampler, run, sample_all
from whet.templates.base import Template
from whet.training.base import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """A loaded model, for text and for log-probabilities."""

    template: Template
    sampler: TokenSampler
    trainer: Trainer
    max_length: int
    """Most tokens that it attends to."""


class ModelAsker:
    """`Asker` over a model that `load` brings into memory at the first question.

    The random numbers of an answer follow from its conversation's key; greedy answers (temperature 0) need none.
    """

    alone = False
    """Products of larger matrices round differently, so an answer may depend on what is computed beside it."""

    def __init__(self, load: Callable[[], Speaker], *, identity: str, temperature: float) -> None:
        self.identity = f"model {identity} at {temperature}"
        self._load, self._temperature = load, temperature
        self._speaker: Speaker | None = None

    def ask(
        self, conversations: Sequence[Sequence[Message]], keys: Sequence[str], *, max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """One answer each; a conversation that the template cannot write, or that leaves no room, is a failure."""
        requests: dict[int, Request] = {}
        for number, (conversation, key) in enumerate(zip(conversations, keys, strict=True)):
            try:
                requests[number] = self._request(conversation, key, max_tokens)
            except DataError as error:
                yield number, Reply(message=None, failure=str(error))
        if not requests:
            return
        speaker = self._speaking()
        completions = run(sample_all(speaker.sampler, list(requests.values())))
        for number, completion in zip(requests, completions, strict=True):
            if isinstance(completion, SamplerError):
                yield number, Reply(message=None, failure=str(completion))
                continue
            message = speaker.template.parse(completion.tokens.tolist(), completion.ending)
            yield number, Reply(message=message, cut_off=completion.ending is Ending.LENGTH)

    def probabilities(
        self, conversations: Sequence[Sequence[Message]], options: Sequence[str]
    ) -> list[tuple[float, ...] | None]:
        """p(option) as the whole next turn, its end included, renormalised over the options.

        The end makes "1" and "10" two different answers, and options of several tokens comparable.
        """
        rows: list[TokenRow] = []
        places: list[int] = []
        for place, conversation in enumerate(conversations):
            try:
                rows += [self._option_row(conversation, option) for option in options]
                places.append(place)
            except DataError:
                del rows[len(places) * len(options) :]
        logps = iter(self._speaking().trainer.forward(rows, "logp")["logp"])
        found: list[tuple[float, ...] | None] = [None] * len(conversations)
        for place in places:
            found[place] = _normalised([float(next(logps).sum(dtype=float)) for _ in options])
        return found

    def close(self) -> None:
        """Unload the model."""
        self._speaker = None

    def _request(self, conversation: Sequence[Message], key: str, max_tokens: int) -> Request:
        speaker = self._speaking()
        prompt = speaker.template.prompt(conversation)
        room = speaker.max_length - len(prompt)
        if room < 1:
            raise DataError(f"the conversation has {len(prompt)} tokens, the judge attends to {speaker.max_length}")
        params = SamplingParams(
            max_tokens=min(max_tokens, room), temperature=self._temperature, stop_ids=speaker.template.stop_ids
        )
        return Request(prompt=prompt, seed=int(key[:15], 16), params=params)

    def _option_row(self, conversation: Sequence[Message], option: str) -> TokenRow:
        """The conversation with the option as its next turn; trained: the option and the token that ends the turn."""
        speaker = self._speaking()
        prompt = speaker.template.prompt(conversation)
        context = [replace(message, trained=False) for message in conversation]
        whole = speaker.template.conversation([*context, Message(role="assistant", content=option)])
        if whole.tokens[: len(prompt)] != prompt:
            raise DataError("the template writes a turn differently once it is answered")
        if len(whole.tokens) > speaker.max_length:
            raise DataError(f"the conversation has {len(whole.tokens)} tokens, more than the judge attends to")
        return TokenRow(tokens=token_ids(whole.tokens), trained=np.array(whole.trained), shared=len(prompt))

    def _speaking(self) -> Speaker:
        if self._speaker is None:
            self._speaker = self._load()
        return self._speaker


def _normalised(logps: Sequence[float]) -> tuple[float, ...]:
    top = max(logps)
    weights = [math.exp(logp - top) for logp in logps]
    return tuple(weight / sum(weights) for weight in weights)
