"""What OpenAI's chat completions look like on the wire: requests read strictly, answers and errors written.

A request that asks for something which would change the answer and is not done here is refused, never half done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from whet.data.strict import explain, parse_json
from whet.records import Message, ToolCall

SHOWN = 200
"""Characters of what a client sent that an error repeats."""


class Refusal(Exception):
    """A request that is not answered: an HTTP status and OpenAI's error object."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _arguments(text: Any) -> Any:
    try:
        return parse_json(text or "{}") if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {explain(error)[0]}") from error


class _Read(BaseModel):
    """A part of a request. Keys that mean nothing here are ignored, as clients send answers back whole."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


class _Part(_Read):
    type: Literal["text"]
    text: str


class _Called(_Read):
    name: str = Field(min_length=1)
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class _Call(_Read):
    id: str = ""
    type: Literal["function"] = "function"
    function: _Called


class ChatMessage(_Read):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant message has tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool message needs the tool_call_id that it answers")
        return self

    def record(self, names: Mapping[str, str]) -> Message:
        """The message as whet has it; `names` are those of calls, by their ids."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        calls = (ToolCall(name=c.function.name, arguments=c.function.arguments, id=c.id) for c in self.tool_calls or ())
        return Message(
            role=self.role,
            content=text,
            thinking=self.reasoning_content,
            tool_calls=tuple(calls),
            tool_call_id=self.tool_call_id,
            name=None if self.tool_call_id is None else names.get(self.tool_call_id),
        )


class _Schema(_Read):
    """As much of a JSON Schema as is read when calls are parsed."""

    properties: dict[str, _Schema] | None = None
    enum: list[Any] | None = None
    anyOf: list[_Schema] | None = None


class _Function(_Read):
    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    description: str | None = None
    parameters: _Schema | None = None


class _Tool(_Read):
    type: Literal["function"]
    function: _Function


class _StreamOptions(_Read):
    include_usage: bool = False


class _Format(_Read):
    type: Literal["text"]


class ChatBody(_Read):
    """The body of a chat completion. Keys that change no answer are taken and not read; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=16)
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=0)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    response_format: _Format | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for tool in tools or ():
            _Tool.model_validate(tool)
        names = [tool["function"]["name"] for tool in tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have one name")
        return tools

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > 4 or not all(0 < len(string) <= 64 for string in strings):
            raise ValueError("at most 4 strings of 1 to 64 characters")
        return stop

    @cached_property
    def conversation(self) -> tuple[Message, ...]:
        """The messages as whet has them, each result with the name of the tool that gave it."""
        names = {call.id: call.function.name for message in self.messages for call in message.tool_calls or ()}
        return tuple(message.record(names) for message in self.messages)

    @property
    def offered(self) -> tuple[dict[str, Any], ...]:
        """The tools that may be called."""
        return () if self.tool_choice == "none" else tuple(self.tools or ())

    @property
    def strings(self) -> tuple[str, ...]:
        """What ends an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def in_pieces(self) -> bool:
        """Whether text may be told before all is known: calls and log-probabilities belong to the whole."""
        return bool(self.stream) and not self.offered and not self.logprobs

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @cached_property
    def digest(self) -> str:
        """Equal for equal requests."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def read_body(data: bytes) -> ChatBody:
    """The request that a body holds. Raises `Refusal` (400), with the field and what is wrong there."""
    try:
        value = parse_json(data)
    except (ValueError, RecursionError) as error:
        what, remedy = explain(error)
        raise Refusal(400, f"the body is no JSON: {what}; {remedy}") from error
    try:
        return ChatBody.model_validate(value)
    except RecursionError as error:
        raise Refusal(400, "the body is nested too deeply") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:SHOWN]
        why = "this server does not know it" if first["type"] == "extra_forbidden" else first["msg"]
        raise Refusal(400, f"{place or 'the body'}: {why}", param=place or None) from error
