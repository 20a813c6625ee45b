"""The trainer's ranks as Ray actors: a room of `RankGroup` that differs in who starts the processes, and where.

An actor holds one GPU of a placement group (`PACK`: as few machines as can be) and runs `whet.launch.rank`, which
connects to the driver and serves it as anywhere else. So deadlines, failures and what a rank does are those of `Ranks`;
Ray places, and says how an actor ended. It joins the cluster of `RAY_ADDRESS`, or starts one on this machine.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from whet.config import MachineConfig
from whet.errors import RunError
from whet.launch.ranks import PACKAGE_ROOT, Raised, Ranks, RankSetup


class RankActor:
    """One rank; its process is the actor's child, and ends with it."""

    def serve(self, environment: dict[str, str]) -> int:
        """Until the run is over. Returns the exit code."""
        ends_with_parent = "import ctypes,runpy,signal; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
        code = ends_with_parent + "runpy.run_module('whet.launch.rank', run_name='__main__')"
        command = [sys.executable, "-P", "-c", code]
        return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


class RayRanks(Ranks):
    """`RankGroup` over Ray actors."""

    def __init__(self, machine: MachineConfig, setup: RankSetup) -> None:
        """Joins the cluster, or starts one of this machine."""
        super().__init__(machine, setup)
        self._served: list[Any] = []
        self._actors: list[Any] = []
        self._placed: Any = None

    def start(self, deadline_s: float) -> None:
        """`RankGroup`."""
        if self._connections:
            return
        if not ray.is_initialized():
            ray.init(log_to_driver=True, include_dashboard=False)
        wanted, there = self.setup.device, ray.cluster_resources().get("GPU", 0)
        cuda = wanted == "cuda" or (wanted == "auto" and there >= self.ranks)
        bundle = {"CPU": 1, "GPU": 1} if cuda else {"CPU": 1}
        self._placed = placement_group([bundle] * self.ranks, strategy="PACK")
        try:
            ray.get(self._placed.ready(), timeout=deadline_s)
        except ray.exceptions.GetTimeoutError as error:
            self._abandon()
            raise RunError(
                f"Ray found no place for {self.ranks} ranks of {bundle} in {deadline_s:.0f} s, and its cluster has "
                f"{ray.cluster_resources()}; lower machine.trainer, or raise machine.deadlines.start_s"
            ) from error
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        os.environ |= {"WHET_DRIVER": f"{ray.util.get_node_ip_address()}:{port}", "WHET_KEY": secrets.token_hex(32)}
        told = {name: os.environ[name] for name in ("WHET_DRIVER", "WHET_KEY")}
        kind = ray.remote(num_cpus=1, num_gpus=bundle.get("GPU", 0), max_restarts=0, max_task_retries=0)(RankActor)
        path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        for rank in range(self.ranks):
            place = PlacementGroupSchedulingStrategy(self._placed, placement_group_bundle_index=rank)
            actor = kind.options(scheduling_strategy=place).remote()
            own = {"RANK": str(rank), "LOCAL_RANK": "0", "PYTHONPATH": path, "OMP_NUM_THREADS": str(self.setup.threads)}
            self._actors.append(actor)
            self._served.append(actor.serve.remote({**told, **own}))
        super().start(deadline_s)

    def _died(self, rank: int) -> Raised:
        """With what Ray says of it."""
        done, _ = ray.wait([self._served[rank]], timeout=5)
        try:
            how = f"left (code {ray.get(done[0])})" if done else "lost its connection"
        except ray.exceptions.RayError as error:
            how = str(error)
        return Raised(ConnectionError(how))

    def _abandon(self) -> None:
        super()._abandon()
        for actor in self._actors:
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)
        if self._placed is not None:
            remove_placement_group(self._placed)
        for name in ("WHET_DRIVER", "WHET_KEY"):
            os.environ.pop(name, None)
        self._actors, self._served, self._placed = [], [], None
