"""The kinds of stages that there are, and recipes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from whet.config.loading import Loaded, read_recipe
from whet.pipeline.stage import Kind
from whet.pipeline.stages import (
    agreement,
    compare,
    eval,
    online_preference,
    preference,
    questions,
    revise,
    reward_model,
    rl,
    sft,
    step_labels,
)

KINDS: tuple[Kind, ...] = (
    sft.KIND,
    preference.KIND,
    online_preference.KIND,
    reward_model.KIND,
    rl.KIND,
    eval.KIND,
    compare.KIND,
    revise.KIND,
    questions.KIND,
    agreement.KIND,
    step_labels.KIND,
)


def load_recipe(path: Path | str, overrides: Sequence[str] = (), kinds: Sequence[Kind] = KINDS) -> Loaded:
    """Read a recipe whose stages are of these kinds; see `config.loading.read_recipe`."""
    return read_recipe(path, overrides, [kind.config for kind in kinds])
