"""`whet schema`."""

from __future__ import annotations

import json


def schema() -> None:
    """Print the JSON Schema of a recipe, for editors that complete and check YAML."""
    from whet.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
