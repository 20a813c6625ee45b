"""Frames between the two processes: four bytes of length (big-endian), then a JSON object in ASCII.

NaN and infinities pass as Python's json writes them; the reader of a number checks it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from whet.sandbox.base import JSON

LIMIT = 1 << 28
"""Most bytes of one frame (256 MiB): a length beyond it means that the stream is out of step."""


def encode(frame: Mapping[str, JSON]) -> bytes:
    """The frame's bytes. Raises TypeError, ValueError or RecursionError where it is not JSON or too large."""
    body = json.dumps(frame).encode("ascii")
    if len(body) > LIMIT:
        raise ValueError(f"{len(body)} bytes are more than a frame may have ({LIMIT})")
    return len(body).to_bytes(4, "big") + body


def take(buffer: bytearray) -> dict[str, Any] | None:
    """The first whole frame, removed from the buffer; None while it is incomplete. Raises ValueError for garbage."""
    if len(buffer) < 4:
        return None
    size = int.from_bytes(buffer[:4], "big")
    if size > LIMIT:
        raise ValueError("not a frame")
    if len(buffer) < 4 + size:
        return None
    try:
        frame = json.loads(buffer[4 : 4 + size])
    except RecursionError as error:
        raise ValueError("not a frame") from error
    if not isinstance(frame, dict):
        raise ValueError("not a frame")
    del buffer[: 4 + size]
    return frame
