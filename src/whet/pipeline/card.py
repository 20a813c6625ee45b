"""What a run left, read back from its folder: its stages, where a model comes from, and the card that says so.

Nothing but the files of a run is read, so that any run can be looked at, one of another machine too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.files import digest_file, is_sealed, read_json
from whet.pipeline.identity import name_of
from whet.pipeline.lineage import HERE, NOTED

CARD = "README.md"
"""The card, in a model's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A stage that was begun."""

    folder: Path
    noted: Mapping[str, Any]
    """Its `stage.json`."""

    @property
    def name(self) -> str:
        """In the recipe."""
        return str(self.noted["name"])

    @property
    def identity(self) -> str:
        """Its identity in short; empty for one that its loop left out."""
        return name_of(self.noted["identity"])[:12] if "identity" in self.noted else ""

    @property
    def inputs(self) -> dict[str, Mapping[str, Any]]:
        """What it reads, by key."""
        return {key: each for key, each in self.noted.get("identity", {}).get("inputs", {}).items() if each}

    @property
    def parents(self) -> dict[str, str]:
        """Of what it reads the folders of stages of this run, by key."""
        return {k: each["path"].split("/")[2] for k, each in self.inputs.items() if each["path"].startswith(HERE)}

    @property
    def state(self) -> str:
        """`done`, `unfinished`, or why its loop left it out."""
        return self.noted.get("left_out") or ("done" if is_sealed(self.folder) else "unfinished")

    @property
    def evaluation(self) -> dict[str, dict[str, Any]]:
        """The rows of its table by label, where it is an evaluation that is done."""
        table = self.folder / "eval.json"
        return {row["label"]: row for row in read_json(table)["rows"]} if table.is_file() else {}

    def data(self) -> dict[str, str]:
        """What it reads that came from outside of the run, and what is known of that, by key."""
        found = {}
        for key, each in self.inputs.items():
            if key not in self.parents:
                sure = [f"{each['rows']:,} rows"] if "rows" in each else []
                sure += [f"{what} {each[what]}" for what in ("commit", "version", "function") if what in each]
                sure += [f"SHA-256 {file['sha256'][:16]}" for file in each.get("files", {}).values()]
                found[f"{self.name}.{key}"] = ", ".join([each["path"], *sure])
        return found


def records(run: Path) -> dict[str, Record]:
    """The stages of a run that were begun, in order, by the name of their folder."""
    found = sorted((run / "stages").glob(f"*/{NOTED}"))
    return {path.parent.name: Record(folder=path.parent, noted=read_json(path)) for path in found}


def evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """The tables of evaluations by stage, as in `eval.json`."""
    files = {each.name: each.folder / "eval.json" for each in records(run).values()}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}


def model_card(run: Path, model: Path) -> str:
    """The card of a model in a stage's folder, as Markdown: what it comes from, data, template, seed, evaluations."""
    stage = model.parent
    known, recipe = records(run), read_json(run / "recipe.json")
    wanted = [stage.name]
    for folder in wanted:
        wanted += [parent for parent in known[folder].parents.values() if parent in known and parent not in wanted]
    line = [record for folder, record in known.items() if folder in wanted]
    template = model / "chat_template.jinja"
    shown = digest_file(template).sha256[:16] if template.is_file() else "the tokenizer's own"
    title = known[stage.name].name + ("" if model.name == "model" else f", the {model.name} by held-out data")
    parts = [
        f"---\nlibrary_name: transformers\ntags: [whet]\n---\n# {recipe['name']}: {title}\n",
        f"Made by whet from `{recipe['model']['path']}`, seed {recipe['seed']}; chat template {shown}.\n",
        "| stage | kind | identity | reads |\n|---|---|---|---|",
    ]
    for each in line:
        made = ", ".join(dict.fromkeys(known[parent].name for parent in each.parents.values() if parent in known))
        parts.append(f"| {each.name} | {each.noted['kind']} | {each.identity} | {made} |")
    parts += ["\n| read by | data |\n|---|---|"]
    parts += [f"| {key} | {what} |" for each in line for key, what in each.data().items()]
    for each in known.values():
        for label, row in each.evaluation.items():
            if each.inputs.get(f"models.{label}", {}).get("path") == f"{HERE}{stage.name}/{model.name}":
                figures = f"{row['accuracy']:.1%} (95 % interval {row['low']:.1%} to {row['high']:.1%})"
                parts.append(f"\nAccuracy in `{each.name}`, {row['tasks']:,} tasks: {figures}.")
    return "\n".join(parts) + "\n"
