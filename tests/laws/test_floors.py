"""Law: rooms look down, never up, never sideways; and whatever is public says what it is."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = ROOT / "src"
FILES = sorted((SOURCE / "whet").rglob("*.py"))


def lint_imports(config: Path, source: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the package under `source`, in a process of its own: it must see that package, not ours."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    command = [sys.executable, "-c", code, str(config)]
    environment = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "200"}
    return subprocess.run(command, env=environment, cwd=config.parent, capture_output=True, text=True)


def test_the_floors_hold() -> None:
    done = lint_imports(ROOT / "pyproject.toml", SOURCE)
    assert done.returncode == 0, done.stdout + done.stderr


FLOORS = {
    "up": ("rollouts", "import whet.cli"),
    "sideways": ("training", "import whet.sampling"),
    "hidden": ("rollouts", "def f():\n    import whet.cli"),
}
FORBIDDEN = {
    "formulas import nothing": ("formulas", "import whet.records"),
    "records, errors, files": ("config", "import torch"),
    "numbers are in records": ("errors", "import numpy"),
    "records and errors import nothing": ("records", "import whet.target, whet.errors"),
    "nor each other": ("records", "import whet.target, whet.errors"),
    "envs speak messages": ("envs", "import torch"),
    "what runs in another interpreter": ("envs/adapters", "import whet.config"),
    "ray only in launch": ("pipeline", "import ray"),
    "vllm only in sampling.vllm": ("sampling", "import vllm"),
    "transformers only in": ("training", "import transformers"),
    "bitsandbytes only in": ("rollouts", "import bitsandbytes"),
    "starlette and uvicorn only in": ("pipeline/stages", "import starlette"),
    "trackers only in": ("tracking", "import wandb"),
}
"""By contract, where it is broken and how: one in a room, so that all are in one building."""


def broken(folder: Path, violations: Iterable[tuple[str, str]]) -> list[str]:
    """Contracts that an empty building with our floors and these imports in it breaks."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = next(each for each in contracts if each["type"] == "layers")["layers"]
    rooms = {name.strip(" ()") for floor in floors for name in floor.replace(":", "|").split("|")}
    named = [
        name for each in contracts for key in ("source_modules", "forbidden_modules") for name in each.get(key, ())
    ]
    rooms |= {name.removeprefix("whet.").replace(".", "/") for name in named if name.startswith("whet.")}
    for room in (*rooms, "pipeline/stages", ""):
        place = folder / "whet" / room
        place.mkdir(parents=True, exist_ok=True)
        for each in (place, *place.parents):
            if each == folder:
                break
            (each / "__init__.py").touch()
    for room, statement in violations:
        (folder / "whet" / room / "__init__.py").write_text(statement)
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    done = lint_imports(folder / "pyproject.toml", folder)
    assert done.returncode == 1, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]


@pytest.mark.parametrize("kind", FLOORS)
def test_the_floors_would_notice(kind: str, tmp_path: Path) -> None:
    (found,) = broken(tmp_path, [FLOORS[kind]])
    assert found.startswith("floors")


def test_the_contracts_would_notice(tmp_path: Path) -> None:
    found = broken(tmp_path, FORBIDDEN.values())
    assert not [name for name in FORBIDDEN if not any(line.startswith(name) for line in found)], found
    assert len(FORBIDDEN) + 1 == (ROOT / "pyproject.toml").read_text().count("[[tool.importlinter.contracts]]")


def test_every_public_name_has_a_docstring() -> None:
    silent = [f"{file.relative_to(SOURCE)}:{line} {name}" for file in FILES for line, name in undocumented(file)]
    assert not silent, "\n".join(silent)


def undocumented(file: Path) -> Iterator[tuple[int, str]]:
    """Public modules, functions, classes and methods without a docstring; properties count as methods."""
    tree = ast.parse(file.read_text())
    if tree.body and ast.get_docstring(tree) is None:
        yield 1, "module"
    nodes: list[ast.stmt] = list(tree.body)
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield node.lineno, node.name
            if isinstance(node, ast.ClassDef):
                nodes.extend(node.body)


def test_a_class_has_a_name_of_its_own() -> None:
    """Two public classes of one name are two meanings of one word."""
    homes: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(file.relative_to(SOURCE)))
    assert not {name: files for name, files in homes.items() if len(files) > 1}


RUN_CODE = {
    "sandbox/jail.py": "untrusted programs, confined",
    "envs/rewards/code_side.py": "the same, inside of the sandbox",
    "envs/tools/console.py": "calls of the python tool, inside of the sandbox",
    "envs/rewards/function_worker.py": "a grader that the recipe's author wrote, in a process of its own",
    "config/derived.py": "annotations of formulas",
}
"""Where text is run as code, and whose it is."""


UNPICKLE = {
    "launch/ranks.py": "answers of ranks that have proved that they know the run's key",
    "launch/rank.py": "commands of the driver, which has proved the same",
    "training/checkpoint.py": "torch's index of a checkpoint, which may name few things",
    "training/crew.py": "parts of rows from forks of this process, through a pipe that nobody else holds",
}
"""Where objects are unpickled, and whose they are."""


def test_text_is_run_as_code_and_objects_are_unpickled_in_few_places() -> None:
    runs, unpickles = set(), []
    for file in FILES:
        name = file.relative_to(SOURCE / "whet").as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("exec", "eval"):
                runs.add(name)
            if isinstance(node, ast.Import):
                unpickles += [name for each in node.names if each.name in ("pickle", "shelve", "dill", "cloudpickle")]
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "shelve", "dill", "cloudpickle"):
                unpickles.append(name)
    assert runs == set(RUN_CODE) and set(unpickles) == set(UNPICKLE)
