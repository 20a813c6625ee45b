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

KINDS: tuple[Kind, ...] = (
    sft.KIND,
    preference.KIND,
    online_preference.KIND,
    reward_model.KIND,
    rl.KIND,
    distill.KIND,
    merge.KIND,
    eval.KIND,
    compare.KIND,
    revise.KIND,
    questions.KIND,
    agreement.KIND,
    step_labels.KIND,
    sample.KIND,
    select.KIND,
)
