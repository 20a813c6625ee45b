"""The JSON Schema of a recipe file, so that an editor completes and checks keys while one types."""

from __future__ import annotations

from typing import Any

from whet.config.descriptions import DescribedSchema
from whet.config.environment import ADAPTERS
from whet.config.recipe import INHERITED, SHORT, STAGES, Recipe
from whet.config.train import SamplingConfig, TrainConfig


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, with what `load_recipe` adds: inherited sections and short forms."""
    schema = Recipe.model_json_schema(schema_generator=DescribedSchema)
    for extra in (TrainConfig, SamplingConfig):
        part = extra.model_json_schema(schema_generator=DescribedSchema)
        schema["$defs"].update(part.pop("$defs", {}))
        schema["$defs"].setdefault(extra.__name__, part)
    for name, model in zip(INHERITED, (TrainConfig, SamplingConfig), strict=True):
        schema["properties"][name] = {
            "$ref": f"#/$defs/{model.__name__}",
            "description": f"Defaults for the `{name}` section of every stage that has one.",
        }
    stages = schema["properties"]["stages"]
    group = {**schema["$defs"]["LoopConfig"]["properties"], "stages": {**stages}}
    loop = {"type": "object", "properties": group, "required": ["repeat", "stages"], "additionalProperties": False}
    stages["additionalProperties"] = {"anyOf": [stages["additionalProperties"], loop]}
    _allow_text(schema["properties"], "model")
    schema["$defs"]["EnvironmentConfig"]["properties"]["kind"]["enum"] += ADAPTERS
    for stage in STAGES:
        properties = schema["$defs"][stage.__name__]["properties"]
        for key in SHORT.keys() & properties.keys():
            _allow_text(properties, key)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _allow_text(properties: dict[str, Any], key: str) -> None:
    inner = properties[key]
    options = [*inner.get("oneOf", ()), *inner.get("anyOf", ())]
    for option in options:
        options += option.get("oneOf", ())
        if option.get("type") == "array":
            option["items"] = {"anyOf": [option["items"], {"type": "string"}]}
    properties[key] = {
        "anyOf": [inner, {"type": "string"}],
        **({"description": inner.pop("description")} if "description" in inner else {}),
    }
