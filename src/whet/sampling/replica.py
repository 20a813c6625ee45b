"""A sampler in a process of its own: an engine over a copy of the weights, at the other end of a socket.

What is said are frames (`sandbox.frames`). To it: `sample` (a request, with a number), `cancel` (that number), `load`
(weights in a file, with their digest). From it: `done` (a completion or an error, with the number), `loaded` or
`refused`, and while it is at work a `beat` every second, so that silence means that it hangs.

Weights are taken in between two steps: what is running keeps its cached keys and values, and its answer says from which
token on the version is another (`Engine.switch`). Their digest is compared before anything is overwritten.
"""

from __future__ import annotations

import base64
import select
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from whet.config import LoraConfig, ModelConfig
from whet.errors import SamplerError
from whet.models.load import load_model
from whet.models.matmul import use_library
from whet.records import Completion, Ending, token_ids
from whet.sampling.base import Request, SamplingParams
from whet.sampling.engine import Engine
from whet.sampling.tickets import Ticket
from whet.sampling.weight_sync import sampled_weights, weights_digest
from whet.sandbox.frames import encode, take

BEAT_S = 1.0
"""How often a replica at work says that it is, where it has nothing else to say."""


def load(
    model: Mapping[str, Any],
    lora: Mapping[str, Any] | None,
    *,
    quantised: bool,
    max_running: int,
    cache_gib: float,
    threads: int,
    products: Any,
) -> Callable[[socket.socket], None]:
    """What serves a socket: an engine over this model, for `sandbox.worker_main`, also in a process that forks."""
    torch.set_num_threads(1)  # threads that were started before a fork are not there after it
    use_library(products)
    adapter = None if lora is None else LoraConfig.model_validate(lora)
    language = load_model(ModelConfig.model_validate(model), lora=adapter, quantised=quantised)
    engine = Engine(language, max_running=max_running, cache_bytes=int(cache_gib * 2**30))

    def serve(channel: socket.socket) -> None:
        torch.set_num_threads(threads)
        _Replica(engine, channel).serve()

    return serve


class _Replica:
    """An engine and who asks it."""

    def __init__(self, engine: Engine, channel: socket.socket) -> None:
        self._engine, self._channel, self._said = engine, channel, time.monotonic()
        self._tickets: dict[int, Ticket] = {}
        self._numbers: dict[Ticket, int] = {}

    def serve(self) -> None:
        """Until the other side is gone."""
        inbox = bytearray()
        while True:
            if not self._engine.busy or select.select([self._channel], [], [], 0)[0]:
                chunk = self._channel.recv(1 << 20)
                if not chunk:
                    return
                inbox += chunk
                while (frame := take(inbox)) is not None:
                    self._obey(frame)
            if self._engine.busy:
                for ticket, answer in self._engine.step():
                    number = self._numbers.pop(ticket)
                    del self._tickets[number]
                    self._say({"done": number, **answer_frame(answer)})
                if time.monotonic() - self._said > BEAT_S:
                    self._say({"beat": self._engine.steps})

    def _say(self, frame: dict[str, Any]) -> None:
        self._channel.sendall(encode(frame))
        self._said = time.monotonic()

    def _obey(self, frame: dict[str, Any]) -> None:
        if "sample" in frame:
            try:
                ticket = self._engine.submit(read_request(frame))
            except Exception as error:  # noqa: BLE001  of this request alone
                self._say({"done": frame["sample"], "error": f"{type(error).__name__}: {error}"})
                return
            self._tickets[frame["sample"]], self._numbers[ticket] = ticket, frame["sample"]
        elif "cancel" in frame:
            if frame["cancel"] in self._tickets:  # else it is done already
                ticket = self._tickets.pop(frame["cancel"])
                del self._numbers[ticket]
                self._engine.cancel(ticket)
        else:
            self._say(self._load(frame["load"], frame["version"], frame["digest"]))

    def _load(self, path: str, version: int, digest: str) -> dict[str, Any]:
        """Take weights in, if they are those that were sent and those of this model."""
        try:
            sent = load_file(path)
        except (OSError, SafetensorError) as error:
            return {"refused": f"{path}: cannot be read ({error})"}
        own = sampled_weights(self._engine.model)
        if weights_digest(sent) != digest:
            return {"refused": f"{path}: the digest of the weights is not that of those that were handed over"}
        if sent.keys() != own.keys():
            return {"refused": f"{path}: the weights are of another model: {sorted(sent.keys() ^ own.keys())[:3]}"}

        def copy() -> None:
            for name, p in own.items():
                p.copy_(sent[name])

        self._engine.switch(version, copy)
        return {"loaded": version, "digest": weights_digest(own)}


# ------------------------------------------------------------------------------------------ what is said


def request_frame(number: int, request: Request) -> dict[str, Any]:
    """A request, as a frame has it."""
    params = {**asdict(request.params), "stop_ids": sorted(request.params.stop_ids)}
    prompt = _packed(np.asarray(request.prompt, np.int32))
    alike = {"seed": request.seed, "samples": request.samples, "goes_on": request.goes_on}
    return {"sample": number, "prompt": prompt, **alike, "params": params}


def read_request(frame: Mapping[str, Any]) -> Request:
    """The request of a frame."""
    given = frame["params"]
    params = SamplingParams(**{**given, "stop_ids": frozenset(given["stop_ids"]), "stop": tuple(given["stop"])})
    alike = {name: frame[name] for name in ("seed", "samples", "goes_on")}
    return Request(prompt=_unpacked(frame["prompt"], np.int32), **alike, params=params)


def answer_frame(written: Completion | SamplerError) -> dict[str, Any]:
    """A completion or why there is none, as a frame has it."""
    if isinstance(written, SamplerError):
        return {"error": str(written)}
    return {
        "tokens": _packed(written.tokens.astype(np.int32)),
        "logprobs": _packed(written.logprobs.astype(np.float32)),
        "version": written.version,
        "ending": written.ending,
        "later": written.later,
    }


def read_answer(frame: Mapping[str, Any]) -> Completion | SamplerError:
    """What a frame of `answer_frame` says."""
    if "error" in frame:
        return SamplerError(frame["error"])
    return Completion(
        tokens=token_ids(_unpacked(frame["tokens"], np.int32)),
        logprobs=_unpacked(frame["logprobs"], np.float32),
        version=frame["version"],
        ending=Ending(frame["ending"]),
        later=tuple((first, version) for first, version in frame["later"]),
    )


def _packed(values: np.ndarray) -> str:
    """An array's bytes, as a frame can have them: a third of what its numbers are as text."""
    return base64.b64encode(values.tobytes()).decode("ascii")


def _unpacked(text: str, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
