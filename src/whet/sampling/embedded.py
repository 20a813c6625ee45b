"""The embedded sampler: an engine in this process, over the trainer's own weights."""

from __future__ import annotations

from whet.models.language import LanguageModel
from whet.sampling.base import Driver
from whet.sampling.engine import Engine
from whet.sampling.tickets import Ticket


class EmbeddedSampler(Driver[Ticket]):
    """`PolicySampler` over a model in this process. Its weights are the trainer's: there is no copy to hand over."""

    engine: Engine

    def __init__(self, model: LanguageModel, *, max_running: int = 256, cache_gib: float = 4.0) -> None:
        """At most so many rows side by side, and no more than whose keys and values fit; one always runs."""
        engine = Engine(model, max_running=max_running, cache_bytes=int(cache_gib * 2**30))
        super().__init__("the sampling engine", engine)
