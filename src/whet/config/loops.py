"""A group of stages that is repeated: `improve: {repeat: 3, stages: {...}}` among the stages of a recipe.

It is written out when the recipe is loaded: round 2 of the stage `train` is the stage `improve-2-train`, with a folder,
a seed, an identity and checkpoints of its own like any other. In the group `@train` is the stage of the same round, and
`@improve` what the round before made: in the first round the model that the loop starts from, and no rows yet. After
the loop `@improve` is what its last round made, or with `until` its best one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from pydantic import Field, model_validator

from whet.config.node import Node
from whet.config.strict import Strict
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

    repeat: int = Field(ge=1)
    """Rounds, at most."""
    until: UntilConfig | None = None
    """None: all rounds are run."""
    stages: list[str] = Field(min_length=1)
    """Its stages in order. In a recipe file they are written out under this key, as a recipe's own are."""

    @model_validator(mode="after")
    def _check(self) -> LoopConfig:
        if self.until is not None and self.until.reach is None and self.until.patience is None:
            raise ValueError("until must have reach or patience: without either it never stops")
        return self


class Place(NamedTuple):
    """Where a stage stands in a loop."""

    loop: str
    round: int
    """From 1."""
    stage: str
    """Its name in the group."""


def round_name(loop: str, number: int, stage: str) -> str:
    """`improve-2-train`."""
    return f"{loop}-{number}-{stage}"


def write_out(root: Node) -> Node:
    """The recipe with every loop written out, round by round, and a section `loops` that says so.

    Every value keeps the place where it was written. Raises `ConfigError` where a loop is no section of this form.
    """
    stages, loops = root.child("stages"), {}
    if stages is None or not any("stages" in stage.section for stage in stages.section.values()):
        return root
    flat: dict[str, Node] = {}
    for name, node in stages.section.items():
        group = node.child("stages")
        named = {name: node} if group is None else dict(_rounds(name, node, group))
        if taken := next((each for each in named if each in flat), None):
            raise ConfigError(f"{node.place}: stages.{name}: two stages would be named {taken}; rename one")
        flat |= named
        if group is not None:
            names = [replace(child, value=key) for key, child in group.section.items()]
            loops[name] = node.with_child("stages", replace(group, value=names))
    root = root.with_child("stages", replace(stages, value=flat))
    return root.with_child("loops", replace(stages, value=loops, path=("stages",)))


def _rounds(name: str, node: Node, group: Node) -> Iterator[tuple[str, Node]]:
    repeat = node.child("repeat")
    if not group.section or any("stages" in stage.section for stage in group.section.values()):
        what = "a section of stages, none of them a loop"
        raise ConfigError(f"{group.place}: stages.{name}.stages: must be {what}")
    if repeat is None or not isinstance(repeat.value, int) or not 1 <= repeat.value <= 1000:
        place = (repeat or node).place
        raise ConfigError(f"{place}: stages.{name}.repeat: must be the number of rounds of the loop, 1 to 1000")
    for number in range(1, repeat.value + 1):
        renamed = {f"@{stage}": f"@{round_name(name, number, stage)}" for stage in group.section}
        for stage, written in group.section.items():
            yield round_name(name, number, stage), _in_round(written, renamed, f"@{name}" if number == 1 else "")


def _in_round(node: Node, renamed: dict[str, str], absent: str) -> Node:
    """The same for one round; sources in a list that are `absent` in the first one are left out."""
    if isinstance(node.value, dict):
        return replace(node, value={key: _in_round(child, renamed, absent) for key, child in node.value.items()})
    if isinstance(node.value, list):
        kept = [child for child in node.value if not (path := child.child("path")) or path.value != absent]
        return replace(node, value=[_in_round(child, renamed, absent) for child in kept])
    return replace(node, value=renamed.get(node.value, node.value)) if isinstance(node.value, str) else node
