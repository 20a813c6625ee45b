"""Several engines in processes of their own, behind the door of one sampler.

A request goes to the replica that its prompt points to, so that equal prompts meet, or to one with less to do. What a
dead replica owed is asked of another one with the same seed. Weights go as files, and a replica counts as having them
when it has confirmed their digest, and a probe has the log-probabilities of the trainer's own forward pass at the same
version: that difference is the engine's, whatever the lag of the rollouts.

    restarting -> stale -> healthy <-> suspect -> dead -> restarting ...

A new process is stale until it has weights. One that owes something and is silent for half of `request_s` is suspect
and gets nothing new, for all of it dead. When more have died than may be started again (`STEADY_VERSIONS`
hand-overs without a death give all restarts back), `SamplersLost` ends the run.

By default all replicas take each version at once, in the middle of what they write. With `past` they keep to the
version that a request names (`Request.version`), the oldest first: each takes it when it has nothing left to do, and
then its share of the requests. The files of so many past versions are kept.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from safetensors.torch import save_file

from whet.config import MachineConfig
from whet.errors import SamplerError, SamplersLost
from whet.files import read_json, write_json, writing
from whet.models.language import LanguageModel
from whet.records import Completion
from whet.sampling.base import LoopThread, Request, run
from whet.sampling.embedded import EmbeddedSampler
from whet.sampling.process import LostReplica, Replica, ReplicaState, Spawner
from whet.sampling.weight_sync import PROBE_TOLERANCE, Probe, probe_of, probe_request, sampled_weights, weights_digest
from whet.sandbox.base import JSON

ATTEMPTS = 3
"""Replicas that may die with a request before it is given up."""
AHEAD = 8
"""Requests that the replica which a prompt points to may have more than the one with the fewest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A version of the weights that can be handed over."""

    path: Path
    digest: str
    probe: Probe


class Queue(Protocol):
    """An engine that can be asked, with what it owes."""

    number: int

    @property
    def owed(self) -> Sized:
        """What it was asked and has not answered."""


Q = TypeVar("Q", bound=Queue)


class Fleet:
    """`PolicySampler` over `machine.samplers.replicas` processes, which begin to start at once."""

    def __init__(
        self,
        model: LanguageModel,
        machine: MachineConfig,
        options: Mapping[str, JSON],
        folder: Path,
        *,
        past: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`model` has the trainer's weights, which go through files in `folder`; what is there is removed.

        `options` are those of `sampling.replica.load`. `say` hears of deaths.
        """
        self.model, self.version = model, -1
        self._patience, self._past, self._say = machine.deadlines, past, say
        self._own = EmbeddedSampler(model, max_running=1)
        self.gaps: dict[int, float] = {}  # of each version, the largest of the replicas
        self._held: dict[int, Held] = {}
        self._wanted: Counter[int] = Counter()
        self._change = asyncio.Event()
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._spawner = Spawner(options, folder / "printed", machine.deadlines.start_s)
        self.replicas = [Replica(number, machine.restarts.sampler) for number in range(machine.samplers.replicas)]
        self._keeper = ThreadPoolExecutor(1, "whet-fleet-keeper")  # processes die with the thread that started them
        self._thread = LoopThread("whet-fleet")
        for replica in self.replicas:
            self._thread.begin(self._live(replica))

    # ------------------------------------------------------------------------------- from any thread

    async def sample(self, request: Request) -> Completion:
        """`TokenSampler`. Raises `SamplersLost` where there are too few replicas, or none is to be had in time."""
        return await asyncio.wrap_future(self._thread.begin(self._sample(request)))

    def publish(self, version: int) -> None:
        """`PolicySampler`: write the weights, and (but with `past`) wait until all that live have confirmed them."""
        weights = {name: p.detach().to("cpu").contiguous() for name, p in sampled_weights(self.model).items()}
        path = self._folder / f"version-{version}.safetensors"
        with writing(path, sum(tensor.nbytes for tensor in weights.values())):
            save_file(weights, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        probe = run(probe_of(self._own, self.model))
        held = Held(path=path, digest=weights_digest(weights), probe=probe)
        self._thread.begin(self._adopt(version, held)).result()

    def save(self, folder: Path) -> None:
        """`ApartSampler`: the past versions, and all gaps."""
        known: dict[str, Any] = {}
        for version, held in self._held.items():
            if version != self.version:
                _link(held.path, folder / held.path.name)
                probe = {"tokens": held.probe.tokens, "logps": held.probe.logps}
                known[str(version)] = {"digest": held.digest, **probe}
        write_json(folder / "versions.json", {"held": known, "gaps": self.gaps})

    def load(self, folder: Path) -> None:
        """`ApartSampler`: have what `save` kept."""
        saved = read_json(folder / "versions.json")
        self.gaps = {int(version): gap for version, gap in saved["gaps"].items()}
        for version, known in saved["held"].items():
            path = self._folder / f"version-{version}.safetensors"
            _link(folder / path.name, path)
            probe = Probe(request=probe_request(self.model), tokens=known["tokens"], logps=known["logps"])
            self._held[int(version)] = Held(path=path, digest=known["digest"], probe=probe)

    def describe(self) -> str:
        """`ApartSampler`."""
        return "; ".join(each.describe() for each in self.replicas)

    def close(self) -> None:
        """End all processes."""
        self._thread.close()
        for replica in self.replicas:
            replica.kill("the fleet was closed")
        self._spawner.close()
        self._keeper.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------------------------- in the fleet's loop

    async def _sample(self, request: Request) -> Completion:
        why = ""
        for _ in range(ATTEMPTS):
            try:
                return await (await self._choose(request)).ask(request)
            except LostReplica as lost:
                why = str(lost)
            except asyncio.CancelledError:  # others may have waited for its version, or for its replica to be idle
                self._changed()
                raise
        raise SamplerError(f"{ATTEMPTS} samplers died with this request; the last one: {why}")

    async def _choose(self, request: Request) -> Replica:
        """A replica for the request, now or when there is one."""
        since = time.monotonic()
        while True:
            wanted = self.version if request.version is None else request.version  # the newest, which others become
            self._wanted[wanted] += 1
            try:
                if wanted not in self._held:
                    raise SamplerError(f"weights of version {wanted} are not kept; there are {sorted(self._held)}")
                if all(each.gone for each in self.replicas):
                    raise SamplersLost(f"no sampler is left: {self.describe()}; raise machine.restarts.sampler")
                if (found := self._ready(request, wanted)) is not None:
                    return found
                if wanted != min(self._wanted) or self._having(wanted):  # others are served before it
                    since = time.monotonic()
                left = since + self._patience.request_s + self._patience.start_s - time.monotonic()
                if left <= 0:
                    waited = time.monotonic() - since
                    raise SamplersLost(f"a request waits for a sampler since {waited:.0f} s: {self.describe()}")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._change.wait(), left)
            finally:
                self._wanted[wanted] -= 1
                self._wanted += Counter()  # without those that nothing waits for

    def _ready(self, request: Request, wanted: int) -> Replica | None:
        """The one to ask; with `past` idle ones are sent for the weights, for those who have waited longest."""
        healthy = [each for each in self.replicas if each.health is ReplicaState.HEALTHY]
        if self._past is None:
            return routed(healthy, request)
        if wanted != min(self._wanted):
            return None
        for idle in (each for each in healthy if each.version != wanted and not each.owed):
            idle.be(ReplicaState.STALE)
            idle.renewing = asyncio.ensure_future(self._renew(idle, wanted))
        having = self._having(wanted)
        work = self._wanted[wanted] + sum(len(each.owed) for each in having)
        share = -(-work // sum(each.can_take_weights for each in self.replicas)) if having else 0
        return routed([each for each in having if len(each.owed) < share], request)

    def _having(self, version: int) -> list[Replica]:
        """The replicas that can be asked for this version."""
        return [each for each in self.replicas if each.health is ReplicaState.HEALTHY and each.version == version]

    async def _adopt(self, version: int, held: Held) -> None:
        """Know a version as the newest, hand it over, and forget those that are too old."""
        self._held[version], self.version = held, version
        if self._past is None:
            await asyncio.gather(*(self._renew(each, version) for each in self.replicas if each.can_take_weights))
        oldest = version - (self._past or 0)
        for old in [old for old in self._held if not oldest <= old <= version]:
            if self._held[old].path != held.path:
                self._held[old].path.unlink(missing_ok=True)
            del self._held[old]
        self._changed()

    async def _renew(self, replica: Replica, version: int) -> None:
        """Give a replica the weights of a version, and compare its probe; else it is dead."""
        async with replica.lock:
            limit = self._patience.hand_over_s
            if version not in self._held:  # it is too old by now
                version = self.version
            held = self._held[version]
            try:
                async with asyncio.timeout(limit):
                    replica.owes = f"weights of version {version}"
                    said = await replica.load(held.path, version, held.digest)
                    if said.get("digest") != held.digest:
                        raise LostReplica(said.get("refused", "it holds other weights than it was given"))
                    replica.owes = f"the probe of version {version}"
                    gaps = held.probe.gaps(await replica.ask(held.probe.request))
                if not gaps.max() <= PROBE_TOLERANCE[self.model.compute]:
                    raise LostReplica(f"its log-probabilities are off by {gaps.max():.3g} on a probe of {version}")
            except TimeoutError:
                replica.kill(f"owes {replica.owes} for {limit:g} s")
            except (LostReplica, SamplerError) as error:
                if replica.can_take_weights:  # else it died of something else, and another process is on its way
                    replica.kill(str(error))
            else:
                self.gaps[version] = max(self.gaps.get(version, 0.0), float(gaps.mean()))
                replica.confirm(version)
            self._changed()

    async def _live(self, replica: Replica) -> None:
        """Start a replica, listen until it dies, and start it again, as often as that is allowed."""
        loop = asyncio.get_running_loop()
        while not replica.gone:
            try:
                replica.be(ReplicaState.RESTARTING)
                replica.obituary = ""
                async with asyncio.timeout(self._patience.start_s):
                    channel = await loop.run_in_executor(self._keeper, self._spawner.start)
                    await replica.greet(channel)
                replica.be(ReplicaState.STALE)
                if self.version >= 0:
                    replica.renewing = asyncio.ensure_future(self._renew(replica, self.version))
                await replica.listen(self._patience.request_s, self._changed)
            except TimeoutError:
                replica.kill(f"did not start within {self._patience.start_s:g} s")
            except OSError as error:
                replica.kill(f"could not be started: {error}")
            replica.bury(self._spawner.last_words())
            self._say(f"{replica.name} died: {replica.obituary}; {replica.restarts} restarts left")
            self._changed()

    def _changed(self) -> None:
        """Let those who wait look again."""
        self._change.set()
        self._change = asyncio.Event()


def routed(engines: Iterable[Q], request: Request) -> Q | None:
    """Where the prompt points to, as long as that one has not much more to do than another."""
    among = sorted(engines, key=lambda each: each.number)
    if not among:
        return None
    place = zlib.crc32(np.asarray(request.prompt, np.int32).tobytes()) % len(among)
    idlest = min(among, key=lambda each: len(each.owed))
    return among[place] if len(among[place].owed) <= len(idlest.owed) + AHEAD else idlest


def _link(source: Path, target: Path) -> None:
    """The file under another name; on another file system a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
