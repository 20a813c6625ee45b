"""Messages, tool calls and tools as they are found in files, read into our records.

One reader for both spellings, `{role, content}` (OpenAI, Hugging Face, LLaMA-Factory v1) and `{from, value}`
(ShareGPT), and for every way in which tool calls and their arguments are written: objects or JSON in a string.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from whet.data.faults import Place, kind_of, nearest
from whet.data.strict import explain, parse_json
from whet.records import Message, Role, ToolCall

ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant", "tool_call": "assistant", "tool": "tool",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
"""Every name of a role that is in use, and ours."""

CALLING = ("function_call", "tool_call")
"""Roles whose content is a tool call, or a list of them, as JSON."""

TRAIN_KEYS = ("weight", "loss_weight", "loss", "train", "trainable", "trained", "training")
"""Names under which tools keep "a loss may fall on this message"."""

TOOL_COLUMNS = ("tools", "tool_defs")
"""Names of the column of tools."""

THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")

MESSAGE_KEYS = frozenset({
    "role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "train_detail", "name", "id",
    *TRAIN_KEYS, *THINKING_KEYS,
})  # fmt: skip
"""Keys of a message that are read, or that say nothing to a model (`name`, `id`)."""


def parse_messages(value: Any, place: Place) -> tuple[Message, ...]:
    """A list of messages. A system message without text says nothing and is left out; other empty ones are errors."""
    if not isinstance(value, list):
        raise place.bad("not a list of messages", f"it is {kind_of(value)}")
    messages = (parse_message(item, place[index]) for index, item in enumerate(value))
    kept = tuple(message for message in messages if message.role != "system" or message.content)
    if not kept:
        raise place.bad("an empty list of messages")
    return kept


def parse_message(value: Any, place: Place) -> Message:
    """One message. Keys that mean nothing to us are ignored; `data.sources` names them."""
    if not isinstance(value, dict):
        raise place.bad("not a message", f"it is {kind_of(value)}; a message is an object with role and content")
    role_key, text_key = ("from", "value") if "from" in value else ("role", "content")
    if not isinstance(value.get(role_key), str):
        raise place[role_key].bad("no role", f"it is {kind_of(value.get(role_key))}; write system, user or assistant")
    if value[role_key] not in ROLES:
        raise place[role_key].bad(f"unknown role {value[role_key]!r}", nearest(value[role_key], ROLES))
    role = ROLES[value[role_key]]
    body = _body(value.get(text_key), place[text_key])
    if value[role_key] in CALLING:
        body = _Body(calls=_calls(_from_json(body.text, place[text_key]), place[text_key]))
    calls = body.calls
    if value.get("tool_calls") is not None:
        calls += _calls(value["tool_calls"], place["tool_calls"])
    if value.get("function_call") is not None:  # OpenAI's first spelling
        calls += (_call(value["function_call"], place["function_call"]),)
    if calls and role != "assistant":
        raise place.bad("a tool call outside an assistant message", f"its role is {role}")
    _check_content(value, text_key, body, role, has_calls=bool(calls), place=place)
    thinking = next((value[key] for key in THINKING_KEYS if value.get(key)), body.thinking)
    if thinking is not None and not isinstance(thinking, str):
        raise place["thinking"].bad("not text", f"it is {kind_of(thinking)}")
    call_id = value.get("tool_call_id")
    return Message(
        role=role,
        content=body.text,
        thinking=thinking,
        tool_calls=calls,
        tool_call_id=None if call_id is None else str(call_id),
        trained=_trained(value, place),
    )


def read_tools(columns: Mapping[str, Any], place: Place) -> tuple[dict[str, Any], ...]:
    """The tools of a row, under either name of their column."""
    name = next((key for key in TOOL_COLUMNS if columns.get(key)), TOOL_COLUMNS[0])
    return parse_tools(columns.get(name), place[name])


def read_settings(columns: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
    """Variables of the chat template for this row: TRL's `chat_template_kwargs`, and `enable_thinking` by itself."""
    settings = columns.get("chat_template_kwargs") or {}
    if isinstance(settings, str):
        settings = _from_json(settings, place["chat_template_kwargs"])
    if not isinstance(settings, dict):
        raise place["chat_template_kwargs"].bad("not an object", f"it is {kind_of(settings)}")
    settings = {key: value for key, value in settings.items() if value is not None}  # tables have every row's keys
    alone = columns.get("enable_thinking")
    return settings if alone is None else {"enable_thinking": alone, **settings}


def parse_tools(value: Any, place: Place) -> tuple[dict[str, Any], ...]:
    """A list of tools or its JSON, of OpenAI tools or of bare functions, as OpenAI tools."""
    if value is None or value == "":
        return ()
    value = _from_json(value, place)
    if not isinstance(value, list):
        raise place.bad("not a list of tools", f"it is {kind_of(value)}")
    return tuple(_tool(_from_json(item, place[index]), place[index]) for index, item in enumerate(value))


# ---------------------------------------------------------------------------------------------- content


@dataclass(frozen=True, slots=True, kw_only=True)
class _Body:
    """What stands in a content field."""

    text: str = ""
    thinking: str | None = None
    calls: tuple[ToolCall, ...] = ()


def _body(value: Any, place: Place) -> _Body:
    """Content is text, nothing (beside tool calls), or typed parts."""
    if value is None:
        return _Body()
    if isinstance(value, str):
        return _Body(text=value)
    if not isinstance(value, list):
        raise place.bad("not text", f"it is {kind_of(value)}")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: tuple[ToolCall, ...] = ()
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        inner = next((part[key] for key in ("text", "value", "thinking") if key in part), None) if kind else None
        if kind == "tool_call":
            calls += _calls(_from_json(inner, place[index]), place[index])
        elif kind in ("text", "reasoning", "thinking") and isinstance(inner, str):
            (texts if kind == "text" else thoughts).append(inner)
        else:
            raise place[index].bad("not a text part", f"whet trains on text only; it is {kind_of(part)}")
    return _Body(text="".join(texts), thinking="".join(thoughts) or None, calls=calls)


def _check_content(value: dict[str, Any], key: str, body: _Body, role: Role, *, has_calls: bool, place: Place) -> None:
    if has_calls or role == "system":
        return
    if value.get(key) is None:
        raise place[key].bad("no content", f"{nearest(key, value)}")
    if not body.text.strip() and role != "tool":  # a tool may well have printed nothing
        raise place[key].bad(f"the {role} message is empty", "fill it in or leave the row out")


def _trained(value: dict[str, Any], place: Place) -> bool | None:
    if value.get("train_detail"):
        raise place["train_detail"].bad(
            "trains parts of a message", "whet trains a message as a whole; remove it, and mark messages with train"
        )
    for key in TRAIN_KEYS:
        flag = value.get(key)
        if flag is not None:
            if flag not in (0, 1) or isinstance(flag, str):
                raise place[key].bad("neither 0 nor 1", f"it is {kind_of(flag)}; a message is trained on or it is not")
            return bool(flag)
    return None


# ------------------------------------------------------------------------------------------------ tools


def _calls(value: Any, place: Place) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    value = _from_json(value, place)
    if isinstance(value, dict):
        return (_call(value, place),)
    if not isinstance(value, list):
        raise place.bad("not a list of tool calls", f"it is {kind_of(value)}")
    return tuple(_call(_from_json(item, place[index]), place[index]) for index, item in enumerate(value))


def _call(value: Any, place: Place) -> ToolCall:
    """`{id, function: {name, arguments}}` or `{name, arguments}`."""
    if not isinstance(value, dict):
        raise place.bad("not a tool call", f"it is {kind_of(value)}")
    inner = value["function"] if isinstance(value.get("function"), dict) else value
    name = inner.get("name")
    if not isinstance(name, str) or not name:
        raise place["name"].bad("a tool call without a name", f"it is {kind_of(name)}")
    arguments = inner.get("arguments", inner.get("parameters"))
    arguments = {} if arguments in (None, "") else _from_json(arguments, place["arguments"])
    if not isinstance(arguments, dict):
        raise place["arguments"].bad("not an object", f"it is {kind_of(arguments)}")
    return ToolCall(name=name, arguments=arguments, id=str(value.get("id") or ""))


def _tool(value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise place.bad("not a tool", f"it is {kind_of(value)}")
    function = value["function"] if isinstance(value.get("function"), dict) else value
    if not isinstance(function.get("name"), str):
        raise place["name"].bad("a tool without a name", f"it is {kind_of(function.get('name'))}")
    return {"type": "function", "function": function}


def _from_json(value: Any, place: Place) -> Any:
    """The value, parsed where it is JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError) as error:
        raise place.bad(*explain(error)) from error
