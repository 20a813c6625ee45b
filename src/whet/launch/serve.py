"""What `whet serve` serves: models on this machine, each with its own template and sampler."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from whet.config import SamplingConfig
from whet.errors import ConfigError, DataError, ModelError, SamplerError
from whet.launch.talk import open_policy
from whet.pipeline.stage import Policy
from whet.records import Completion, Ending, seed_of
from whet.sampling.base import Request, SamplingParams, together
from whet.serving.app import Bounds, Server
from whet.serving.base import ChatAnswer, ChatChoice, Heard, call_id, said
from whet.serving.wire import ChatBody, Refusal
from whet.templates.base import Template


class ServedModels:
    """`Host` and `ChatCaller` over loaded models. They are rendered for and sampled in a thread of their own."""

    def __init__(self, models: Mapping[str, Policy], *, key: str | None = None, max_tokens: int = 2048) -> None:
        """`key` is what requests must send; `max_tokens` is the most of an answer, whatever is asked."""
        self._policies, self._key, self._max_tokens = dict(models), key, max_tokens
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="whet-models", daemon=True).start()

    @property
    def models(self) -> Sequence[str]:
        """Their names."""
        return tuple(self._policies)

    def caller(self, key: str) -> ServedModels | None:
        """All models, for the one key."""
        same = self._key is None or hmac.compare_digest(key.encode(), self._key.encode())
        return self if same else None

    async def answer(self, asked: ChatBody, heard: Heard) -> ChatAnswer:
        """`ChatCaller`: sampled in the models' thread, so that HTTP goes on meanwhile."""
        here = asyncio.get_running_loop()

        def tell(index: int, text: str) -> None:
            with suppress(RuntimeError):  # the server has just ended
                here.call_soon_threadsafe(heard, index, text)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._answer(asked, tell), self._loop))

    async def _answer(self, asked: ChatBody, tell: Heard) -> ChatAnswer:
        policy, settings = self._policies[asked.model], asked.chat_template_kwargs or {}
        try:
            prompt = policy.template.prompt(asked.conversation, asked.offered, settings=settings, untrusted=True)
            calling = policy.template.stops(asked.offered)  # raises where no call could be read
        except DataError as error:
            raise Refusal(400, str(error), param="messages") from error
        room = policy.max_length - len(prompt)
        if room < 1:
            why = f"the conversation has {len(prompt):,} tokens, the model attends to {policy.max_length:,}"
            raise Refusal(400, why, code="context_length_exceeded", param="messages")
        params = self._params(asked, policy.template, room, calling)
        seed, count = secrets.randbits(62) if asked.seed is None else asked.seed, asked.n or 1
        requests = [
            Request(
                prompt=prompt,
                seed=seed_of("serve", seed, index),
                params=params,
                samples=count,
                heard=_Teller(policy.template, params, index, tell) if asked.in_pieces else None,
            )
            for index in range(count)
        ]
        try:
            completions = await together(policy.sampler.sample(request) for request in requests)
        except ModelError as error:  # a stop string that the tokenizer does not spell
            raise Refusal(400, str(error), param="stop") from error
        except SamplerError as error:
            raise Refusal(500, str(error)) from error
        choices = (
            _choice(policy.template, asked, each, request.seed)
            for each, request in zip(completions, requests, strict=True)
        )
        written = sum(len(completion.tokens) for completion in completions)
        return ChatAnswer(choices=tuple(choices), prompt_tokens=len(prompt), completion_tokens=written)

    def _params(self, asked: ChatBody, template: Template, room: int, calling: tuple[str, ...]) -> SamplingParams:
        wanted = asked.max_completion_tokens or asked.max_tokens or self._max_tokens
        return SamplingParams(
            max_tokens=min(wanted, self._max_tokens, room),
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=asked.top_p or 1.0,
            top_k=asked.top_k,
            stop_ids=template.stop_ids,
            stop=(*asked.strings, *calling),
        )


class _Teller:
    """Tells the text of an answer while it is written, but for an end that may yet be cut off or completed."""

    def __init__(self, template: Template, params: SamplingParams, index: int, tell: Heard) -> None:
        self._template, self._params, self._index, self._tell = template, params, index, tell
        self._back = max((len(string) - 1 for string in params.stop), default=0)
        self._told = 0

    def __call__(self, tokens: Sequence[int]) -> None:
        written = tokens[:-1] if tokens[-1] in self._params.stop_ids else tokens
        text = _cut(self._template.decode(written), self._params.stop).rstrip("\ufffd")  # half a character
        sure = len(text) - self._back
        if sure > self._told:
            self._tell(self._index, text[self._told : sure])
            self._told = sure


def _choice(template: Template, asked: ChatBody, completion: Completion, seed: int) -> ChatChoice:
    tokens = completion.tokens.tolist()
    content, calls = said(template.parse(tokens, completion.ending, asked.offered))
    listed = None
    if asked.logprobs:
        logps = completion.logprobs.tolist()
        listed = tuple((template.decode([token]), logp) for token, logp in zip(tokens, logps, strict=True))
    return ChatChoice(
        content=_cut(content, asked.strings),
        calls=tuple(replace(call, id=call_id(seed, number)) for number, call in enumerate(calls)),
        cut_off=completion.ending is Ending.LENGTH,
        tokens=listed,
    )


def _cut(text: str, strings: Sequence[str]) -> str:
    """The text before the first of these strings."""
    return text[: min((at for string in strings if (at := text.find(string)) >= 0), default=len(text))]


def open_server(
    named: Sequence[str], *, host: str, key_env: str | None, max_tokens: int, bounds: Bounds
) -> tuple[Server, dict[str, str]]:
    """A server of these models (`MODEL`, or `NAME=MODEL`), and what each of them is.

    Raises `ConfigError` where it would be open to other machines without a key.
    """
    key = None if key_env is None else os.environ.get(key_env)
    if key_env is not None and not key:
        raise ConfigError(f"--api-key-env {key_env}: the environment variable is not set; export the key")
    if key is None and not _is_loopback(host):
        raise ConfigError(f"--host {host}: other machines could ask without a key; give --api-key-env, or 127.0.0.1")
    policies, about = dict[str, Policy](), dict[str, str]()
    for each in named:
        alias, _, what = each.rpartition("=")
        name = alias or what.rstrip("/")
        if name in policies:
            raise ConfigError(f"{each}: two models would have this name; give one as NAME={what}")
        policies[name], which, _ = open_policy(what, SamplingConfig())
        about[name] = f"{which}; {policies[name].precision}, {policies[name].max_length:,} tokens at most"
    names = None if key is not None else frozenset({"localhost", "127.0.0.1", "[::1]", host})
    return Server(host=ServedModels(policies, key=key, max_tokens=max_tokens), bounds=bounds, names=names), about


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
