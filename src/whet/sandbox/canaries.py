"""What a sandbox keeps programs from, found by trying: a program that attacks runs in it, and reports its success."""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from whet.errors import SandboxError
from whet.sandbox.base import Limits, ProgramOutcome, Status

_ATTACKS = """
import ctypes, json, os, socket, sys

told = json.load(sys.stdin)

def reading_files():
    return open(told["secret"]).read() == told["word"]

def writing_files():
    return open(told["target"], "w").write("x")

def reaching_the_network():
    return socket.create_connection(("127.0.0.1", told["port"]), 2)

def starting_processes():
    return os.fork() or os._exit(0)

def signalling_processes():
    return os.kill(told["pid"], 0) is None

def reading_processes():
    return told["word"] in open(f"/proc/{told['pid']}/environ").read() or open(f"/proc/{told['pid']}/mem", "rb")

def gaining_rights():
    return ctypes.CDLL(None).unshare(0x10000000) == 0

def using_more_memory():
    return bytearray(told["memory_mb"] << 21)

got = {}
for attack in (reading_files, writing_files, reaching_the_network, starting_processes, signalling_processes,
               reading_processes, gaining_rights, using_more_memory):
    try:
        got[attack.__name__.replace("_", " ")] = bool(attack())
    except BaseException:
        got[attack.__name__.replace("_", " ")] = False
print(json.dumps(got))
"""
MEANT = {"agentic": ["starting processes"]}
"""What a profile lets programs do on purpose."""


def try_out(run: Callable[[str, Mapping[str, bytes], bytes, Limits], ProgramOutcome]) -> dict[str, bool]:
    """Each protection by name, and whether it held. Raises `SandboxError` where the attacks could not be run."""
    limits = Limits(memory_mb=512)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)
        told = {"secret": f"{folder}/secret", "target": f"{folder}/target", "word": secrets.token_hex(8)}
        Path(told["secret"]).write_text(told["word"])
        os.chmod(told["secret"], 0o644)
        facts = {**told, "port": server.getsockname()[1], "pid": os.getpid(), "memory_mb": limits.memory_mb}
        outcome = run(_ATTACKS, {}, json.dumps(facts).encode(), limits)
        written = Path(told["target"]).exists()
    if outcome.status is not Status.FINISHED:
        raise SandboxError(outcome.note or outcome.stderr.strip().rpartition("\n")[2] or outcome.status.value)
    try:
        got: dict[str, bool] = json.loads(outcome.stdout)
    except ValueError as error:
        raise SandboxError(f"its programs do not run as they should: {outcome.stdout[:80]!r}") from error
    return {name: not came for name, came in {**got, "writing files": got["writing files"] or written}.items()}


def unheld(profile: str, protections: dict[str, bool]) -> list[str]:
    """What the profile promises to keep programs from, and does not."""
    if profile == "minimal":
        return []
    return [name for name, held in protections.items() if not held and name not in MEANT.get(profile, [])]


def summary(protections: Mapping[str, bool]) -> str:
    """`tried and stopped: reading files, ...; not stopped: ...`."""
    lost = [name for name, held in protections.items() if not held]
    held = [name for name in protections if name not in lost]
    return f"tried and stopped: {', '.join(held) or 'nothing'}" + (f"; not stopped: {', '.join(lost)}" if lost else "")
