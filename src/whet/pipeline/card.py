"""What a run left, read back from its folder: its stages, where a model comes from, and the card that says so.

Nothing but the files of a run is read, so that any run can be looked at, another machine's too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.files import digest_file, is_sealed, read_json
from whet.pipeline.identity import name_of
from whet.pipeline.lineage import NOTED

CARD = "README.md"
"""The card, in a model's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A stage that was begun."""

    name: str
    kind: str
    folder: Path
    done: bool
    noted: Mapping[str, Any]
    """Its `stage.json`."""

    @property
    def identity(self) -> str:
        """The identity in short; empty where none was noted."""
        return name_of(self.noted["identity"])[:16] if "identity" in self.noted else ""

    @property
    def inputs(self) -> dict[str, Mapping[str, Any]]:
        """What it reads, by key."""
        return {key: each for key, each in self.noted.get("identity", {}).get("inputs", {}).items() if each}

    @property
    def parents(self) -> set[str]:
        """The folders' names of the stages whose artifacts it reads."""
        made = [each["path"].split("/") for each in self.inputs.values() if each["path"].startswith("/stages/")]
        return {parts[2] for parts in made}

    @property
    def evaluation(self) -> list[dict[str, Any]]:
        """The rows of its evaluation, where it is one that is done."""
        rows: list[dict[str, Any]] = read_json(self.folder / "eval.json")["rows"] if self.is_evaluation else []
        return rows

    @property
    def is_evaluation(self) -> bool:
        """Whether it has a table."""
        return self.done and (self.folder / "eval.json").is_file()


def records(run: Path) -> list[Record]:
    """The stages of a run that were begun, in order."""
    found = []
    for path in sorted((run / "stages").glob(f"*/{NOTED}")):
        noted = read_json(path)
        done = is_sealed(path.parent)
        found.append(Record(name=noted["name"], kind=noted["kind"], folder=path.parent, done=done, noted=noted))
    return found


def lineage(run: Path, name: str) -> list[Record]:
    """A stage and all that it comes from, in the order in which they were made."""
    known = {record.folder.name: record for record in records(run)}
    wanted = [folder for folder, record in known.items() if record.name == name]
    for folder in wanted:
        wanted += [parent for parent in known[folder].parents if parent in known and parent not in wanted]
    return [record for folder, record in known.items() if folder in wanted]


def data_of(line: Sequence[Record]) -> Iterator[tuple[str, str, str, str]]:
    """(stage, key, source, what is known of it) of everything that came from outside of the run."""
    for record in line:
        for key, each in record.inputs.items():
            if not each["path"].startswith("/stages/"):
                digests = [file["sha256"][:16] for file in each.get("files", {}).values()]
                rows = [f"{each['rows']:,} rows"] if "rows" in each else []
                sure = [f"{k} {each[k]}" for k in ("commit", "version", "function") if k in each]
                yield record.name, key, each["path"], ", ".join([*rows, *sure, *(f"SHA-256 {d}" for d in digests[:4])])


def model_card(run: Path, name: str) -> str:
    """The card of the model that a stage made, as Markdown: its parents, data, template, seed and evaluations."""
    line, recipe = lineage(run, name), read_json(run / "recipe.json")
    model = line[-1].folder / "model"
    parts = [f"---\nlibrary_name: transformers\ntags: [whet]\n---\n# {recipe['name']}: {name}\n"]
    parts.append(f"Made by whet from `{recipe['model']['path']}`, seed {recipe['seed']}.\n")
    template = model / "chat_template.jinja"
    if template.is_file():
        parts.append(f"Chat template: SHA-256 {digest_file(template).sha256[:16]}.\n")
    parts.append("| stage | kind | identity | reads |\n|---|---|---|---|")
    for each in line:
        made = ", ".join(sorted(parent.partition("-")[2] for parent in each.parents))
        parts.append(f"| {each.name} | {each.kind} | {each.identity} | {made} |")
    parts.append("\n| data | of | what |\n|---|---|---|")
    parts += [f"| {path} | {stage}.{key} | {known} |" for stage, key, path, known in data_of(line)]
    judged = [
        (each.name, row)
        for each in records(run)
        for row in each.evaluation
        if line[-1].folder.name in each.parents
        and each.inputs[f"models.{row['label']}"]["path"].endswith(f"/stages/{line[-1].folder.name}/model")
    ]
    if judged:
        parts.append("\n| evaluation | accuracy | 95 % | tasks |\n|---|--:|---|--:|")
        shown = "| {} ({}) | {:.1%} | {:.1%} to {:.1%} | {:,} |"
        parts += [shown.format(s, r["label"], r["accuracy"], r["low"], r["high"], r["tasks"]) for s, r in judged]
    return "\n".join(parts) + "\n"
