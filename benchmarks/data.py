"""From a file of chat rows to rows that can be trained on: `python -m benchmarks.data [--rows N ...] [--model FOLDER]`.

Each side runs twice in a process of its own, the second time with what the first one kept; a JSON line for each:

- `ours`: `whet` reads, renders, tokenizes, masks and checks every row, and takes one optimizer step of a small model;
- `peer`: `datasets.load_dataset` and `Dataset.map` over two processes with the tokenizer's `apply_chat_template`, as
  TRL's SFTTrainer prepares conversations. It makes no mask and checks nothing.

`ready_s` is until the rows can be read by index, `step_s` until the first optimizer step is done (ours only), both
from the start of the process, imports included. `peak_mb` is the proportional resident memory of the process and its
children, looked at five times a second. The chat rows are made up: 1 to 3 turns of Zipf-distributed words, some 560
tokens of Qwen's tokenizer a row.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "bench-data"
WORDS, SEED = 20_000, 0
MAX_LENGTH = 4096


def vocabulary(draw: random.Random) -> list[str]:
    """Made-up words of one to three syllables; the first are the most frequent."""
    heads = ["b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "st", "tr", "pl", "ch"]
    syllables = [head + tail for head in heads for tail in "aeiou"]
    return ["".join(draw.choices(syllables, k=draw.choice((1, 1, 2, 2, 3)))) for _ in range(WORDS)]


def make_rows(path: Path, rows: int, mean: int) -> None:
    """The same rows for the same numbers; answers have some `mean` words, questions a third of that."""
    words = vocabulary(random.Random(SEED))

    def text(draw: random.Random, mean: int) -> str:
        count = 5 + min(int(draw.expovariate(1 / mean)), 6 * mean)
        return " ".join(words[min(int(draw.paretovariate(0.6)), WORDS - 1)] for _ in range(count)) + "."

    with path.open("w") as file:
        for number in range(rows):
            draw = random.Random(f"{SEED}/{number}")
            messages = [{"role": "system", "content": "You are a helpful assistant."}] if draw.random() < 0.3 else []
            for _ in range(draw.choice((1, 1, 2, 3))):
                messages.append({"role": "user", "content": text(draw, mean // 3)})
                messages.append({"role": "assistant", "content": text(draw, mean)})
            file.write(json.dumps({"messages": messages}) + "\n")


def ours(path: Path, model: str) -> dict[str, Any]:
    """Everything that a stage of SFT does up to its first step."""
    from whet.algorithms.sft import sft
    from whet.config import DataConfig, ModelConfig, SamplingConfig, TrainConfig
    from whet.launch.world import LocalWorld
    from whet.pipeline.gate import gate

    world, config = LocalWorld(), ModelConfig(path=model, device="cpu")
    train = TrainConfig(steps=1, batch_size=4, max_length=MAX_LENGTH)
    data = DataConfig(path=str(path), on_bad_row="drop")
    gated = gate(world, config, train, data)
    ready = since_start()
    policy = world.policy(config, train, SamplingConfig())
    next(sft(policy.trainer, gated.rows, train, seed=0))
    return {"rows": gated.stats.rows, "tokens": gated.stats.tokens, "ready_s": ready, "step_s": since_start()}


def peer(path: Path, model: str) -> dict[str, Any]:
    """What TRL's SFTTrainer does with conversations before it packs them."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)
        return {"input_ids": made["input_ids"]}

    made = datasets.load_dataset("json", data_files=str(path), split="train")
    made = made.map(tokenize, remove_columns=["messages"], num_proc=2)
    made[0]
    ready = since_start()
    tokens = sum(len(batch) for part in made.iter(1000) for batch in part["input_ids"])
    return {"rows": len(made), "tokens": tokens, "ready_s": ready}


def since_start() -> float:
    """Seconds since this process was started."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks


def measured(side: str, path: Path, model: str) -> dict[str, Any]:
    """One side in a process of its own, and the most memory that it had."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "WHET_CACHE": str(FOLDER / "whet"),
        "HF_DATASETS_CACHE": str(FOLDER / "datasets"),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.data", "--side", side, "--path", str(path), "--model", model]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        while process.poll() is None:
            peak = max(peak, sum(_resident(pid) for pid in _tree(process.pid)))
            time.sleep(0.2)
        assert process.stdout
        lines = process.stdout.read().splitlines()
    if process.returncode:
        raise SystemExit(f"{side} failed with {process.returncode}")
    return {**json.loads(lines[-1]), "peak_mb": round(peak / 1024)}


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _tree(int(child))


def _resident(pid: int) -> int:
    """Kilobytes; of what several processes share, a share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    """Parse the command line and print a line for each start."""
    parser = argparse.ArgumentParser(description="time whet and datasets.map from a file to rows for training")
    parser.add_argument("--rows", type=int, nargs="*", default=[20_000, 200_000, 1_000_000])
    parser.add_argument("--words", type=int, default=120, help="mean words of an answer; fewer make shorter rows")
    parser.add_argument("--model", default=str(ROOT / "src" / "whet" / "assets" / "demo"), help="whose tokenizer it is")
    parser.add_argument("--sides", nargs="*", default=["ours", "peer"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        facts = {"ours": ours, "peer": peer}[asked.side](asked.path, asked.model)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu = sum(each.ru_utime + each.ru_stime for each in used)
        sys.stdout.write(json.dumps({**facts, "cpu_s": cpu}) + "\n")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    for rows in asked.rows:
        path = FOLDER / f"rows-{rows}-{asked.words}.jsonl"
        if not path.exists():
            make_rows(path, rows, asked.words)
        for side in asked.sides:
            shutil.rmtree(FOLDER / {"ours": "whet", "peer": "datasets"}[side], ignore_errors=True)
            for start in ("first", "second"):
                load = os.getloadavg()[0]
                found = measured(side, path, asked.model)
                line = {"side": side, "start": start, "bytes": path.stat().st_size, **found, "load": load}
                sys.stdout.write(json.dumps({k: _short(v) for k, v in line.items()}) + "\n")
                sys.stdout.flush()


def _short(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
