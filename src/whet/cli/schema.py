"""`whet schema`."""

from __future__ import annotations

from whet.cli.errors import print_json
from whet.cli.options import Json


def schema(json: Json = False) -> None:
    """Print the JSON Schema of a recipe, for editors that complete and check YAML."""
    from json import dumps

    from whet.config.schema import json_schema

    if json:
        print_json({"schema": json_schema()})
    else:
        print(dumps(json_schema(), indent=2))
