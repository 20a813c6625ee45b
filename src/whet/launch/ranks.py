"""The trainer's ranks as processes: started here, or anywhere by a launcher, and all of them told what to do by one.

A rank connects to its driver over TCP, both prove that they know the run's key, and from then on it obeys commands. It
dies with the connection, so a driver that is killed leaves no process behind. Ranks find one another through a store
in the driver.

    python -m whet.launch.rank      WHET_DRIVER=host:port WHET_KEY=hex, and RANK and LOCAL_RANK of torchrun or Slurm
"""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import Any, Literal

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from whet.config import MachineConfig
from whet.errors import ConfigError, RunError, UserError
from whet.models.device import pick_device
from whet.training.group import GroupFailure, RankOutOfMemory

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
GRACE_S = 3.0
"""After a first failure: how long others may still tell theirs, since the one that is to blame may not be the first."""
GREET_S = 10
"""How long whatever connects may take to prove that it is a rank."""
STOP_S = 5.0
"""How long a rank may take to leave."""
LEAVE = b"leave"
"""To a rank: the run is over, and a launcher need not start it again."""
ONCE = "--once"
"""To a rank that is started here: who does not listen now is gone."""
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""A machine that is gone says nothing; two minutes later its connections are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSetup:
    """What every rank is told once."""

    world: int
    store: tuple[str, int]
    """Where torch's store is: host and port."""
    device: Literal["auto", "cpu", "cuda"]
    """Of the recipe's model: each rank looks at its own machine, which may be another than the driver's."""
    threads: int
    products: str
    """The library that multiplies (`models.matmul`): sums of another one differ in the last bit."""
    frugal: bool
    collective_s: float


@dataclass(frozen=True, slots=True)
class Raised:
    """What a rank answers where a command failed."""

    error: Exception


class Ranks:
    """`RankGroup` over processes; on one node they are started here."""

    def __init__(self, machine: MachineConfig, setup: RankSetup) -> None:
        """`setup.store` is filled in at the start. The driver listens where `WHET_DRIVER` says, else on a free port."""
        self.machine, self.setup = machine, setup
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._store: TCPStore | None = None

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.machine.trainer.ranks

    def start(self, deadline_s: float) -> None:
        """Start them, or wait for those that a launcher started; where they run, nothing is done."""
        if self._connections:
            return
        began = time.monotonic()
        told = told_by_launcher()
        host, port, key = told or ("127.0.0.1", 0, secrets.token_bytes(32))
        where = host if host == "127.0.0.1" else ""
        try:
            with _listening(where, port, self.ranks) as server:
                self._store = _store(host, where)
                if told is None:
                    self._spawn(f"{host}:{server.getsockname()[1]}", key)
                self._connections = self._accepted(server, key, began, deadline_s)
            store = (host, self._store.port)
            left_s = max(1.0, began + deadline_s - time.monotonic())
            self.call("setup", [(replace(self.setup, store=store),)] * self.ranks, left_s)
        except BaseException:
            self._abandon()
            raise

    def call(self, verb: str, parts: Sequence[Sequence[Any]], deadline_s: float) -> list[Any]:
        """`RankGroup`."""
        assert len(parts) == self.ranks, "a part for each rank"
        began, shown = time.monotonic(), getattr(parts[0][1], "__name__", parts[0][1]) if verb == "trainer" else verb
        messages, found = [_pickled(verb, part) for part in parts], dict[int, Any]()
        try:
            for rank, (connection, message) in enumerate(zip(self._connections, messages, strict=True)):
                try:
                    connection.send_bytes(message)
                except BlockingIOError:
                    found[rank] = Raised(ConnectionError("takes no commands (machine.deadlines.progress_s)"))
                except OSError:
                    found[rank] = self._died(rank)
            self._collect(found, began, deadline_s)
            failed = {rank: answer for rank, answer in found.items() if isinstance(answer, Raised)}
            if failed or len(found) < self.ranks:
                raise self._failure(failed, found, shown, time.monotonic() - began)
        except BaseException:
            self._abandon()
            raise
        return [found[rank] for rank in range(self.ranks)]

    def stop(self) -> None:
        """`RankGroup`."""
        for connection in self._connections:
            with suppress(OSError):
                connection.send_bytes(LEAVE)
        self._abandon()

    def _abandon(self) -> None:
        """Close the connections, which ends every rank, and see that none is left."""
        for connection in self._connections:
            connection.close()
        until = time.monotonic() + STOP_S
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._connections, self._processes, self._store = [], [], None

    # --------------------------------------------------------------------------------------------- starting

    def _spawn(self, driver: str, key: bytes) -> None:
        path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        cuda = pick_device(self.setup.device).type == "cuda"
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if cuda else []
        for rank in range(self.ranks):
            own = {"WHET_DRIVER": driver, "WHET_KEY": key.hex(), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            own |= {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": LOOPBACK, "OMP_NUM_THREADS": str(self.setup.threads)}
            own |= {"CUDA_VISIBLE_DEVICES": shown[rank] if any(shown) else str(rank)} if cuda else {}
            command = [sys.executable, "-P", "-m", "whet.launch.rank", ONCE]
            # A session of its own: Ctrl-C is the driver's. What it prints must not be taken for the driver's result.
            self._processes.append(
                subprocess.Popen(
                    command, env={**os.environ, **own}, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
                )
            )

    def _accepted(self, server: socket.socket, key: bytes, began: float, deadline_s: float) -> list[Connection]:
        """The connections of all ranks, in their order."""
        found: dict[int, Connection] = {}
        server.settimeout(0.2)
        while len(found) < self.ranks:
            missing = next(rank for rank in range(self.ranks) if rank not in found)
            since = time.monotonic() - began
            for rank, process in enumerate(self._processes):
                if rank not in found and process.poll() is not None:
                    raise GroupFailure(rank, "start", since, f"ended with code {process.returncode}")
            if since > deadline_s:
                raise GroupFailure(missing, "start", since, "never connected (machine.deadlines.start_s)")
            with suppress(TimeoutError, OSError, EOFError, AuthenticationError):  # a stranger is left alone
                rank, connection = _greeted(server.accept()[0], key, self.machine.deadlines.progress_s)
                if not 0 <= rank < self.ranks:
                    connection.close()
                    raise RunError(f"a rank {rank} connected, and machine.trainer has {self.ranks}; start that many")
                found[rank] = connection
        return [found[rank] for rank in range(self.ranks)]

    # ---------------------------------------------------------------------------------------------- answers

    def _collect(self, found: dict[int, Any], began: float, deadline_s: float) -> None:
        """Answers until all are there, the deadline has passed, or a failure's grace."""
        until = began + deadline_s
        while len(found) < self.ranks:
            if any(isinstance(answer, Raised) for answer in found.values()):
                until = min(until, time.monotonic() + GRACE_S)
            waited = {self._connections[rank]: rank for rank in range(self.ranks) if rank not in found}
            ready = wait(list(waited), max(0.0, until - time.monotonic()))
            if not ready:
                return
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waited[connection]
                try:
                    found[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    found[rank] = self._died(rank)

    def _died(self, rank: int) -> Raised:
        code = None
        if rank < len(self._processes):
            with suppress(subprocess.TimeoutExpired):
                code = self._processes[rank].wait(STOP_S)
        how = "lost its connection" if code is None else f"died (signal {-code})" if code < 0 else f"left (code {code})"
        return Raised(ConnectionError(how))

    def _failure(self, failed: dict[int, Raised], found: dict[int, Any], verb: str, since_s: float) -> Exception:
        """Who is to blame: who died, before whose memory ran out, before who failed, before who is silent.

        An error of the user's is all ranks' alike and stays what it is.
        """
        for rank, raised in failed.items():
            if isinstance(raised.error, ConnectionError):
                return GroupFailure(rank, verb, since_s, str(raised.error))
        for rank, raised in failed.items():
            if isinstance(raised.error, RankOutOfMemory):
                most = raised.error.tokens
                return GroupFailure(rank, verb, since_s, str(raised.error), most_tokens=most)
        for rank, raised in failed.items():
            if isinstance(raised.error, UserError):
                return raised.error
            return GroupFailure(rank, verb, since_s, str(raised.error))
        silent = next(rank for rank in range(self.ranks) if rank not in found)
        return GroupFailure(silent, verb, since_s, "no answer (machine.deadlines.progress_s)")


def told_by_launcher() -> tuple[str, int, bytes] | None:
    """Host and port of the driver, and the run's key, where a launcher starts the ranks. Raises `ConfigError`."""
    if "WHET_DRIVER" not in os.environ:
        return None
    host, _, port = os.environ["WHET_DRIVER"].rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"WHET_DRIVER is {os.environ['WHET_DRIVER']!r}; it must be host:port, the same for all ranks")
    try:
        key = bytes.fromhex(os.environ.get("WHET_KEY", ""))
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError("WHET_KEY must be 64 hex digits, the same for `whet run` and all ranks: openssl rand -hex 32")
    return host, int(port), key


def prove(connection: Connection, key: bytes, *, driver: bool) -> None:
    """Both sides prove that they know the key, the rank first; raises where the other one does not.

    Each proves it for its own part, so that what a rank answers is of no use to an impostor of the driver.
    """
    rank_key, driver_key = key + b"rank", key + b"driver"
    if driver:
        deliver_challenge(connection, rank_key)
        answer_challenge(connection, driver_key)
    else:
        answer_challenge(connection, rank_key)
        deliver_challenge(connection, driver_key)


def patient(taken: socket.socket, *, receive_s: float, send_s: float) -> None:
    """How long one read and one write may be stuck (0: for ever), and that a peer is gone whose machine is."""
    for what, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        whole = int(seconds)
        taken.setsockopt(socket.SOL_SOCKET, what, struct.pack("ll", whole, int((seconds - whole) * 1e6)))
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            taken.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listening(where: str, port: int, ranks: int) -> socket.socket:
    try:
        return socket.create_server((where, port), backlog=ranks)
    except OSError as error:
        raise RunError(
            f"port {port}, where ranks are to find this run: {error.strerror}; another run may listen there: choose "
            "another port in WHET_DRIVER"
        ) from error


def _store(host: str, where: str) -> TCPStore:
    """Torch's store, which listens at that address alone: it authenticates no client."""
    listening = socket.create_server((where, 0))
    port = listening.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def _greeted(taken: socket.socket, key: bytes, stuck_s: float) -> tuple[int, Connection]:
    """The rank that connected, once both have proved that they know the key; raises what a stranger's answer raises.

    From then on no read or write of a part may be stuck longer than `stuck_s`.
    """
    with taken:
        patient(taken, receive_s=GREET_S, send_s=GREET_S)
        connection = Connection(os.dup(taken.fileno()))
        try:
            prove(connection, key, driver=True)
            rank = int(connection.recv())
        except BaseException:
            connection.close()
            raise
        patient(taken, receive_s=stuck_s, send_s=stuck_s)
        return rank, connection


def _pickled(verb: str, part: Sequence[Any]) -> bytes:
    try:
        return pickle.dumps((verb, part), protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"machine.trainer: {error}, so it cannot be sent to other processes; define functions of your own at the "
            "top of a module"
        ) from error
