"""Recipes: their models, and loading with overrides, origins and "did you mean"."""

from whet.config.curriculum import CurriculumConfig
from whet.config.data import DataConfig, GeneratedConfig, Source, Sources
from whet.config.distill import DistillStage
from whet.config.evaluation import EvalStage
from whet.config.feedback import AgreementStage, CompareStage, QuestionsStage, ReviseStage, RowsBase, StepLabelsStage
from whet.config.machine import MachineConfig
from whet.config.merge import MergeInput, MergeStage
from whet.config.model import CreateConfig, ModelConfig, TeacherConfig
from whet.config.online_preference import OnlinePreferenceStage
from whet.config.policy import PolicyConfig
from whet.config.preference import LossConfig, PreferenceStage
from whet.config.presets import PRESETS
from whet.config.recipe import STAGES, Recipe, Stage
from whet.config.reward_model import RewardModelStage
from whet.config.rewards import RewardConfig
from whet.config.rl import RLStage
from whet.config.selection import SampleStage, SelectStage
from whet.config.sft import SFTStage
from whet.config.train import LoraConfig, SamplingConfig, SaveConfig, TrainConfig

__all__ = [
    "PRESETS",
    "STAGES",
    "AgreementStage",
    "CompareStage",
    "CreateConfig",
    "CurriculumConfig",
    "DataConfig",
    "DistillStage",
    "EvalStage",
    "GeneratedConfig",
    "LoraConfig",
    "LossConfig",
    "MachineConfig",
    "MergeInput",
    "MergeStage",
    "ModelConfig",
    "OnlinePreferenceStage",
    "PolicyConfig",
    "PreferenceStage",
    "QuestionsStage",
    "RLStage",
    "Recipe",
    "ReviseStage",
    "RewardConfig",
    "RewardModelStage",
    "RowsBase",
    "SFTStage",
    "SampleStage",
    "SamplingConfig",
    "SaveConfig",
    "SelectStage",
    "Source",
    "Sources",
    "Stage",
    "StepLabelsStage",
    "TeacherConfig",
    "TrainConfig",
]
