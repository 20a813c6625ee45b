"""Sampler processes for a policy: a fleet on this machine, with the engine and the shapes that the trainer has."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from whet.config import LoraConfig, MachineConfig, ModelConfig, SamplingConfig, TrainConfig
from whet.config.lag import LagConfig
from whet.errors import ConfigError
from whet.models.language import LanguageModel
from whet.models.matmul import library
from whet.sampling.base import ApartSampler, PolicySampler
from whet.sampling.fleet import Fleet
from whet.sampling.vllm_server import VllmServerSampler


def start_fleet(
    weights: Callable[[], LanguageModel],
    model: ModelConfig,
    train: TrainConfig,
    sampling: SamplingConfig,
    machine: MachineConfig,
    lag: LagConfig | None,
    folder: Path | None,
) -> Fleet | None:
    """The processes begin to start, and load `model` for themselves; they get the `weights` of a model here.

    None where the stage has no lag, or the machine no sampler processes. Raises `ConfigError` for what such processes
    are not made for.
    """
    if lag is None or not machine.samplers.replicas:
        return None
    language = weights()
    if language.device.type != "cpu" or machine.samplers.place != "apart":
        raise ConfigError(
            f"machine.samplers: the model is on {language.device.type} and place is {machine.samplers.place}; sampler "
            "processes are for CPUs, apart from the trainer; set replicas: 0, or model.device: cpu and place: apart"
        )
    lora: LoraConfig | None = train.lora
    options = {
        "model": model.model_dump(mode="json"),
        "lora": None if lora is None else lora.model_dump(mode="json"),
        "quantised": train.quantize is not None,
        "max_running": sampling.max_running,
        "cache_gib": sampling.cache_gib,
        "threads": torch.get_num_threads(),
        "products": library(),
    }
    return Fleet(
        language,
        machine,
        options,
        (folder or Path(tempfile.mkdtemp(prefix="whet-"))) / "hand_over",
        past=lag.steps if lag.steps and lag.order == "exact" else None,
        say=logging.getLogger(__name__).warning,
    )


def servers_ahead(lag: LagConfig | None, start: Callable[[], PolicySampler]) -> ApartSampler | None:
    """The recipe's vLLM servers, where they are to sample ahead."""
    if lag is None or not lag.steps:
        return None
    sampler = start()
    assert isinstance(sampler, VllmServerSampler), "a lag is of sampler processes or servers (`Recipe`)"
    return sampler
