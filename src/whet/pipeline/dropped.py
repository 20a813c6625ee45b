"""Every row that was left out, on disk: `STAGE/dropped/KEY.jsonl`, KEY being that of the source in the recipe.

{"row": "train.jsonl:17", "reason": "messages[].content: empty text", "fault": "messages[2].content: empty text; ..."}
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from whet.data.faults import Dropped
from whet.files import write_atomic
from whet.pipeline.stage import Context


def keep_dropped(context: Context, key: str, dropped: Sequence[Dropped]) -> None:
    """Write the rows of a source that were left out; no file where there are none."""
    path = context.folder / "dropped" / f"{key}.jsonl"
    lines = [
        json.dumps({"row": str(lost.row), "reason": lost.reason, "fault": lost.fault}, ensure_ascii=False) + "\n"
        for each in dropped
        for lost in each.rows
    ]
    if lines:
        write_atomic(path, "".join(lines).encode("utf-8", "backslashreplace"))
    else:
        path.unlink(missing_ok=True)
