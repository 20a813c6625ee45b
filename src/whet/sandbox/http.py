"""Programs on a server that speaks SandboxFusion's protocol, and the choice between it and this machine."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from whet.errors import SandboxError
from whet.sandbox.base import USUAL, Limits, ProgramOutcome, ProgramSession, Sandbox, Status
from whet.sandbox.canaries import summary, try_out
from whet.sandbox.programs import CONTROL, LocalSandbox, settle

GRACE_S = 30.0
"""Beyond a program's own deadline: for the queue of the server, and the way."""
ENDED = {"Finished": Status.FINISHED, "TimeLimitExceeded": Status.TIMEOUT, "Error": Status.EXITED}


def open_sandbox(place: str) -> Sandbox:
    """The sandbox of a profile's name or of a server's address. Raises `SandboxError`."""
    return HTTPSandbox(place) if place.startswith(("http://", "https://")) else LocalSandbox(place)


class HTTPSandbox:
    """`POST {url}/run_code`. The server confines the programs; the attacks that are tried concern this machine."""

    def __init__(self, url: str, *, workers: int = 16) -> None:
        self._url = url.rstrip("/") + "/run_code"
        self._client = httpx.Client(limits=httpx.Limits(max_connections=workers))
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="whet-sandbox")
        try:
            self.protections: Mapping[str, bool] = try_out(self._once)
        except SandboxError as error:
            self.close()
            raise SandboxError(f"sandbox {url}: {error}; start the server, or use auto") from error

    def describe(self) -> str:
        """What of this machine its programs do not reach."""
        return f"sandbox {self._url}: {summary(self.protections)} (of this machine; its own is its affair)"

    async def run(
        self, program: str, files: Mapping[str, bytes] = {}, stdin: bytes = b"", limits: Limits = USUAL
    ) -> ProgramOutcome:
        """Run it to its end."""
        return await asyncio.wrap_future(self._threads.submit(self._run, program, files, stdin, limits))

    async def open(self, program: str, files: Mapping[str, bytes] = {}, limits: Limits = USUAL) -> ProgramSession:
        """There are none."""
        raise SandboxError(f"sandbox {self._url}: the protocol has no sessions; use a profile of this machine")

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown()
        self._client.close()

    def _run(self, program: str, files: Mapping[str, bytes], stdin: bytes, limits: Limits) -> ProgramOutcome:
        asked = (program, files, stdin, limits)
        return settle(self._once(*asked), lambda: self._once(*asked), lambda: self._once(CONTROL, {}, b"", USUAL))

    def _once(self, program: str, files: Mapping[str, bytes], stdin: bytes, limits: Limits) -> ProgramOutcome:
        body = {
            "code": program,
            "language": "python",
            "stdin": stdin.decode(errors="replace"),
            "files": {name: base64.b64encode(content).decode() for name, content in files.items()},
            "run_timeout": limits.deadline_s,
            "memory_limit_MB": limits.memory_mb,
        }
        try:
            response = self._client.post(self._url, json=body, timeout=limits.deadline_s + GRACE_S)
            said: dict[str, Any] = response.raise_for_status().json()
            ended = said["run_result"]
            if said["status"] == "SandboxError" or ended is None:
                return ProgramOutcome(status=Status.MACHINERY, note=str(said.get("message") or said["status"])[:200])
            output, errors = (str(ended.get(name) or "") for name in ("stdout", "stderr"))
            status, code = ENDED[ended["status"]], ended.get("return_code")
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            return ProgramOutcome(status=Status.MACHINERY, note=f"{type(error).__name__}: {error}"[:200])
        most = limits.output_kb << 10
        if max(len(output), len(errors)) > most:
            status = Status.OUTPUT
        elif status is Status.FINISHED and code:
            status = Status.EXITED
        return ProgramOutcome(
            status=status,
            stdout=output[:most],
            stderr=errors[:most],
            exit_code=code,
        )
