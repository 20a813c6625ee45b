"""A group of stages that is repeated: `improve: {repeat: 3, stages: {...}}` among the stages of a recipe.

It is written out when the recipe is loaded: round 2 of the stage `train` is the stage `improve-2-train`, with a folder,
a seed, an identity and checkpoints of its own like any other, and starts from the model that was made last, as they do.
In the group `@train` is the stage of the same round, and `@improve` the rows that the round before made; the first has
none, and its lists do without. After the loop `@improve` is what its last round made, or with `until` its best one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from whet.config.node import Node
from whet.config.strict import Made, Strict
from whet.errors import ConfigError


class UntilConfig(Strict):
    """When to stop: the last `eval` stage of the group is looked at after each round, the last of its models."""

    metric: str = "accuracy"
    """`accuracy`, or the name of one of the evaluation's rewards; higher is better."""
    reach: float | None = None
    """Stop as soon as it is at least that."""
    patience: int | None = Field(1, ge=1)
    """Stop after so many rounds that did not beat the best one before them; null: never for that reason."""
    min_gain: float = Field(0.0, ge=0)
    """By how much a round must beat the best one before it."""


class LoopConfig(Strict):
    """A group of stages, and how often it is repeated."""

    repeat: int = Field(ge=1, le=1000)
    """Rounds, at most."""
    until: UntilConfig | None = None
    """None: all rounds are run."""
    stages: list[list[str]]
    """The stages of each round. In a recipe file the group is written out under this key, as a recipe's own stages."""

    @model_validator(mode="after")
    def _check(self) -> LoopConfig:
        if self.until is not None and self.until.reach is None and self.until.patience is None:
            raise ValueError("until must have reach or patience: without either it never stops")
        return self


def write_out(root: Node, makes: Mapping[Any, Made | None]) -> Node:
    """The recipe with every loop written out, round by round, and a section `loops` that says so.

    `makes`: what each kind of stage makes. Every value keeps the place where it was written. Raises `ConfigError` where
    a loop is no section of this form.
    """
    stages, loops = root.child("stages"), {}
    flat: dict[str, Node] = {}
    for name, node in {} if stages is None else stages.section.items():
        rounds = _rounds(name, node, makes) if "stages" in node.section else [{name: node}]
        for each in rounds:
            if taken := next((key for key in each if key in flat), None):
                raise ConfigError(f"{node.place}: stages.{name}: two stages would be named {taken}; rename one")
            flat |= each
        if "stages" in node.section:
            names = [replace(node, value=[replace(node, value=key) for key in each]) for each in rounds]
            loops[name] = node.with_child("stages", replace(node, value=names))
    if stages is None or not loops:
        return root
    root = root.with_child("stages", replace(stages, value=flat))
    return root.with_child("loops", replace(stages, value=loops))


def _rounds(name: str, node: Node, makes: Mapping[Any, Made | None]) -> list[dict[str, Node]]:
    group, repeat = node.section["stages"], node.child("repeat")
    if not group.section or any("stages" in stage.section for stage in group.section.values()):
        raise ConfigError(f"{group.place}: stages.{name}.stages: must be a section of stages, none of them a loop")
    if repeat is None or not isinstance(repeat.value, int) or not 1 <= repeat.value <= 1000:
        there = "" if repeat else f"; there are {', '.join(node.section)}"
        raise ConfigError(
            f"{(repeat or node).place}: stages.{name}.repeat: must be a number of rounds, 1 to 1000{there}"
        )
    if "model" in (name, *group.section):
        raise ConfigError(
            f"{node.place}: stages.{name}: the name model is taken: @model is what the recipe starts from"
        )
    if name in group.section:
        raise ConfigError(f"{group.place}: stages.{name}.stages.{name}: has the name of its loop; rename one")
    kinds = {
        stage: str(child.value) for stage, part in group.section.items() if (child := part.child("kind")) is not None
    }
    rows = next((stage for stage, kind in reversed(kinds.items()) if makes.get(kind) == "rows"), None)
    found = []
    for number in range(1, repeat.value + 1):
        renamed = {f"@{stage}": f"@{name}-{number}-{stage}" for stage in group.section}
        if number > 1 and rows is not None:
            renamed[f"@{name}"] = f"@{name}-{number - 1}-{rows}"
        found.append({
            f"{name}-{number}-{stage}": _in_round(written, renamed, f"@{name}")
            for stage, written in group.section.items()
        })  # fmt: skip
    return found


def _in_round(node: Node, renamed: Mapping[str, str], before: str) -> Node:
    """The same with the names of one round; in the first one a list does without what was made `before` it."""
    if isinstance(node.value, dict):
        return replace(node, value={key: _in_round(child, renamed, before) for key, child in node.value.items()})
    if isinstance(node.value, list):
        absent = before if before not in renamed else None
        kept = [child for child in node.value if (path := child.child("path")) is None or path.value != absent]
        return replace(node, value=[_in_round(child, renamed, before) for child in kept])
    if not isinstance(node.value, str):
        return node
    stage, slash, rest = node.value.partition("/")  # @train/best
    return replace(node, value=renamed[stage] + slash + rest) if stage in renamed else node
