"""Where a run computes: ranks of the trainer, samplers, deadlines. Never part of what a stage is (`pipeline.identity`).

`whet run recipe.yaml machine.yaml` lays a second file, which has this section alone, over the recipe's own; so a recipe
says what is learned, and a machine file where. Every number is of one run.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from whet.config.strict import Strict


class TrainerRanks(Strict):
    """The trainer's processes. A step has the same gradient whatever their number (`docs/scale.md`)."""

    nodes: int = Field(1, ge=1)
    """Machines that hold ranks."""
    gpus: int = Field(1, ge=1)
    """Ranks on each node: one a GPU, or on a CPU one a process. 1 on one node: the trainer is in the driver's process.
    """
    replicate: int = Field(1, ge=1)
    """Copies of the sharded model (HSDP): each is spread over ranks / replicate."""
    context: int = Field(1, ge=1)
    """Ranks that compute a micro-batch together, each a part of its tokens (Ulysses), for rows that are too long for
    one. It divides the model's heads."""
    experts: int = Field(1, ge=1)
    """Nothing but 1: experts are sharded over all ranks like any other layer."""

    @model_validator(mode="after")
    def _check(self) -> TrainerRanks:
        for key in ("replicate", "context"):
            if self.ranks % getattr(self, key):
                raise ValueError(f"{key}: {getattr(self, key)} must divide the {self.ranks} ranks (nodes x gpus)")
        if self.experts > 1:
            raise ValueError(
                f"experts: {self.experts}, and there is no expert parallelism; set 1: experts are sharded over all "
                "ranks like any other layer"
            )
        return self

    @property
    def ranks(self) -> int:
        """All processes of the trainer."""
        return self.nodes * self.gpus


class Samplers(Strict):
    """The processes that sample."""

    replicas: int = Field(0, ge=0)
    """Sampler processes. 0: the sampler is in the driver's process."""
    gpus: int = Field(1, ge=1)
    """GPUs of each."""
    place: Literal["apart", "beside"] = "apart"
    """beside: on the trainer's GPUs, in turns with it."""


class Deadlines(Strict):
    """How long each wait may take, in seconds; what is late is an error that names what is awaited from where."""

    start_s: float = Field(1200, gt=0)
    """Until a process that was started answers: models are loaded meanwhile."""
    request_s: float = Field(600, gt=0)
    """One request to a sampler."""
    hand_over_s: float = Field(300, gt=0)
    """Weights on their way to the samplers."""
    collective_s: float = Field(600, gt=0)
    """One exchange among the trainer's ranks."""
    progress_s: float = Field(1800, gt=0)
    """One command to the trainer's ranks, or any other stretch without progress."""


class Restarts(Strict):
    """How often what died is started again before the run gives up, with everything saved."""

    sampler: int = Field(5, ge=0)
    """Restarts of each sampler process; 20 hand-overs without a death give all of them back."""
    trainer: int = Field(3, ge=0)
    """Restarts of all ranks together, from the last checkpoint; a new checkpoint gives all of them back."""


class MachineConfig(Strict):
    """Where a run computes and how patient it is; the same recipe learns the same on any machine."""

    launch: Literal["local", "ray"] = "local"
    """What starts the ranks of the trainer: this machine, or a launcher that `WHET_DRIVER` tells of; or Ray, as actors
    in the cluster of `RAY_ADDRESS` or in one of this machine (`pip install 'whet[ray]'`)."""
    trainer: TrainerRanks = TrainerRanks()
    samplers: Samplers = Samplers()
    hand_over: Literal["auto", "files"] = "auto"
    """How weights get to samplers in other processes: as files, in both cases."""
    deadlines: Deadlines = Deadlines()
    restarts: Restarts = Restarts()
