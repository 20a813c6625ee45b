"""Law: rooms look down, never up, never sideways; and whatever is public says what it is."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
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


VIOLATIONS = {
    "up": ("rollouts", "import whet.cli", "floors"),
    "sideways": ("training", "import whet.sampling", "floors"),
    "formulas": ("formulas", "import whet.records", "formulas import nothing"),
    "torch in envs": ("envs", "import torch", "envs speak messages"),
    "ray": ("pipeline", "import ray", "ray only in launch"),
    "vllm": ("sampling", "import vllm", "vllm only in sampling.vllm"),
    "transformers": ("training", "import transformers", "transformers only in"),
    "bitsandbytes": ("training", "import bitsandbytes", "bitsandbytes only in"),
    "starlette": ("pipeline", "import starlette", "starlette and uvicorn only in"),
    "trackers": ("tracking", "import wandb", "trackers only in"),
    "hidden": ("rollouts", "def f():\n    import whet.cli", "floors"),
}


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_the_contracts_would_notice(kind: str, tmp_path: Path) -> None:
    """An empty building with our floors and one wrong import in it."""
    room, statement, contract = VIOLATIONS[kind]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = next(each for each in contracts if each["type"] == "layers")["layers"]
    for name in (name.strip(" ()") for floor in floors for name in floor.replace(":", "|").split("|")):
        (tmp_path / "whet" / name).mkdir(parents=True)
        (tmp_path / "whet" / name / "__init__.py").write_text(statement if name == room else "")
    (tmp_path / "whet" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    done = lint_imports(tmp_path / "pyproject.toml", tmp_path)
    broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(line.startswith(contract) for line in broken), broken


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
    "training/shards.py": "torch's index of a checkpoint, which may name few things",
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
