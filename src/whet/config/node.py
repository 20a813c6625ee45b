"""Recipe text as a tree that remembers where every key was written.

YAML is read with `yaml.compose` and the safe loader only, in the core schema of YAML 1.2: `no` is text, `1e-6` is a
number, a date is text. Merging and overriding move nodes whole, so a value never loses the line that it came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from whet.errors import ConfigError

Key = str | int
KeyPath = tuple[Key, ...]
Scalar = str | int | float | bool | None

COMMAND_LINE = "command line"
"""The source of what was typed after the recipe's name."""
PYTHON = "Python"
"""The source of a recipe that is a mapping."""

MOST_CHARACTERS = 1_000_000
MOST_NODES = 50_000
"""Bounds on a recipe; the second counts aliases as often as they are used, so that a small file cannot explode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A value, where it stands, and the path under which it was written (which inheritance does not change)."""

    value: Scalar | dict[str, Node] | list[Node]
    source: str
    line: int
    """From 1; 0 on the command line."""
    path: KeyPath

    @property
    def place(self) -> str:
        """`recipe.yaml:12`, or `command line`."""
        return _place(self.source, self.line)

    @property
    def section(self) -> dict[str, Node]:
        """The keys below, none where this is a list or a scalar."""
        return self.value if isinstance(self.value, dict) else {}

    def plain(self) -> object:
        """The value as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: Key) -> Node | None:
        """The node under this key or index, if there is one."""
        if isinstance(self.value, dict) and isinstance(key, str):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None

    def find(self, path: KeyPath) -> Node | None:
        """The node at the end of this path, if there is one."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node is not None else None
        return node

    def leaves(self, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
        """Every node below that is no section, with its path; a list is one leaf."""
        if not isinstance(self.value, dict):
            yield prefix, self
            return
        for key, child in self.value.items():
            yield from child.leaves((*prefix, key))

    def with_child(self, key: Key, child: Node) -> Node:
        """This section or list with one entry replaced or, in a section, added."""
        if isinstance(self.value, list):
            assert isinstance(key, int)
            return replace(self, value=[child if i == key else old for i, old in enumerate(self.value)])
        return replace(self, value={**self.section, str(key): child})

    def over(self, base: Node | None) -> Node:
        """This node's keys over those of `base`, section by section; anything but a section replaces."""
        if base is None or not isinstance(self.value, dict) or not isinstance(base.value, dict):
            return self
        merged = {**base.value, **{key: child.over(base.value.get(key)) for key, child in self.value.items()}}
        return replace(self, value=merged)


def dotted(path: KeyPath) -> str:
    """`stages.rl.rewards.0.kind`."""
    return ".".join(map(str, path))


def parse(text: str, source: str, path: KeyPath = ()) -> Node:
    """YAML text as a tree whose root is written under `path`.

    Raises:
        ConfigError: the text is not YAML, repeats a key, or is too large; it names file and line.

    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{source}: more than {MOST_CHARACTERS:,} characters; this is not a recipe")
    try:
        root = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = _place(source, _line(source, mark.line)) if mark else source
        tab, token = r"\t" in str(error.problem), "cannot start any token" in str(error.problem)
        hint = "; indent with spaces in place of the tab" if tab else "; put the text in quotes" if token else ""
        raise ConfigError(f"{at}: not valid YAML: {error.problem or error.context}{hint}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply for a recipe") from error
    if root is None:
        return Node(value=None, source=source, line=_line(source, 0), path=path)
    return _Reader(source).read(root, path, root.start_mark.line)


def written(value: Any, path: KeyPath = ()) -> Node:
    """A recipe of Python as a tree; a path is its text, and what is no section and no list stays what it is."""
    if isinstance(value, Mapping):
        value = {str(key): written(child, (*path, str(key))) for key, child in value.items()}
    elif isinstance(value, list | tuple):
        value = [written(child, (*path, index)) for index, child in enumerate(value)]
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    return Node(value=value, source=PYTHON, line=0, path=path)


_CORE = "tag:yaml.org,2002:"


class _CoreLoader(yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2: no `yes` and `no`, no dates, no base 60."""

    yaml_implicit_resolvers = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9](_?[0-9])*", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9](_?[0-9])*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _CoreLoader.add_implicit_resolver(_CORE + _tag, re.compile(f"^(?:{_pattern})$"), _first)


class _Reader:
    """Turns PyYAML's nodes into ours, counting them."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0

    def read(self, node: yaml.Node, path: KeyPath, mark: int) -> Node:
        """One node; `mark` is the line (from 0) of the key that it stands under."""
        self.count += 1
        here = Node(value=None, source=self.source, line=_line(self.source, mark), path=path)
        if self.count > MOST_NODES or len(path) > 40:
            raise ConfigError(f"{here.place}: too many values or too deep; does an alias contain itself?")
        if node.tag.removeprefix(_CORE) not in ("map", "seq", "null", "bool", "int", "float", "str"):
            raise ConfigError(f"{here.place}: {dotted(path)}: the YAML tag {node.tag} is not used in recipes")
        if isinstance(node, yaml.MappingNode):
            return replace(here, value=self._section(node, path))
        if isinstance(node, yaml.SequenceNode):
            children = enumerate(node.value)
            return replace(here, value=[self.read(child, (*path, i), child.start_mark.line) for i, child in children])
        return replace(here, value=_scalar(node))

    def _section(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Node]:
        section: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            child_path = (*path, key)
            mark = key_node.start_mark.line
            place = _place(self.source, _line(self.source, mark))
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: {dotted(path) or 'recipe'}: a key must be a plain word")
            if key in section:
                first = section[key].line
                raise ConfigError(f"{place}: {dotted(child_path)}: given twice, first in line {first}; delete one")
            section[key] = self.read(value_node, child_path, mark)
        return section


def _scalar(node: yaml.Node) -> Scalar:
    text = str(node.value)
    match node.tag.removeprefix(_CORE):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        case _:
            return text


def _line(source: str, mark: int) -> int:
    return 0 if source == COMMAND_LINE else mark + 1


def _place(source: str, line: int) -> str:
    return f"{source}:{line}" if line else source
