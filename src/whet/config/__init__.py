"""Recipes: their models, and loading with overrides, origins and "did you mean"."""

from whet.config.data import DataConfig, GeneratedConfig, Source, Sources
from whet.config.distill import DistillStage
from whet.config.evaluation import EvalStage
from whet.config.machine import MachineConfig
from whet.config.merge import MergeInput, MergeStage
from whet.config.model import CreateConfig, ModelConfig, TeacherConfig
from whet.config.policy import PolicyConfig
from whet.config.preference import LossConfig, OnlinePreferenceStage, PreferenceStage
from whet.config.presets import PRESETS
from whet.config.recipe import STAGES, Recipe, Stage
from whet.config.reward_model import RewardModelStage
from whet.config.rewards import RewardConfig
from whet.config.rl import CurriculumConfig, RLStage
from whet.config.rows import SampleStage, SelectStage
from whet.config.sft import SFTStage
from whet.config.train import LoraConfig, SamplingConfig, SaveConfig, TrainConfig
