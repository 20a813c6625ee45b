"""The classes of BFCL's plays of several turns, as they are: their schemas, and their gold calls in real processes."""

from __future__ import annotations

import ast
import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.test_shipped_tools import environment, played, rows_of
from whet.envs.tools.schema import as_tool
from whet.envs.tools.worker import _methods

BFCL = {
    "gorilla_file_system": "GorillaFileSystem", "math_api": "MathAPI", "message_api": "MessageAPI",
    "posting_api": "TwitterAPI", "ticket_api": "TicketAPI", "trading_bot": "TradingBot", "travel_booking": "TravelAPI",
    "vehicle_control": "VehicleControlAPI",
}  # fmt: skip
SOURCE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
TYPES = {"dict": "object", "float": "number", "tuple": "array"}


def test_classes_of_bfcl_have_the_schemas_of_its_documents_and_run_its_gold_calls(
    shared_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bfcl_eval", reason="BFCL's classes need pip install --no-deps bfcl-eval")
    seen = 0
    for file, name in BFCL.items():
        made = getattr(importlib.import_module(f"{SOURCE}.{file}"), name)()
        documents = (shared_data / "bfcl" / "shared" / f"multi_turn_func_doc_{file}.json").read_text().splitlines()
        wanted = {each["name"]: each["parameters"] for each in map(json.loads, filter(None, documents))}
        for method in _methods(made):
            ours, theirs = as_tool(method.__name__, method).schema["function"]["parameters"], wanted[method.__name__]
            assert set(ours["properties"]) == set(theirs["properties"]), method
            assert sorted(ours.get("required", [])) == sorted(theirs["required"]), method
            for key, value in theirs["properties"].items():
                type_ = TYPES.get(value["type"], value["type"])
                assert type_ in _all_types(ours["properties"][key]), (method, key)
            seen += 1
    assert seen == 128

    code = "import copy\n" + "\n".join(
        f"import {SOURCE}.{file}\n\nclass {name}({SOURCE}.{file}.{name}):\n"
        f"    def reset(self, initial_config):\n"
        f"        self._load_scenario(copy.deepcopy(initial_config.get({name!r}, {{}})))\n"
        for file, name in BFCL.items()
        if name != "MathAPI"
    )
    (tmp_path / "bfcl.py").write_text(code)
    statuses: Counter[str] = Counter()
    for row in list(rows_of(shared_data / "bfcl" / "dev" / "multi_turn_base.jsonl.gz"))[:4]:
        classes = [f"{tmp_path / 'bfcl.py'}:{each}" for each in row["involved_classes"] if each != "MathAPI"]
        tools = [{"path": path} for path in classes[1:]]
        with environment(path=classes[0], tools=tools) as made_:
            functions = [tool["function"] for tool in made_.tools]
            offered = {each["name"]: list(each["parameters"]["properties"]) for each in functions}
            calls = [_read_call(text, offered) for turn in row["ground_truth"] for text in turn]
            told, _ = played(made_, [c for c in calls if c[0] in offered], initial_config=row["initial_config"])
            statuses.update(text if text.startswith("error:") else "ok" for text in told[1:])
    assert statuses["ok"] > 15 and len(statuses) == 1, statuses


def _all_types(schema: Any) -> set[str]:
    if "type" not in schema and "anyOf" not in schema:
        return {"any", "string", "object", "integer", "number", "array", "boolean"}
    return {schema.get("type", ""), *(type_ for each in schema.get("anyOf", ()) for type_ in _all_types(each))}


def _read_call(text: str, offered: Mapping[str, Sequence[str]]) -> tuple[str, dict[str, Any]]:
    """`name(1, b=2)`, as BFCL writes calls."""
    found = ast.parse(text, mode="eval").body
    assert isinstance(found, ast.Call) and isinstance(found.func, ast.Name)
    named = {str(each.arg): each.value for each in found.keywords}
    named |= dict(zip(offered.get(found.func.id, ()), found.args, strict=False))
    return found.func.id, {key: ast.literal_eval(value) for key, value in named.items()}
