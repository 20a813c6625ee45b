"""What a row has and nothing reads: counted by column, so that it can be named once."""

from __future__ import annotations

import re
from collections.abc import Iterator

from whet.config import DataConfig
from whet.data.base import Row
from whet.data.faults import nearest
from whet.data.messages import MESSAGE_KEYS, TOOL_COLUMNS
from whet.errors import DataError

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""What a model of text never sees, though a text may have a place for it (`<image>`)."""
READ = frozenset({
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "system", "text",
    "answers", "ranks", "scores", "chosen", "rejected", "chosen_messages", "rejected_messages", "preferred_output",
    "non_preferred_output", "label", "labels", "steps", "ratings", "margin", "confidence", "chat_template_kwargs",
    "enable_thinking", *TOOL_COLUMNS,
})  # fmt: skip
"""Columns that some format reads."""
CHATS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
"""Those that may hold messages, whose own keys are looked at too: `messages[].date`."""


def refuse_unknown(config: DataConfig) -> None:
    """Raise `DataError` where `data.columns` gives a name that no format reads: it would have no effect."""
    for ours in config.columns:
        if ours not in READ:
            raise DataError(f"data.columns: {ours!r} is no column that whet reads; {nearest(ours, sorted(READ))}")


def unread(row: Row, config: DataConfig, *, keeps_columns: bool) -> Iterator[str]:
    """Columns with a value that are not read. `keeps_columns`: the others go on to rewards, and only what the model
    would have to be shown is named."""
    mapped = set(re.findall(r"[^{}.\[\]]+", " ".join(f"{{{entry}}}" for entry in config.columns.values())))
    for name, value in row.values.items():
        known = name in READ or name in mapped
        if value not in (None, "", [], {}) and (name in (*MEDIA, *TOOL_COLUMNS) if keeps_columns else not known):
            yield name
        if name in CHATS and isinstance(value, list):
            keys = {key for message in value if isinstance(message, dict) for key in message if message[key]}
            yield from (f"{name}[].{key}" for key in sorted(keys - MESSAGE_KEYS))
