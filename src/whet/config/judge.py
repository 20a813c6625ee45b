"""Judges: the models that answer a recipe's questions, and what they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from whet.config.model import ModelConfig
from whet.config.strict import PythonFile, Strict


class ChatBase(Strict):
    """What every chat has."""

    free: ClassVar[frozenset[str]] = frozenset({"cache"})

    cache: Path | None = None
    """File in which answers are kept, so that what was asked once is not asked again. None: one inside the run's
    folder; name a file to share it between runs."""


class EndpointChat(ChatBase):
    """Any OpenAI-compatible endpoint."""

    free: ClassVar[frozenset[str]] = frozenset(
        {"cache", "api_key_env", "concurrency", "requests_per_minute", "attempts", "request_s", "deadline_s"}
    )

    base_url: str
    """Where the API begins: `https://host/v1`."""
    model: str
    api_key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself is never in a recipe."""
    temperature: float = Field(0.0, ge=0)
    concurrency: int = Field(16, ge=1)
    """Most requests that are under way together."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Requests are spread over time to stay below this; None: as fast as `concurrency` lets them."""
    attempts: int = Field(6, ge=1)
    """Times that a request is made before it counts as failed; 429, 5xx and broken connections are tried again."""
    request_s: float = Field(120.0, gt=0)
    """Deadline of one attempt."""
    deadline_s: float = Field(1800.0, gt=0)
    """Deadline of everything that is asked at once."""
    budget_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the endpoint spells the token budget."""


class LocalChat(ChatBase, ModelConfig):
    """A model on this machine, sampled by the embedded engine; with all keys of a `model` section."""

    free: ClassVar[frozenset[str]] = frozenset({"cache", "max_running"})
    temperature: float = Field(0.0, ge=0)
    max_running: int = Field(64, ge=1)
    """Most answers written side by side."""


class ScriptedChat(ChatBase):
    """A Python function from messages to text, in a process of its own: a rule, a test, or any client of your own."""

    script: PythonFile
    """`file.py:function` or `module:function`. It gets a list of `{role, content}` and returns the answer's text."""
    deadline_s: float = Field(30.0, gt=0)
    """Deadline of one answer; a function that is late is killed."""


def _tag(value: Any) -> str | None:
    keys = {"base_url": "endpoint", "path": "local", "script": "scripted"}
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return next((tag for key, tag in keys.items() if key in given), "endpoint")


ChatConfig = Annotated[
    Annotated[EndpointChat, Tag("endpoint")]
    | Annotated[LocalChat, Tag("local")]
    | Annotated[ScriptedChat, Tag("scripted")],
    Discriminator(_tag),
]
"""A chat client; its kind follows from its key: `base_url`, `path` or `script`."""


class JudgeWording(Strict):
    """What a judge is asked, in words."""

    criteria: str = "Judge how well the answer does what was asked: is it correct, complete and clear?"
    """What to judge by."""
    principles: list[str] | Path | None = None
    """A list of principles, or a text file with one a line (or a YAML list); each question is asked under one of them,
    drawn at random, in place of `criteria`."""
    scale: tuple[int, int] | Literal["yes_no"] = (1, 10)
    """For single answers: worst and best score, or `yes_no` (a verifier: is the answer good?)."""
    reasoning: bool = False
    """Whether the judge writes its reasons first."""
    visible: Literal["answer", "everything"] = "answer"
    """answer: what follows the thinking block. everything: the thinking, too."""

    @model_validator(mode="after")
    def _check_scale(self) -> JudgeWording:
        if not isinstance(self.scale, str) and not 0 <= self.scale[0] < self.scale[1] <= 100:
            raise ValueError("scale must be two whole numbers from 0 to 100, the worst score first")
        return self


class JudgeConfig(JudgeWording):
    """A judge: a model or script that decides which answer is better, or how good one is."""

    model: ChatConfig
    """The model that judges: `{path: ...}`, `{base_url: ..., model: ...}` or `{script: ...}`."""
    read: Literal["text", "probabilities"] = "text"
    """text: the verdict line that the judge writes. probabilities: the expected verdict under the model's own
    probabilities of the possible ones (GenRM, d-RLAIF); needs a local model."""
    votes: int = Field(1, ge=1)
    """How often each question is asked; the mean verdict counts, and only if more than half could be read."""
    disagreement: Literal["average", "tie"] = "average"
    """Pairs are asked in both orders. average: the mean of both (RLAIF). tie: no preference where they disagree."""
    clamp: tuple[float, float] | None = None
    """Bounds of a pair's preference; [0.4, 0.6] for labels after reasoning, which are overconfident (Constitutional
    AI)."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens of what the judge writes."""

    @model_validator(mode="after")
    def _check_judge(self) -> JudgeConfig:
        if self.read == "probabilities" and not isinstance(self.model, LocalChat):
            raise ValueError("read: probabilities needs the model's own log-probabilities; use model: {path: ...}")
        if self.votes > 1 and not isinstance(self.model, ScriptedChat) and self.model.temperature == 0:
            raise ValueError("votes above 1 at temperature 0 would be the same vote again; set model.temperature")
        if self.votes > 1 and self.read == "probabilities" and not self.reasoning:
            raise ValueError("votes of probabilities without reasoning are all the same; set reasoning: true")
        if self.clamp is not None and not 0 <= self.clamp[0] < 0.5 < self.clamp[1] <= 1:
            raise ValueError("clamp must be two numbers with 0.5 between them, like [0.4, 0.6]")
        return self
