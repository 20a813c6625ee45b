"""The kinds of stages that there are."""

from __future__ import annotations

from whet.pipeline.stage import Kind
from whet.pipeline.stages import (
    agreement,
    compare,
    distill,
    eval,
    merge,
    online_preference,
    preference,
    questions,
    revise,
    reward_model,
    rl,
    sample,
    select,
    sft,
    step_labels,
)

_STAGES = (
    sft, preference, online_preference, reward_model, rl, distill, merge, eval, compare, revise, questions, agreement,
    step_labels, sample, select,
)  # fmt: skip
KINDS: tuple[Kind, ...] = tuple(stage.KIND for stage in _STAGES)
