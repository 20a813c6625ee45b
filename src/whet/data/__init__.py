"""Data: sources (files, folders, the hub) give rows, formats make typed examples of them."""

from whet.data.base import Comparison, Conversation, Judged, Origin, Prompt, Rated, Row
from whet.data.faults import BadRow, Dropped, Place, Rejects
from whet.data.formats import Format, detect, load_conversations, load_prompts, to_conversation, to_prompt
from whet.data.preferences import load_comparisons, load_judged, load_rated, to_comparison, to_judged, to_rated
from whet.data.sources import read_rows

__all__ = [
    "BadRow",
    "Comparison",
    "Conversation",
    "Dropped",
    "Format",
    "Judged",
    "Origin",
    "Place",
    "Prompt",
    "Rated",
    "Rejects",
    "Row",
    "detect",
    "load_comparisons",
    "load_conversations",
    "load_judged",
    "load_prompts",
    "load_rated",
    "read_rows",
    "to_comparison",
    "to_conversation",
    "to_judged",
    "to_prompt",
    "to_rated",
]
