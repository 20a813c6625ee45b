"""One rank of the trainer: connects to its driver, and does what it is told until the connection ends."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh

from whet.errors import UserError
from whet.launch.ranks import Raised, RankSetup
from whet.launch.world import LocalWorld
from whet.models.device import give_memory_back
from whet.models.matmul import use_library
from whet.pipeline.stage import Policy
from whet.training.base import Trainer
from whet.training.engine import LocalTrainer
from whet.training.sharded import ShardedTrainer

ABANDONED = 75
"""Exit code where the driver is gone or has given this rank up; a launcher may start it again."""
CONNECT_S = 60.0
"""How long the driver may take to accept."""


class Rank:
    """The trainers of this rank, by the names that the driver gives them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.world = LocalWorld()
        self.trainers: dict[str, ShardedTrainer] = {}
        self.setup: RankSetup

    def do(self, verb: str, part: Sequence[Any]) -> Any:
        """One command."""
        if verb != "trainer":
            return getattr(self, f"do_{verb}")(*part)
        name, method, *arguments = part
        keys = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
        trainer = self.trainers[name]
        work = partial(method, trainer) if callable(method) else getattr(trainer, method)
        return work(*arguments, **keys)

    def do_setup(self, setup: RankSetup) -> None:
        """Join the other ranks."""
        self.setup = setup
        torch.set_num_threads(setup.threads)
        use_library(setup.products)  # type: ignore[arg-type]
        if setup.frugal:
            give_memory_back()
        if setup.cuda:  # a launcher may show each rank all GPUs of its machine
            local = os.environ["LOCAL_RANK"] if "LOCAL_RANK" in os.environ else os.environ["SLURM_LOCALID"]
            torch.cuda.set_device(int(local) % torch.cuda.device_count())
        patience = timedelta(seconds=setup.collective_s)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if setup.cuda else "gloo",
            store=TCPStore(*setup.store, is_master=False, timeout=patience),
            rank=self.number,
            world_size=setup.world,
            timeout=patience,
        )

    def do_leave(self) -> None:
        """The run is over."""
        os._exit(0)

    def do_reseed(self, seed: int) -> None:
        """As `World.reseed`."""
        self.world.reseed(seed)

    def do_build(
        self,
        name: str,
        kept: Sequence[str],
        replicate: int,
        most_tokens: int | None,
        build: Callable[..., Policy | Trainer],
        arguments: Sequence[Any],
        keys: Mapping[str, Any],
    ) -> tuple[int, str, str]:
        """Build a trainer by a method of `LocalWorld`, and spread it; those that are not `kept` go.

        Returns the longest row, how it computes, and in what precision.
        """
        self.trainers = {each: trainer for each, trainer in self.trainers.items() if each in kept}
        built = build(self.world, *arguments, **keys)
        local = built.trainer if isinstance(built, Policy) else built
        assert isinstance(local, LocalTrainer)
        shape = (replicate, self.setup.world // replicate) if replicate > 1 else (self.setup.world,)
        names = ("replicate", "shard") if replicate > 1 else ("shard",)
        mesh = init_device_mesh(local.model.device.type, shape, mesh_dim_names=names)
        self.trainers[name] = ShardedTrainer(local, mesh, most_tokens=most_tokens)
        about = built.about if isinstance(built, Policy) else ""
        return local.model.max_length, about, local.model.precision


def main() -> None:
    """Serve the driver that the environment names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    number = int(os.environ["RANK"] if "RANK" in os.environ else os.environ["SLURM_PROCID"])
    if number > 0:  # every rank warns of the same things
        warnings.simplefilter("ignore")
        logging.getLogger().setLevel(logging.ERROR)
    host, _, port = os.environ["WHET_DRIVER"].rpartition(":")
    taken = socket.create_connection((host, int(port)), CONNECT_S)
    taken.settimeout(None)
    connection = Connection(taken.detach())
    key = bytes.fromhex(os.environ["WHET_KEY"])
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    connection.send(number)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    rank = Rank(number)
    while True:
        command = inbox.get()  # without a deadline: the driver's end is this process's
        try:
            answer = rank.do(*pickle.loads(command))
        except UserError as error:
            answer = Raised(error)
        except Exception as error:  # noqa: BLE001  reported with its place; the driver decides
            traceback.print_exc()
            answer = Raised(RuntimeError(f"{type(error).__name__}: {error}"))
        connection.send_bytes(pickle.dumps(answer))  # plain bytes: nothing is shared by descriptors


def _receive(connection: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    """Commands into the inbox; once the driver is gone, so is this process, whatever it is doing."""
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(ABANDONED)


if __name__ == "__main__":
    main()
