"""OpenAI's grader objects, as their JSON has them."""

from __future__ import annotations

import ast
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from whet.config.strict import Strict

FUNCTIONS = ("min", "max", "abs", "floor", "ceil", "exp", "sqrt", "log")
"""What `calculate_output` may call."""
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Load, ast.Constant, ast.Add, ast.Sub, ast.Mult,
    ast.Div, ast.Pow, ast.USub, ast.UAdd,
)  # fmt: skip


class StringCheck(Strict):
    """1 if the operation holds of two texts, else 0."""

    type: Literal["string_check"]
    name: str = ""
    input: str
    """Template: `{{sample.output_text}}`, `{{item.COLUMN}}`."""
    reference: str
    operation: Literal["eq", "ne", "like", "ilike"]
    """Equal, not equal; the input contains the reference, with or without regard to case."""


class TextSimilarity(Strict):
    """How alike two texts are, from 0 to 1."""

    type: Literal["text_similarity"]
    name: str = ""
    input: str
    reference: str
    evaluation_metric: Literal["fuzzy_match", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"]
    pass_threshold: float | None = None
    """Kept for its owner; the value is the similarity itself, as in training there."""


class PythonGrader(Strict):
    """What `grade(sample, item)` in a Python text returns, run in a process of its own."""

    type: Literal["python"]
    name: str = ""
    source: str
    image_tag: str | None = None
    """Ignored: whet's Python runs it."""


class InputText(Strict):
    """A part of a message."""

    type: Literal["input_text"]
    text: str


class GraderMessage(Strict):
    """A message to the model that scores; a template, as all texts of graders."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | InputText


class ScoreModel(Strict):
    """A number within `range` that a model gives."""

    type: Literal["score_model"]
    name: str = ""
    model: str
    """Its name there: here the reward's own `model` is asked."""
    input: list[GraderMessage] = Field(min_length=1)
    range: tuple[float, float] = (0.0, 1.0)
    pass_threshold: float | None = None
    """Kept for its owner, as in `text_similarity`."""
    sampling_params: dict[str, Any] | None = None
    """Ignored: the temperature is that of the reward's `model`."""


Single: TypeAlias = StringCheck | TextSimilarity | PythonGrader | ScoreModel


class MultiGrader(Strict):
    """An arithmetic expression over other graders' values, by their keys."""

    type: Literal["multi"]
    name: str = ""
    graders: dict[str, Annotated[Single, Field(discriminator="type")]]
    calculate_output: str

    @field_validator("calculate_output")
    @classmethod
    def _check_expression(cls, text: str) -> str:
        try:
            tree = ast.parse(text.replace("^", "**"), mode="eval")
        except SyntaxError as error:
            raise ValueError(f"calculate_output {text!r} is no arithmetic: {error.msg}") from error
        for node in ast.walk(tree):
            if not isinstance(node, _ARITHMETIC) or (isinstance(node, ast.Constant) and type(node.value) is str):
                raise ValueError(
                    f"calculate_output {text!r} may hold numbers, graders, + - * / ^ and {', '.join(FUNCTIONS)}"
                )
        return text

    @model_validator(mode="after")
    def _check_names(self) -> MultiGrader:
        tree = ast.parse(self.calculate_output.replace("^", "**"), mode="eval")
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if unknown := sorted(names - self.graders.keys() - set(FUNCTIONS)):
            raise ValueError(f"calculate_output names {', '.join(unknown)}; the graders are {', '.join(self.graders)}")
        return self


Grader = Annotated[Single | MultiGrader, Field(discriminator="type")]
