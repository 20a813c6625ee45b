"""One rank of the trainer: connects to its driver, and does what it is told until the connection ends."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh

from whet.errors import ConfigError, UserError
from whet.launch.ranks import LEAVE, ONCE, Raised, RankSetup, patient, prove, told_by_launcher
from whet.launch.world import LocalWorld
from whet.models.context import ContextRanks
from whet.models.device import give_memory_back, keep_memory, pick_device
from whet.models.matmul import use_library
from whet.pipeline.stage import Policy
from whet.training.base import Trainer
from whet.training.engine import LocalTrainer
from whet.training.sharded import ShardedTrainer

ABANDONED = 75
"""Exit code where the driver is gone or has given this rank up; a launcher may start it again."""
CONNECT_S = 600.0
"""How long the driver may take to listen: a launcher starts all at once, and the driver looks at the data first."""
GREET_S = 60
"""How long it may take to prove that it is the driver."""
AGAIN_S = 0.5
"""Between two tries."""


class Rank:
    """The trainers of this rank, by the names that the driver gives them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.world = LocalWorld()
        self.trainers: dict[str, ShardedTrainer] = {}
        self.contexts: dict[int, ContextRanks | None] = {1: None}
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
        (give_memory_back if setup.frugal else keep_memory)()
        cuda = pick_device(setup.device).type == "cuda"
        if cuda:  # a launcher may show each rank all GPUs of its machine
            local = os.environ["LOCAL_RANK"] if "LOCAL_RANK" in os.environ else os.environ["SLURM_LOCALID"]
            torch.cuda.set_device(int(local) % torch.cuda.device_count())
        patience = timedelta(seconds=setup.collective_s)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=TCPStore(*setup.store, is_master=False, timeout=patience),
            rank=self.number,
            world_size=setup.world,
            timeout=patience,
        )

    def do_reseed(self, seed: int) -> None:
        """As `World.reseed`."""
        self.world.reseed(seed)

    def do_build(
        self,
        name: str,
        kept: Sequence[str],
        replicate: int,
        context: int,
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
        if context not in self.contexts:
            group, _ = dist.new_subgroups(context, timeout=timedelta(seconds=self.setup.collective_s))
            self.contexts[context] = ContextRanks(group, self.number % context, context)
        self.trainers[name] = ShardedTrainer(local, mesh, context=self.contexts[context], most_tokens=most_tokens)
        about = built.about if isinstance(built, Policy) else ""
        return local.model.max_length, about, local.model.precision


def main() -> None:
    """Serve the driver that the environment names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    number = int(os.environ["RANK"] if "RANK" in os.environ else os.environ["SLURM_PROCID"])
    if number > 0:  # every rank warns of the same things
        warnings.simplefilter("ignore")
        logging.getLogger().setLevel(logging.ERROR)
    connection = _connected(number)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    rank = Rank(number)
    while True:
        command = inbox.get()  # without a deadline: the driver's end is this process's
        try:
            answer = rank.do(*_read(command))
        except UserError as error:
            answer = Raised(error)
        except Exception as error:  # noqa: BLE001  reported with its place; the driver decides
            traceback.print_exc()
            answer = Raised(RuntimeError(f"{type(error).__name__}: {error}"))
        connection.send_bytes(pickle.dumps(answer))  # plain bytes: nothing is shared by descriptors


def _connected(number: int) -> Connection:
    """The connection to the driver, once both have proved that they know the key; leaves where there is none."""
    try:
        told = told_by_launcher()
    except ConfigError as error:
        sys.exit(str(error))
    if told is None:
        sys.exit("WHET_DRIVER is not set; it must be the host:port at which `whet run` listens")
    host, port, key = told
    until = time.monotonic() + (0 if ONCE in sys.argv else CONNECT_S)
    while True:
        try:
            with socket.create_connection((host, port), GREET_S) as taken:
                taken.settimeout(None)
                patient(taken, receive_s=GREET_S, send_s=GREET_S)
                connection = Connection(os.dup(taken.fileno()))
                prove(connection, key, driver=False)
                patient(taken, receive_s=0, send_s=0)
                connection.send(number)
                return connection
        # An assertion fails in `multiprocessing` where what answers is no driver at all.
        except (OSError, EOFError, AuthenticationError, AssertionError) as error:
            if time.monotonic() > until:
                sys.stderr.write(f"trainer rank {number}: no driver at {host}:{port}: {error!r}\n")
                sys.exit(ABANDONED)
        time.sleep(AGAIN_S)


def _read(command: bytes) -> tuple[str, Sequence[Any]]:
    """What a command says. Raises `ConfigError` where it names what is not on this rank."""
    try:
        verb, part = pickle.loads(command)
    except (AttributeError, ImportError) as error:
        raise ConfigError(
            f"machine.trainer: {error}, so the ranks cannot have it; define functions of your own in a module that "
            "PYTHONPATH finds, not in the program that is run"
        ) from error
    return verb, part


def _receive(connection: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    """Commands into the inbox; once the driver is gone, so is this process, whatever it is doing."""
    try:
        while True:
            command = connection.recv_bytes()
            if command == LEAVE:
                os._exit(0)  # at once: the connection ends next, which must not be taken for the driver's death
            inbox.put(command)
    except (EOFError, OSError):
        os._exit(ABANDONED)


if __name__ == "__main__":
    main()
