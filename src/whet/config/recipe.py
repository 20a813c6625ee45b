"""The recipe: one pydantic tree for YAML, the command line and Python.

Unknown keys are errors everywhere. A recipe's `model`, `train` and `sampling` sections are defaults that every
stage inherits and may override key by key (`loading.inherit`); after loading, each stage stands alone.

Defaults are published settings, named in `docs/`. Units are in the names: `_s` seconds, `_tokens` tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from whet.config.health import HealthConfig
from whet.config.policy import PolicyConfig


class Strict(BaseModel):
    """A section of a recipe: immutable, and no key may be misspelled."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )


# ------------------------------------------------------------------------------------------------ model


class CreateConfig(Strict):
    """A new Qwen3-architecture model with random weights and the byte-level tokenizer of `whet:tiny`."""

    hidden_size: int = Field(128, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    intermediate_size: int = Field(384, ge=8)
    max_length: int = Field(4096, ge=16)
    seed: int = 0


class ModelConfig(Strict):
    """Which weights to start from. In YAML `model: PATH` is short for `model: {path: PATH}`."""

    path: str
    """A hub id (`org/name`, `org/name@revision`), a local directory, `whet:demo` (the shipped tiny base model),
    `whet:tiny` (random weights of the shape in `create`), or `@stage` (what an earlier stage made)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the device computes it fast, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    chat_template: Path | None = None
    """A Jinja file that replaces the tokenizer's own chat template."""
    create: CreateConfig = CreateConfig()


# ------------------------------------------------------------------------------------------------- data


class DataConfig(Strict):
    """Rows from a file, a folder or the hub; the format is detected by the columns."""

    path: str
    """A `.jsonl`, `.json`, `.parquet` file (`.gz` too), a `datasets` directory or a hub id."""
    subset: str | None = None
    """Configuration of a hub data set (`main` for GSM8K)."""
    split: str = "train"
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "prompt"] = "auto"
    columns: dict[str, str] = {}
    """Our name: your column (`{prompt: question, completion: answer}`), or a text with `{column}` in braces."""
    system: str | None = None
    """A system message put before every conversation that has none."""
    limit: int | None = Field(None, ge=1)
    on_bad_row: Literal["error", "drop"] = "error"
    """drop: leave unusable rows out; how many and why is printed and logged."""


class GeneratedConfig(Strict):
    """Rows that a task family of `envs.library` generates; the same seed gives the same rows."""

    generate: Literal["arithmetic", "countdown"]
    count: int = Field(4096, ge=1)
    seed: int = 0
    split: Literal["train", "test"] = "train"
    """test: the tenth of all problems that is held out; a hash of the problem decides, so no seed can mix them."""
    digits: int = Field(3, ge=1, le=6)
    """arithmetic: most digits of a number."""
    bare: float = Field(0.0, ge=0, le=1)
    """arithmetic demonstrations: the share that only states the answer; the others show their steps."""
    plain: bool = False
    """arithmetic demonstrations: running text for pre-training, without chat turns."""
    numbers: int = Field(3, ge=2, le=6)
    """countdown: how many numbers may be used."""


def _source(value: Any) -> str:
    generated = "generate" in value if isinstance(value, dict) else isinstance(value, GeneratedConfig)
    return "generated" if generated else "rows"


Source = Annotated[
    Annotated[DataConfig, Tag("rows")] | Annotated[GeneratedConfig, Tag("generated")], Discriminator(_source)
]


# ------------------------------------------------------------------------------------------------ train


class LoraConfig(Strict):
    """Low-rank adapters through peft. `alpha` is divided by `rank` (by its root with `rslora`)."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = "all-linear"
    rslora: bool = False


class TrainConfig(Strict):
    """Optimizer steps: how many, how large, on what schedule."""

    lr: float = Field(1e-5, ge=0)
    steps: int | None = Field(None, ge=1)
    """SFT: optimizer steps, None: as many as `epochs` take. RL (required): batches of rollouts, each of which is
    `algorithm.minibatches` optimizer steps."""
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(32, ge=1)
    """SFT: sequences of one optimizer step, over all micro-batches and ranks."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Newton-Schulz updates (in float32) for the layers' matrices, AdamW for everything else."""
    muon_lr: float = Field(0.02, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = Field(0.0, ge=0)
    """Steps of linear warm-up; below 1 it is a share of all steps."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where linear and cosine end, as a share of `lr`."""
    clip_norm: float | None = Field(1.0, gt=0)
    max_length: int | None = Field(None, ge=2)
    """Longest row in tokens; None: the model's own limit. A longer row is an error or dropped, never cut silently."""
    microbatch_tokens: int = Field(16384, ge=1)
    """Most tokens computed at once. Changes memory and speed, never the gradient."""
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """SFT: assistant turns; only the last one (the completion); or every token."""


class RLTrainConfig(TrainConfig):
    """The same keys with RL's default: an update from samples is noisier than one from demonstrations."""

    lr: float = Field(1e-6, ge=0)


class SaveConfig(Strict):
    """Checkpoints. Whatever the interval, Ctrl-C and SIGTERM save before they leave."""

    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; None: as often as costs at most `overhead` of the time."""
    overhead: float = Field(0.05, gt=0, le=1)
    keep: int = Field(2, ge=2)
    """Generations kept; a damaged newest one falls back to the one before."""


class SamplingConfig(Strict):
    """How the policy is sampled."""

    max_tokens: int = Field(256, ge=1)
    """Most tokens of one completion, the stop token included."""
    temperature: float = Field(1.0, ge=0)
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    max_running: int = Field(256, ge=1)
    """Most sequences decoded side by side."""
    engine: Literal["embedded", "vllm"] = "embedded"
    """embedded: whet's own, on the trainer's weights. vllm: a vLLM engine in this process, which the weights are copied
    to after every step (`pip install 'whet[vllm]'`)."""
    cache_gib: float = Field(4.0, gt=0)
    """vllm: GiB for the keys and values of running sequences and shared prompts."""


# ---------------------------------------------------------------------------------------------- rewards


class RewardBase(Strict):
    """A named part of the reward: `weight` times what it returns is added to the score."""

    name: str | None = None
    weight: float = 1.0


class VerifierReward(RewardBase):
    """The task family's own checker (generated tasks)."""

    kind: Literal["verifier"]


class MathReward(RewardBase):
    """1 if the final answer equals the gold one mathematically (math-verify, in a process with a deadline)."""

    kind: Literal["math"]
    gold: str = "answer"
    """Column with the gold answer; `#### 42`, `\\boxed{42}` and `42` are understood."""
    deadline_s: float = Field(5.0, gt=0)


class ExactReward(RewardBase):
    """1 if the final answer equals the gold one as text, spaces and case aside."""

    kind: Literal["exact"]
    gold: str = "answer"


class FormatReward(RewardBase):
    """1 if the completion is `<think>...</think><answer>...</answer>` and nothing else (DeepSeek-R1)."""

    kind: Literal["format"]


class OverlongReward(RewardBase):
    """Soft overlong punishment (DAPO eq. 13): 0 up to `max_tokens - cache_tokens`, then down to -1."""

    kind: Literal["overlong"]
    cache_tokens: int = Field(ge=1)


class FunctionReward(RewardBase):
    """A function in a Python file with TRL's signature, run in its own process with a deadline."""

    kind: Literal["function"]
    path: str
    """`file.py:function`."""
    deadline_s: float = Field(30.0, gt=0)
    judges: bool = False
    """Whether a value of 1 means that the answer is right, or the function only shapes."""


RewardConfig = Annotated[
    VerifierReward | MathReward | ExactReward | FormatReward | OverlongReward | FunctionReward,
    Field(discriminator="kind"),
]


# ----------------------------------------------------------------------------------------------- stages


class StageBase(Strict):
    """What every stage has."""

    model: ModelConfig | None = None
    """None: what the stage before made, or the recipe's model for the first."""


class SFTStage(StageBase):
    """Supervised fine-tuning on conversations, prompt-completion pairs or text."""

    kind: Literal["sft"]
    data: Source
    eval_data: Source | None = None
    eval_every: int = Field(50, ge=1)
    """Steps between evaluation losses, where `eval_data` is given."""
    train: TrainConfig = TrainConfig()


class RLStage(StageBase):
    """Reinforcement learning with verifiable rewards: sample, score, weigh, step."""

    kind: Literal["rl"]
    tasks: Source
    rewards: list[RewardConfig] = Field(min_length=1)
    algorithm: PolicyConfig = PolicyConfig()
    prompts_per_step: int = Field(32, ge=1)
    rollouts_per_prompt: int = Field(8, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    train: RLTrainConfig = RLTrainConfig()
    health: HealthConfig = HealthConfig()
    max_gap: float = Field(0.5, gt=0)
    """Largest mean |sampler - trainer| log-probability difference per token; beyond it the run stops."""

    @model_validator(mode="after")
    def _check(self) -> RLStage:
        if self.train.steps is None:
            raise ValueError("train.steps must be given for RL: there is no epoch to end it")
        judging = ("verifier", "math", "exact")
        self.algorithm.check_step(
            prompts=self.prompts_per_step,
            rollouts=self.rollouts_per_prompt,
            judged=any(r.judges if isinstance(r, FunctionReward) else r.kind in judging for r in self.rewards),
            lora=self.train.lora is not None,
        )
        if self.algorithm.kl.renew_every and "back" in self.health.model_dump().values():
            raise ValueError("health: back cannot undo a renewed reference; leave algorithm.kl.renew_every out")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0 for RL: greedy samples carry no signal")
        if self.sampling.top_p < 1 or self.sampling.top_k is not None:
            raise ValueError(
                "sampling.top_p < 1 or top_k truncates the distribution that the policy gradient differentiates; "
                "use top_p 1 and no top_k for RL"
            )
        return self


class EvalStage(StageBase):
    """Sampled accuracy of several models on the same held-out tasks, with paired intervals."""

    kind: Literal["eval"]
    models: dict[str, str] = {}
    """Label: a model path, `@stage` or `@model` (what the recipe starts from). Empty: the model of the stage before."""
    baseline: str | None = None
    """Label of the model that the others' gains are over; None: the first one."""
    tasks: Source
    rewards: list[RewardConfig] = Field(min_length=1)
    samples: int = Field(4, ge=1)
    """Completions of each task."""
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _check(self) -> EvalStage:
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline is {self.baseline!r}, which is none of the labels in models")
        return self


Stage = Annotated[SFTStage | RLStage | EvalStage, Field(discriminator="kind")]

INHERITED = ("train", "sampling")
"""Sections that a recipe file may have at its top, as defaults of its stages; they are no fields of `Recipe`."""


class Recipe(Strict):
    """One file, one pipeline: named stages in order, each starting from what the one before made."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = 0
    out: Path | None = None
    """Run folder; None: `runs/NAME`."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads; auto: whichever of one and all cores is faster on the run's own shapes at this moment."""
    model: ModelConfig
    save: SaveConfig = SaveConfig()
    stages: dict[str, Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        seen: set[str] = set()
        for name, stage in self.stages.items():
            if not name.replace("-", "_").isidentifier():
                raise ValueError(f"stage name {name!r} must be letters, digits, - and _")
            if name == "model":
                raise ValueError("stage name 'model' is taken: @model means what the recipe starts from")
            paths = {"model.path": stage.model.path} if stage.model else {}
            if isinstance(stage, EvalStage):
                paths |= {f"models.{label}": path for label, path in stage.models.items()}
            for key, path in paths.items():
                if path.startswith("@") and path[1:] not in {*seen, "model"}:
                    earlier = ", ".join(f"@{other}" for other in self.stages if other in seen) or "none"
                    raise ValueError(f"stages.{name}.{key} is {path}, which is no earlier stage ({earlier})")
            if stage.kind != "eval":
                seen.add(name)
        return self
