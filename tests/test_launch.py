"""Files for clusters: each parses as what it is, and the command inside is one that `whet run` takes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_cli import whet
from whet.config.loading import load_recipe
from whet.launch.jobs import SUBMIT
from whet.sampling.vllm_flags import SERVER_FLAGS

RECIPE = """\
name: Small_Run.1
model: whet:tiny
stages:
  rl:
    kind: rl
    tasks: {generate: arithmetic}
    rewards: [{kind: verifier}]
    train: {steps: 10}
"""
MACHINE = "machine:\n  trainer: {nodes: 2, gpus: 4}\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    Path("m.yaml").write_text(MACHINE)
    Path("e.yaml").write_text(MACHINE)
    Path("one.yaml").write_text("machine: {trainer: {gpus: 4}}\n")
    return "r.yaml"


def written(target: str, *words: str) -> str:
    assert whet("launch", target, *words, "--write", "job") == 0
    return Path("job").read_text()


def shell(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def scripts(target: str, text: str) -> list[str]:
    """What a shell is given in the file."""
    if target == "slurm":
        return [text]
    documents: list[Any] = list(yaml.safe_load_all(text))
    if target == "skypilot":
        return [documents[0]["run"], documents[0]["setup"]]
    if target == "ray":
        return [documents[1]["spec"]["entrypoint"]]
    containers = [
        each["spec"]["template"]["spec"]["containers"][0] for each in documents if "apps" in each["apiVersion"]
    ]
    job = documents[-1]["spec"]["template"]["spec"]["containers"][0]
    return [job["args"][0], *(each["command"][2] for each in containers)]


@pytest.mark.parametrize("target", SUBMIT)
@pytest.mark.parametrize("machine", ["m.yaml", "e.yaml", "one.yaml"])
def test_each_file_parses_and_its_command_is_taken(recipe: str, target: str, machine: str) -> None:
    engine = machine == "e.yaml" and target != "ray"
    more = ["stages.rl.sampling.engine=vllm", "--server-gpus", "2"] if engine else []
    text = written(target, recipe, machine, *more, "description='x y'")
    found = scripts(target, text)
    for script in found:
        shell(script)
    lines = [line.strip() for script in found for line in script.splitlines()]
    [command] = [line for line in lines if "whet run" in line and not line.startswith("#")]
    words = shlex.split(command.removeprefix("exec ").removesuffix(" &").replace("$ENGINE", "engine"))
    assert words[:2] == ["whet", "run"]
    words = [word.replace("/recipe/", "") for word in words[2:]]
    assert whet("run", *words, "--help") == 0
    loaded = load_recipe(words[0], words[1:]).recipe
    assert loaded.machine.trainer.gpus == 4 and loaded.description == "x y"
    assert loaded.machine.launch == ("ray" if target == "ray" else "local")
    ranks = "whet.launch.rank" in text
    assert ranks == (machine != "one.yaml" and target != "ray")
    if engine:
        assert loaded.stages["rl"].sampling.server == "http://engine:8000"
        served = [line for line in lines if "vllm serve" in line]
        assert len(served) == 1 and "--tensor-parallel-size 2" in served[0]
        assert " ".join(SERVER_FLAGS) in served[0] and "--max-num-seqs 256" in served[0]
    if target in ("kubernetes", "ray"):
        files = next(yaml.safe_load_all(text))["data"]
        assert files == {recipe: RECIPE, machine: Path(machine).read_text()}
    assert (oct(os.stat("job").st_mode)[-3:]) == "600"


def test_slurm_tells_the_driver_first_and_queues_again(recipe: str, tmp_path: Path) -> None:
    """The script itself, with programs of that name in the place of Slurm's and of whet."""
    text = written("slurm", recipe, "m.yaml")
    told = {line.partition("=")[0]: line.partition("=")[2] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert told["#SBATCH --nodes"] == "2" and told["#SBATCH --gpus-per-node"] == "4"
    assert told["#SBATCH --signal"] == "B:TERM@300" and "#SBATCH --requeue" in told
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name, does in {
        "scontrol": 'if [ $1 = show ]; then echo a; echo b; else echo "$@" >> requeued; fi',
        "srun": 'echo "$@ $WHET_DRIVER" > ranks; sleep 0.1',
        "whet": "trap 'sleep 0.2; echo saved > saved; exit 130' TERM; touch started; while true; do sleep 0.05; done",
    }.items():
        (fakes / name).write_text(f"#!/bin/bash\n{does}\n")
        (fakes / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "ab",
        "SLURM_JOB_ID": "7",
    }
    job = subprocess.Popen(["bash", "job"], env=environment)
    while not (tmp_path / "started").exists():
        assert job.poll() is None
    job.terminate()
    assert job.wait(30) == 130
    assert (tmp_path / "saved").exists()  # the script waited for it
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert "--ntasks=8 --nodelist=a,b" in (tmp_path / "ranks").read_text()
    assert "a:29470" in (tmp_path / "ranks").read_text()


def test_a_template_of_your_own(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert whet("launch", "slurm", recipe, "--write", "mine.jinja", "--eject") == 0
    mine = Path("mine.jinja").read_text()
    Path("mine.jinja").write_text(mine.replace("--time=24:00:00", "--time=01:00:00 {{ job.ranks }}"))
    assert whet("launch", "slurm", recipe, "m.yaml", "--write", "job", "--template", "mine.jinja", "--json") == 0
    assert "--time=01:00:00 8\n" in Path("job").read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"ok": True, "file": "job", "submit": "sbatch job"}
    Path("mine.jinja").write_text("{{ job.rank }}")
    assert whet("launch", "slurm", recipe, "--write", "job", "--template", "mine.jinja") == 2
    assert "has no attribute 'rank'; --eject writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurn", "r.yaml", "--write", "job"], "'slurn' is no target; did you mean 'slurm'?"),
        (["slurm", "r.yaml"], "--write FILE: missing; name the file to write"),
        (["slurm", "s.yaml", "--write", "job"], "s.yaml: no such recipe"),
        (["slurm", "r.yaml", "machine.trainer.gpu=2", "--write", "job"], "did you mean 'gpus'?"),
        (["slurm", "r.yaml", "--write", "job", "--template", "no"], "--template no: cannot be read as text"),
        (["slurm", "r.yaml", "--server-gpus", "2", "--write", "job"], "no stage of RL has sampling.engine: vllm"),
        (["ray", "r.yaml", "--server-gpus", "2", "--write", "job"], "--server-gpus 2: under Ray there is none"),
    ],
)
def test_what_is_refused(recipe: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert whet("launch", *words) == 2
    assert message in capsys.readouterr().err
    assert not Path("job").exists()
