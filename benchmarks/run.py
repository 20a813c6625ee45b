"""Pairs in one run, taking turns: `python -m benchmarks.run [WORK ...] [--threads N] [--model DIR] [--list]`.

For each piece of work and each of its peers two processes stay alive and do a step in turn (ours, peer, ours, peer
...), so both meet the same machine. The first step of each is a warm-up. One JSON line for each pair, on stdout:

- `ratio`: median seconds of the peer over ours (above 1: we are faster), and `ratio_cpu` the same in CPU seconds;
- `spread`: the ratios of the single turns, least and greatest;
- `ours`, `peer`: median wall and CPU seconds of a step, tokens, peak memory, and what loading alone had taken;
- `limit`: of training, its operations per CPU second beside those of the same matrix products alone (each by the faster
  of MKL and oneDNN), measured in the same run (for GRPO of its training part); of decoding, bytes that must be read
  per second beside those of a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.make_model import ready
from benchmarks.work import WORKS, Work

ROOT = Path(__file__).resolve().parent.parent
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
"""The environment of `make test-vllm`; without it the pairs with vLLM are left out."""
ANSWER_S = 900
"""Longest wait for a step."""


class Worker:
    """A process that does a step when told, and what it reported."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.name = " ".join(arguments[:-2])
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
            "OMP_NUM_THREADS": arguments[-1],
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.errors = (ROOT / "build" / f"bench-{module}-{arguments[0]}.log").open("w+")
        python = str(VLLM) if module == "engine" else sys.executable
        command = [python, "-m", f"benchmarks.{module}", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.ready = self._read()
        self.steps: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}

    def step(self) -> None:
        """One step, start to end."""
        assert self.process.stdin
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self._read())

    def finish(self) -> None:
        """No more steps; take the last report."""
        assert self.process.stdin
        self.process.stdin.close()
        self.last = self._read()
        self.process.wait(60)

    def kill(self) -> None:
        """End it whatever it does; for the way out after an error."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def of(self, key: str) -> float:
        """The median over the steps after the warm-up."""
        return float(median(step[key] for step in self.steps[1:]))

    def summary(self) -> dict[str, Any]:
        """What goes into the pair's line."""
        memory = {"peak_rss_mb": self.last["peak_rss_mb"], "loaded_rss_mb": self.ready["rss_mb"]}
        return {
            "wall_s": _short(self.of("wall_s")),
            "cpu_s": _short(self.of("cpu_s")),
            "tokens": int(self.of("tokens")),
            **memory,
        }

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], ANSWER_S)[0]:
            raise SystemExit(f"{self.name}: no answer for {ANSWER_S} s; see {self.errors.name}")
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}; see {self.errors.name}")
        facts: dict[str, Any] = json.loads(line)
        return facts


def pair(work: Work, peer: str, folder: Path, threads: int, steps: int) -> dict[str, Any]:
    """Both sides in turn, `steps` times after a warm-up; the line of the pair."""
    workers: list[Worker] = []
    try:
        workers.append(Worker("ours", work.name, str(folder), str(threads)))
        workers.append(Worker("engine" if peer == "vllm" else "peer", peer, work.name, str(folder), str(threads)))
        for _ in range(steps + 1):
            for worker in workers:
                worker.step()
        for worker in workers:
            worker.finish()
    finally:
        for worker in workers:
            worker.kill()
    ours, other = workers
    turns = [b["wall_s"] / a["wall_s"] for a, b in zip(ours.steps[1:], other.steps[1:], strict=True)]
    line = {
        "work": work.name,
        "peer": peer,
        "model": folder.name,
        "parameters": ours.ready["parameters"],
        "threads": threads,
        "ratio": _short(other.of("wall_s") / ours.of("wall_s")),
        "ratio_cpu": _short(other.of("cpu_s") / ours.of("cpu_s")),
        "spread": [_short(min(turns)), _short(max(turns))],
        "memory_ratio": _short(other.last["peak_rss_mb"] / ours.last["peak_rss_mb"]),
        "ours": ours.summary(),
        "peer_side": other.summary(),
        "limit": _limit(work, ours),
        "load": _short(os.getloadavg()[0]),
    }
    if work.kind == "decode":
        checks = [(a["checks"], b["checks"]) for a, b in zip(ours.steps, other.steps, strict=True)]
        equal = [x == y for left, right in checks for x, y in zip(left, right, strict=True)]
        line["same_answers"] = f"{sum(equal)}/{len(equal)}"
    return line


def _limit(work: Work, ours: Worker) -> dict[str, float]:
    if work.kind == "decode":
        copied = ours.last["copy_bytes_per_s"]
        read = ours.last["bytes"] / ours.of("wall_s")
        return {"gb_per_s": _short(read / 1e9), "copy_gb_per_s": _short(copied / 1e9), "share": _short(read / copied)}
    trained_s = ours.of("train_cpu_s")
    return {
        "train_cpu_s": _short(trained_s),
        "gflops": _short(ours.last["flops"] / trained_s / 1e9),
        "gemm_gflops": _short(ours.last["flops"] / ours.last["products_cpu_s"] / 1e9),
        "share": _short(ours.last["products_cpu_s"] / trained_s),
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    """Parse the command line and print a line for each pair as it is done."""
    parser = argparse.ArgumentParser(description="time whet beside TRL and transformers on the same work")
    parser.add_argument("works", nargs="*", metavar="WORK", help="names from --list; none: all of them")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, help="timed steps of each side; none: as many as the work says")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "bench-models")
    parser.add_argument("--model", type=Path, help="a folder: this model in the place of each work's own")
    parser.add_argument("--peers", nargs="*", help="only these peers, e.g. vllm; none: all of them")
    parser.add_argument("--list", action="store_true", help="print the pieces of work and leave")
    chosen = parser.parse_args()
    if chosen.list:
        sys.stdout.write("".join(f"{work}\n" for work in WORKS.values()))
        return
    unknown = [name for name in chosen.works if name not in WORKS]
    if unknown:
        parser.error(f"no work named {', '.join(unknown)}; there are {', '.join(WORKS)}")
    (ROOT / "build").mkdir(exist_ok=True)
    for name in chosen.works or WORKS:
        work = WORKS[name]
        steps = min(chosen.steps or work.steps, work.steps)
        folder = chosen.model.resolve() if chosen.model else ready(chosen.models, work.model)
        for peer in work.peers:
            if peer not in (chosen.peers or work.peers) or (peer == "vllm" and not VLLM.exists()):
                continue
            sys.stdout.write(json.dumps(pair(work, peer, folder, chosen.threads, steps)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
