"""Descriptions of keys: the text under a field, read from the source when it is asked for.

pydantic can read it while it makes a class (`use_attribute_docstrings`), but looks through all loaded modules each
time: more than half of what `import whet.config` took, and five seconds once torch and transformers were loaded.
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue


@cache
def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """The texts of a section's keys, also of those that it inherits; a key without a text is left out."""
    texts: dict[str, str] = {}
    for part in reversed(model.__mro__):
        if issubclass(part, BaseModel):
            texts |= _written(part.__module__).get(part.__name__, {})
    texts |= {key: field.description for key, field in model.model_fields.items() if field.description}
    return {key: text for key, text in texts.items() if text}


@cache
def _written(module: str) -> dict[str, dict[str, str]]:
    """By class of a module, the text under each field; empty where there is none."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):  # made at a prompt, or written over since: there is no source
        return {}
    return {node.name: _texts(node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _texts(section: ast.ClassDef) -> dict[str, str]:
    texts = {}
    for field, below in pairwise([*section.body, ast.Pass()]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            said = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            texts[field.target.id] = inspect.cleandoc(said) if isinstance(said, str) else ""
    return texts


class DescribedSchema(GenerateJsonSchema):
    """A JSON Schema with these descriptions."""

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        """pydantic's, and the text of each key."""
        made = super().model_schema(schema)
        for key, text in descriptions(schema["cls"]).items():
            if key in made.get("properties", {}):
                made["properties"][key].setdefault("description", text)
        return made
