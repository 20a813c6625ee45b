"""The merge stage: several models as one, tensor by tensor; nothing is trained."""

from __future__ import annotations

import shutil

from whet.config import MergeStage
from whet.formulas.constants import Bound
from whet.formulas.merge import MERGES
from whet.models.merge import merge_models
from whet.pipeline.stage import Context, Kind, Seen


def run_merge(context: Context[MergeStage]) -> None:
    """Merge the inputs and export the result."""
    config, sums = context.config, context.checkpoints / "inputs"
    merge = Bound(MERGES[config.method.kind], **config.method.model_dump(exclude={"kind"}))
    stop_ids = context.world.template(context.model).stop_ids
    merge_models(config.inputs, config.base, merge, stop_ids, sums).export(context.folder / "model")
    shutil.rmtree(sums, ignore_errors=True)
    context.console.say(f"{context.name}: {_describe(config)}")


def _describe(config: MergeStage) -> str:
    since = "" if config.base is None else f" since {config.base.path}"
    return f"{config.method.kind} of {', '.join(f'{each.weight:g} x {each.path}' for each in config.inputs)}{since}"


KIND = Kind(config=MergeStage, run=run_merge, check=lambda context: Seen(summary=_describe(context.config)))
