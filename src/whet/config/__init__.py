"""Recipes: their models, and loading with overrides, origins and "did you mean"."""

from whet.config.policy import PolicyConfig
from whet.config.presets import PRESETS
from whet.config.recipe import (
    CreateConfig,
    DataConfig,
    EvalStage,
    GeneratedConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    RewardConfig,
    RLStage,
    SamplingConfig,
    SaveConfig,
    SFTStage,
    Source,
    Stage,
    TrainConfig,
)

__all__ = [
    "PRESETS",
    "CreateConfig",
    "DataConfig",
    "EvalStage",
    "GeneratedConfig",
    "LoraConfig",
    "ModelConfig",
    "PolicyConfig",
    "RLStage",
    "Recipe",
    "RewardConfig",
    "SFTStage",
    "SamplingConfig",
    "SaveConfig",
    "Source",
    "Stage",
    "TrainConfig",
]
