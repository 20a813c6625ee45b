"""The truth about a stage, in append-only files: one line of numbers a step, one Parquet file of episodes a step.

    STAGE/metrics.jsonl                 {"loss": 1.25, "lr": 0.001, "step": 12, "time_s": 1767225600.123}
    STAGE/rollouts/step-000012.parquet  one row an episode: texts, tokens, log-probabilities, reward and its parts
    STAGE/notes.jsonl                   {"note": "an update was skipped, ...", "step": 12}: findings, if any

Everything shown elsewhere (console, report, trackers) is derived from these. They open in pandas, DuckDB and the
Hugging Face viewer as they are. A resumed stage first calls `truncate` with its checkpoint's step, so that the
files read as if the run had never stopped.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import RunError
from whet.files import sync_folder, write_atomic, writing
from whet.records import Episode, Group, Message, ToolCall

if TYPE_CHECKING:
    import pyarrow as pa  # at run time imported where it is used: `whet --help` must not pay for it

Decode = Callable[[Sequence[int]], str]
NOTES = "notes.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One episode of one step, as it stands in a rollout file."""

    step: int
    task: str
    sample: int
    seed: int
    prompt: str
    """The first prompt exactly as the sampler was shown it, special tokens included."""
    completion: str
    """Everything after it, observations of later turns included."""
    messages: tuple[Message, ...]
    prompt_tokens: tuple[int, ...]
    completion_tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    """One per completion token; None for tokens that the policy did not write (observations)."""
    version: int | None
    """Oldest weights that wrote any of it; None where the sampler never answered."""
    ending: str | None
    """How the last turn stopped: `stop` or `length`."""
    outcome: str
    reward: float | None
    """None: never graded."""
    correct: bool | None
    parts: Mapping[str, float | None]
    note: str
    advantage: float | None
    """Mean over its trained tokens; None where it was given none (unscored, or left out of the step)."""


class RunLog:
    """Writes the files of one stage folder.

    Every line is handed to the operating system at once, so a killed process loses nothing. `sync` makes the lines
    durable against a power cut; call it before a checkpoint is declared valid. Raises `RunError` where the disk is
    full or read-only.
    """

    def __init__(self, folder: Path, decode: Decode | None = None) -> None:
        """`decode` turns tokens into text for showing (`Template.decode`); a stage with episodes needs it."""
        self._folder = folder
        self._decode = decode
        self._file: io.FileIO | None = None

    def write(
        self, step: int, metrics: Mapping[str, float], groups: Sequence[Group] = (), *, notes: Sequence[str] = ()
    ) -> None:
        """Record a step: first its episodes and notes, then its line of metrics."""
        if groups:
            self._write_rollouts(step, groups)
        if notes:
            lines = "".join(json.dumps({"note": note, "step": step}, ensure_ascii=False) + "\n" for note in notes)
            path = self._folder / NOTES
            with writing(path, len(lines)), path.open("a", encoding="utf-8") as file:
                file.write(lines)
        self._append({**metrics, "step": step, "time_s": round(time.time(), 3)})

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add numbers to a step's line, which is the last; where the step has none, they are its line."""
        self.close()
        path = self._folder / "metrics.jsonl"
        lines = read_metrics(self._folder)
        there = lines[-1] if lines and lines[-1]["step"] == step else {}
        if there:
            write_atomic(path, b"".join(line.text for line in list(_whole_lines(path))[:-1]))
        known = {name: float("nan") if value is None else value for name, value in there.items()}
        self._append({**known, **metrics, "step": step, "time_s": round(time.time(), 3)})

    def truncate(self, step: int) -> None:
        """Forget everything after `step`, and a line that was cut off in writing: what a resume begins with."""
        self.close()
        for path in (self._folder / "metrics.jsonl", self._folder / NOTES):
            if path.exists():
                lines = (line for line in _whole_lines(path) if _parse(path, line)["step"] <= step)
                write_atomic(path, b"".join(line.text for line in lines))
        late = [file for number, file in _rollout_files(self._folder) if number > step]
        for file in late:
            file.unlink()
        if late:
            sync_folder(late[0].parent)

    def sync(self) -> None:
        """Return when everything written so far would survive a power cut."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and release the file; a later `write` opens it again."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def _append(self, entry: Mapping[str, float]) -> None:
        text = json.dumps({name: _finite(value) for name, value in entry.items()}, sort_keys=True, allow_nan=False)
        line = (text + "\n").encode()
        path = self._folder / "metrics.jsonl"
        with writing(path, len(line)):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    os.truncate(path, sum(len(line.text) for line in _whole_lines(path)))
                self._file = path.open("ab", buffering=0)
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "short write")

    def _write_rollouts(self, step: int, groups: Sequence[Group]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert self._decode is not None, "a stage with episodes needs `decode` to write their text"
        episodes = [episode for group in groups for episode in group.episodes]
        rows = [_row(step, episode, self._decode) for episode in episodes]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), buffer, compression="zstd")
        write_atomic(self._folder / "rollouts" / f"step-{step:06d}.parquet", buffer.getvalue())


# -------------------------------------------------------------------------------------------- readers


def read_metrics(folder: Path) -> list[dict[str, float | None]]:
    """The lines of a stage's `metrics.jsonl`, in order; none where there is no file yet.

    null stands for a number that was not finite. A last line cut off in writing is left out; any other line that
    cannot be read raises `RunError` with its number.
    """
    path = folder / "metrics.jsonl"
    return [_parse(path, line) for line in _whole_lines(path)] if path.exists() else []


def rollout_steps(folder: Path) -> list[int]:
    """The steps of a stage that have a rollout file, in order."""
    return [step for step, _ in _rollout_files(folder)]


def read_rollouts(folder: Path, step: int | None = None) -> list[Rollout]:
    """The episodes of one step of a stage, or of all steps; none where nothing was written."""
    files = [file for number, file in _rollout_files(folder) if step is None or number == step]
    return [_rollout(row) for file in files for row in _read_table(file).to_pylist()]


def read_rollout_table(folder: Path, step: int | None = None, columns: Sequence[str] | None = None) -> pa.Table | None:
    """The same as a table with these columns (none named: all), `messages` and `parts` as JSON; None: no files."""
    import pyarrow as pa

    tables = [_read_table(file, columns) for number, file in _rollout_files(folder) if step is None or number == step]
    return pa.concat_tables(tables) if tables else None


def rollout_tasks(folder: Path, step: int) -> list[str]:
    """The tasks played in one step, each once: reads that column only."""
    table = read_rollout_table(folder, step, ["task"])
    return [] if table is None else list(dict.fromkeys(table["task"].to_pylist()))


def verdicts(folder: Path) -> dict[str, list[float]]:
    """The graded answers to each task of a stage (or of a model that it evaluated), 1 for right."""
    found: dict[str, list[float]] = {}
    read = read_rollout_table(folder, columns=["task", "correct"])
    for row in [] if read is None else read.to_pylist():
        if row["correct"] is not None:
            found.setdefault(row["task"], []).append(float(row["correct"]))
    return found


# -------------------------------------------------------------------------------------------- helpers


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    text: bytes


def _whole_lines(path: Path) -> Iterator[_Line]:
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if text.endswith(b"\n"):
            yield _Line(number, text)


def _parse(path: Path, line: _Line) -> dict[str, Any]:
    try:
        entry = json.loads(line.text)
    except ValueError as error:
        raise RunError(f"{path}:{line.number}: not a line of JSON ({error}); remove the line and try again") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        raise RunError(f"{path}:{line.number}: a line of metrics is an object with a whole `step`; remove the line")
    return entry


def _finite(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _rollout_files(folder: Path) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"step-(\d+)\.parquet", file.name), file) for file in (folder / "rollouts").glob("step-*"))
    return sorted((int(match[1]), file) for match, file in found if match)


def _row(step: int, episode: Episode, decode: Decode) -> dict[str, Any]:
    """An episode as one row. A turn's prompt begins with the turn before it, so the last turn has all tokens."""
    prompt: list[int] = []
    completion: list[int] = []
    logprobs: list[float | None] = []
    if episode.turns:
        prompt = episode.turns[0].prompt.tolist()
        last = episode.turns[-1]
        completion = [*last.prompt.tolist(), *last.completion.tokens.tolist()][len(prompt) :]
        logprobs = [None] * len(completion)
        for turn in episode.turns:
            start = len(turn.prompt) - len(prompt)
            logprobs[start : start + len(turn.completion.logprobs)] = turn.completion.logprobs.tolist()
    return {
        "step": step,
        "task": episode.task,
        "sample": episode.sample,
        "seed": episode.seed,
        "prompt": decode(prompt),
        "completion": decode(completion),
        "messages": json.dumps([asdict(message) for message in episode.messages], ensure_ascii=False),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "logprobs": logprobs,
        "version": min((turn.completion.version for turn in episode.turns), default=None),
        "ending": episode.turns[-1].completion.ending if episode.turns else None,
        "outcome": episode.outcome,
        "reward": episode.score.value,
        "correct": episode.score.correct,
        "parts": json.dumps(dict(episode.score.parts), sort_keys=True),
        "note": episode.score.note,
        "advantage": episode.advantage,
    }


def _schema() -> pa.Schema:
    """Columns of a rollout file. `messages` and `parts` are JSON text, which every reader of Parquet understands."""
    import pyarrow as pa

    text, whole, number = pa.string(), pa.int64(), pa.float64()
    tokens, logprobs = pa.list_(pa.int32()), pa.list_(pa.float32())
    types = {"step": whole, "task": text, "sample": whole, "seed": whole, "prompt": text, "completion": text}
    types |= {"messages": text, "prompt_tokens": tokens, "completion_tokens": tokens, "logprobs": logprobs}
    types |= {"version": whole, "ending": text, "outcome": text, "reward": number, "correct": pa.bool_()}
    types |= {"parts": text, "note": text, "advantage": number}
    return pa.schema(list(types.items()))


def _read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path}: not a readable rollout file ({error}); remove it, the other steps stay") from error


def _rollout(row: dict[str, Any]) -> Rollout:
    row["messages"] = tuple(
        Message(**{**message, "tool_calls": tuple(ToolCall(**call) for call in message["tool_calls"])})
        for message in json.loads(row["messages"])
    )
    row["parts"] = json.loads(row["parts"])
    for column in ("prompt_tokens", "completion_tokens", "logprobs"):
        row[column] = tuple(row[column])
    return Rollout(**row)
