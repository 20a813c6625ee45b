"""Files that start a run under Slurm, Kubernetes, SkyPilot or Ray: written, to be read and submitted; never submitted.

In each, `whet run` is the driver on the first machine; the trainer's ranks are started beside it and on the others
(`python -m whet.launch.rank`, again after a failure), and a vLLM server where the recipe samples with one. A signal
before a preemption reaches the driver alone, which saves and ends with exit code 130; the same command then goes on.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from whet.config.loading import load_recipe
from whet.config.problems import nearest
from whet.config.recipe import Recipe
from whet.config.rl import RLStage
from whet.errors import ConfigError
from whet.sampling.vllm_flags import SERVER_FLAGS

TEMPLATES = Path(__file__).parent / "templates"
SUBMIT = {
    "slurm": "sbatch {file}",
    "kubernetes": "kubectl apply -f {file}",
    "skypilot": "sky jobs launch {file}",
    "ray": "kubectl apply -f {file}",
}
"""Targets, and how their files are submitted."""
IN_POD = ("kubernetes", "ray")
"""Where the recipe's files are part of what is written."""
PORT = 29470
GRACE_S = 300
"""From the signal to the end: a step and a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a template knows as `job`."""

    name: str
    file: str
    command: str
    """`whet run` with its words."""
    nodes: int
    """Machines with ranks."""
    per_node: int
    gpus: int
    """Of a machine; 0 on CPUs."""
    files: Mapping[str, str]
    """Recipe and machine files by name."""
    key: str
    """What driver and ranks prove to one another that they know."""
    image: str
    accelerator: str
    engine: str = ""
    """The command of the vLLM server, on one more machine; empty: whet samples in the driver."""
    engine_gpus: int = 0
    shared: str = ""
    """The folder that weights go through to the server."""
    port: int = PORT
    grace_s: int = GRACE_S

    @property
    def ranks(self) -> int:
        """Of the trainer."""
        return self.nodes * self.per_node

    @property
    def machines(self) -> int:
        """With the server's."""
        return self.nodes + bool(self.engine)

    @property
    def remote(self) -> bool:
        """Whether ranks are started by the file; on one machine the driver does it."""
        return self.nodes > 1


def template_of(target: str) -> str:
    """The template of a target. Raises `ConfigError` for another name."""
    if target not in SUBMIT:
        raise ConfigError(f"{target!r} is no target{nearest(target, list(SUBMIT))}")
    return (TEMPLATES / f"{target}.jinja").read_text()


def job_of(
    target: str,
    recipe: Path,
    words: Sequence[str],
    *,
    file: str,
    key: str,
    image: str,
    accelerator: str,
    server_gpus: int = 0,
) -> Job:
    """The job of `whet run RECIPE WORDS`, which must load; `server_gpus`: of a vLLM server. Raises `ConfigError`."""
    loaded = load_recipe(recipe, words).recipe
    paths = [recipe, *(Path(word) for word in words if word.endswith((".yaml", ".yml")) and "=" not in word)]
    names = {str(path): f"/recipe/{path.name}" for path in paths} if target in IN_POD else {}
    said = ["whet", "run", *(names.get(word, word) for word in (str(recipe), *words))]
    if target == "ray":
        said.append("machine.launch=ray")
    trainer = loaded.machine.trainer
    job = Job(
        name=re.sub(r"[^a-z0-9]+", "-", loaded.name.lower()).strip("-"),
        file=file,
        command=shlex.join(said),
        nodes=trainer.nodes,
        per_node=trainer.gpus,
        gpus=0 if loaded.model.device == "cpu" else trainer.gpus,
        files={path.name: path.read_text() for path in paths} if target in IN_POD else {},
        key=key,
        image=image,
        accelerator=accelerator,
    )
    return _with_engine(target, job, loaded, server_gpus) if server_gpus else job


def render(template: str, job: Job) -> str:
    """The file. Raises `ConfigError` where a template of the user's asks for what there is not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # shell and YAML, nothing of it HTML
    ranks = environment.get_template("ranks.sh.jinja")
    try:
        text = environment.from_string(template)
        return text.render(job=job, ranks=lambda node: ranks.render(job=job, node=node).rstrip())
    except jinja2.TemplateError as error:
        raise ConfigError(f"the template: {error}; --eject writes the one that is shipped") from error


def _with_engine(target: str, job: Job, recipe: Recipe, gpus: int) -> Job:
    """With a vLLM server on so many GPUs for the stages of RL that sample with vLLM."""
    stages = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, RLStage) and _by_vllm(stage)}
    if target == "ray" or not stages:
        why = "under Ray there is none" if target == "ray" else "no stage of RL has sampling.engine: vllm and no server"
        raise ConfigError(f"--server-gpus {gpus}: {why}; leave it out")
    lora = next(iter(stages.values())).train.lora
    environment = ["VLLM_SERVER_DEV_MODE=1", *(["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"] if lora else [])]
    running = max(stage.sampling.max_running for stage in stages.values())
    command = ["vllm", "serve", recipe.model.path, *SERVER_FLAGS, "--max-num-seqs", str(running)]
    command += ["--port", "8000", "--tensor-parallel-size", str(gpus)]
    command += ["--enable-lora", "--max-lora-rank", str(lora.rank), "--max-loras", "2"] if lora else []
    shared = f"{'/runs' if target in IN_POD else 'runs'}/hand_over-{job.name}"
    told = " ".join(
        f'stages.{name}.sampling.server="http://$ENGINE:8000" stages.{name}.sampling.server_folder={shared}'
        for name in stages
    )
    return replace(
        job, command=f"{job.command} {told}", engine=shlex.join([*environment, *command]), engine_gpus=gpus,
        shared=shared,
    )  # fmt: skip


def _by_vllm(stage: RLStage) -> bool:
    return stage.sampling.engine == "vllm" and stage.sampling.server is None
