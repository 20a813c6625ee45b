"""The model of a recipe: which weights to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from whet.config.strict import Made, Strict, path_of


class CreateConfig(Strict):
    """A new Qwen3-architecture model with random weights and the byte-level tokenizer of `whet:tiny`."""

    hidden_size: int = Field(128, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    intermediate_size: int = Field(384, ge=8)
    max_length: int = Field(4096, ge=16)
    seed: int = 0


class ReferenceModel(Strict):
    """A frozen model with the policy's tokenizer, loaded as the policy is. A path alone is short for it."""

    refers_to: ClassVar[Made | None] = "model"
    path: str
    """A hub id, a local directory, `@stage`, or `@model` (what the recipe starts from)."""


Reference = Annotated[
    ReferenceModel | None, BeforeValidator(path_of, json_schema_input_type=ReferenceModel | str | None)
]


class ModelConfig(Strict):
    """Which weights to start from. In YAML `model: PATH` is short for `model: {path: PATH}`."""

    refers_to: ClassVar[Made | None] = "model"
    path: str
    """A hub id (`org/name`, `org/name@revision`), a local directory, `whet:demo` (the shipped tiny base model),
    `whet:tiny` (random weights of the shape in `create`), or `@stage` (what an earlier stage made)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the device computes it fast, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    chat_template: Path | None = None
    """A Jinja file that replaces the tokenizer's own chat template, or one of ours: `whet:hermes` or `whet:tags`,
    ChatML with tools whose calls are JSON (as Qwen's) or plain tags; `whet:inline`, tags whose results stand in the
    answer that called (as Search-R1's), also for base models."""
    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """New tokens: each begins as the mean of those that spelled it. With LoRA name the embedding and the head in
    `train.lora.modules_to_save`."""
    create: CreateConfig = CreateConfig()

    def at(self, path: str) -> Self:
        """The same, with its weights from elsewhere."""
        return self.model_copy(update={"path": path})

    def alone(self) -> ModelConfig:
        """The model without what a section that is more than a model says besides."""
        return ModelConfig(**{key: getattr(self, key) for key in ModelConfig.model_fields})


class NamedModel(ModelConfig):
    """A model beside the one that a stage starts from. Its path alone is short for `{path: PATH}`."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


class TeacherConfig(NamedModel):
    """A frozen model that says what it thinks of the student's tokens."""
