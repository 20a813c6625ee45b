"""Recipes: their models, and loading with overrides, origins and "did you mean"."""

from whet.config.curriculum import CurriculumConfig
from whet.config.data import DataConfig, GeneratedConfig, Source, Sources
from whet.config.model import CreateConfig, ModelConfig
from whet.config.recipe import Recipe
from whet.config.reward_model import RewardModelStage
from whet.config.rewards import RewardConfig
from whet.config.stage import RowsBase
from whet.config.train import LoraConfig, SamplingConfig, SaveConfig, TrainConfig

__all__ = [
    "CreateConfig",
    "CurriculumConfig",
    "DataConfig",
    "GeneratedConfig",
    "LoraConfig",
    "ModelConfig",
    "Recipe",
    "RewardConfig",
    "RewardModelStage",
    "RowsBase",
    "SamplingConfig",
    "SaveConfig",
    "Source",
    "Sources",
    "TrainConfig",
]
