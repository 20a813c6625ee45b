"""Data: sources (files, folders, the hub) give rows, formats make typed examples of them."""

from whet.data.base import Conversation, Origin, Prompt, Row
from whet.data.faults import BadRow, Dropped, Place, Rejects
from whet.data.formats import Format, detect, load_conversations, load_prompts, to_conversation, to_prompt
from whet.data.sources import read_rows

__all__ = [
    "BadRow",
    "Conversation",
    "Dropped",
    "Format",
    "Origin",
    "Place",
    "Prompt",
    "Rejects",
    "Row",
    "detect",
    "load_conversations",
    "load_prompts",
    "read_rows",
    "to_conversation",
    "to_prompt",
]
