"""The embedded sampler: an engine in this process, over the trainer's own weights."""

from __future__ import annotations

from whet.errors import SamplerError
from whet.models.language import LanguageModel
from whet.records import Completion
from whet.sampling.base import Request
from whet.sampling.bridge import Driver
from whet.sampling.engine import Engine


class EmbeddedSampler:
    """`TokenSampler` over a model in this process. Its weights are the trainer's: there is no copy to hand over."""

    def __init__(self, model: LanguageModel, *, max_running: int = 256, cache_gib: float = 4.0) -> None:
        """At most so many rows side by side, and no more than whose keys and values fit; one always runs."""
        self.model = model
        self.engine = Engine(model, max_running=max_running, cache_bytes=int(cache_gib * 2**30))
        self._driver = Driver("the sampling engine", self.engine)

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.engine.version

    def publish(self, version: int) -> None:
        """Take note that the shared weights are now of this version. `SamplerError` while requests are running."""
        if self.engine.busy:
            raise SamplerError(f"weights of version {version} were published while requests are running; await them")
        self.engine.clear()
        self.engine.version = version

    async def sample(self, request: Request) -> Completion:
        """`TokenSampler`."""
        return await self._driver.sample(request)
