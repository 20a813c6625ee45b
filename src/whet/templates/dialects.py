"""Tool calls by dialect: how families of models write them, as a table of small records.

A chat template writes calls; the dialect that reads back what it writes is found by trying (`probe.find_dialect`), so
both are held together by a round trip and not by a name. Calls are looked for in the sampled tokens: a marker that is
one token of the vocabulary counts only where that token was sampled, and its letters spelled otherwise are text.
Nothing inside thinking is a call, except where calls are inline (Search-R1, ReTool): there the sampler ends a turn at
the tag that closes a call, wherever it stands, and the next turn goes on in the same answer, behind the result. What is
wrong with a call is its status and its `error`: the policy is told, and nothing is run with guessed arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from whet.records import CallStatus, ToolCall

Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's parameters, by name."""

PRIVATE = 0xE000
"""The first of the characters that stand for marker tokens while a text is searched."""
THINKING = re.compile(r"<think>.*?(?:</think>|\Z)|\A(?:(?!<think>).)*?</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How calls begin and end, and how what stands between is read."""

    name: str
    begin: str
    """Regular expressions; NAMES stands for the names of the tools."""
    end: str
    read: Callable[[str, Schemas], list[ToolCall]]
    markers: tuple[str, ...] = ()
    """What in `begin` and `end` is a token of its own in the family's vocabulary."""
    most: int | None = None
    """Most calls of a turn that the family's templates can write."""
    inline: bool = False
    """Whether results stand inside the answer that called."""

    def stops(self, names: Iterable[str]) -> tuple[str, ...]:
        """Strings at which the sampler ends a turn that may call these tools."""
        return tuple(f"</{name}>" for name in names) if self.inline else ()

    def parse(
        self, pieces: Sequence[str | int], tools: Schemas, known: Collection[int] = ()
    ) -> tuple[str, tuple[ToolCall, ...]]:
        """(the text before the first call, all calls in order).

        A number in `pieces` is that marker, sampled as a token; `known` are those that are tokens of the vocabulary.
        """
        plain = "".join(piece if isinstance(piece, str) else self.markers[piece] for piece in pieces)
        text = "".join(_public(piece) if isinstance(piece, str) else chr(PRIVATE + piece) for piece in pieces)
        begin, end = (re.compile(self._pattern(p, tools, known), re.DOTALL) for p in (self.begin, self.end))
        thinking = [] if self.inline else [found.span() for found in THINKING.finditer(text)]
        calls: list[ToolCall] = []
        at, first = 0, None
        while (opened := begin.search(text, at)) is not None:
            inside = next((stop for start, stop in thinking if start <= opened.start() < stop), None)
            if inside is not None:
                at = inside
                continue
            first = opened.start() if first is None else first
            closed = end.search(text, opened.end())
            if closed is None:
                calls.append(failed("unclosed", "the call is not closed"))
                break
            calls += self.read(self._spelled(text[opened.end() : closed.start()]), tools)
            at = max(closed.end(), opened.end() + 1)
        if self.inline and not calls and end.search(text):
            calls.append(_unopened(plain))
        late = range(self.most or len(calls), len(calls))
        for place in late:
            calls[place] = replace(calls[place], status="over_limit", error=f"at most {self.most} call in a turn")
        return (plain if first is None else self._spelled(text[:first]).rstrip()), tuple(calls)

    def _pattern(self, source: str, tools: Schemas, known: Collection[int]) -> str:
        for index in known:
            source = source.replace(re.escape(self.markers[index]), chr(PRIVATE + index))
        return source.replace("NAMES", "|".join(map(re.escape, tools)) or r"(?!)")

    def _spelled(self, text: str) -> str:
        for index, marker in enumerate(self.markers):
            text = text.replace(chr(PRIVATE + index), marker)
        return text


def failed(status: CallStatus, error: str, name: str = "") -> ToolCall:
    """A call that is not run."""
    return ToolCall(name=name, arguments={}, status=status, error=error)


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> Schemas:
    """The parameters of tools in the OpenAI shape, by name."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


# --------------------------------------------------------------------------------------- between the markers


def _objects(body: str, tools: Schemas) -> list[ToolCall]:
    """JSON: an object with name and arguments (or parameters), a list of them, or several with `;` between."""
    decoder, calls, at = json.JSONDecoder(), list[ToolCall](), 0
    try:
        while (at := at + re.match(r"[\s;]*", body[at:]).end()) < len(body):  # type: ignore[union-attr]
            value, at = decoder.raw_decode(body, at)
            calls += [_call(each) for each in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError) as error:
        return [*calls, failed("invalid_json", f"the call is not JSON: {error}")]
    return calls or [failed("invalid_json", "the call is empty")]


def _call(value: Any) -> ToolCall:
    if not isinstance(value, dict):
        return failed("invalid_json", "a call is an object with name and arguments")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return failed("no_name", "the call has no name")
    return _with_arguments(name, value.get("arguments", value.get("parameters", {})))


def _with_arguments(name: str, arguments: Any) -> ToolCall:
    """Arguments as an object, or as JSON in a string. Half a surrogate pair is no text that could be shown again."""
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return failed("invalid_json", f"the arguments are not JSON: {error}", name)
    if not isinstance(arguments, dict):
        return failed("invalid_json", "the arguments are not an object", name)
    return ToolCall(name=name, arguments=arguments)


def _named(pattern: str) -> Callable[[str, Schemas], list[ToolCall]]:
    """A name and JSON, where the two groups of the pattern find them."""

    def read(body: str, tools: Schemas) -> list[ToolCall]:
        found = re.fullmatch(pattern, body, re.DOTALL)
        return [failed("no_name", "the call has no name")] if found is None else [_with_arguments(*found.groups())]

    return read


def _mistral(body: str, tools: Schemas) -> list[ToolCall]:
    return (_objects if "[ARGS]" not in body else _named(r"\s*(.+?)\[ARGS\](.*)"))(body, tools)


def _elements(name: str, key_value: str) -> Callable[[str, Schemas], list[ToolCall]]:
    """A name, then elements with a key and a value, which the tool's schema gives its type."""

    def read(body: str, tools: Schemas) -> list[ToolCall]:
        named = re.match(name, body, re.DOTALL)
        if named is None:
            return [failed("no_name", "the call has no name")]
        pairs = re.findall(key_value, body[named.end() :], re.DOTALL)
        tool = tools.get(named[1], {})
        return [ToolCall(name=named[1], arguments={key: typed(value, key, tool) for key, value in pairs})]

    return read


def _tag(body: str, tools: Schemas) -> list[ToolCall]:
    """`<NAME>...`: the value of a tool's only parameter, or an object with all of them."""
    name, _, inner = body[1:].partition(">")
    only = list(tools[name].get("properties", {}))
    if len(only) == 1:
        return [ToolCall(name=name, arguments={only[0]: typed(inner, only[0], tools[name])})]
    return [_with_arguments(name, inner.strip() or "{}")]


def _unopened(text: str) -> ToolCall:
    """What a turn calls that a tool's closing tag ended and no tool's opening tag began."""
    opened = re.findall(r"<([\w.-]+)>(?!.*</\1>)", text, re.DOTALL)[-1:]
    return failed("unknown_tool", f"<{opened[0]}> is no tool") if opened else failed("no_name", "nothing was opened")


def typed(value: str, key: str, parameters: Mapping[str, Any]) -> Any:
    """The text itself where the schema allows one, else what it is as JSON (the text where it is none)."""
    if "string" in _types(parameters.get("properties", {}).get(key, {})):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _types(schema: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(schema.get("type"), str):
        yield schema["type"]
    elif all(isinstance(value, str) for value in schema.get("enum", [None])):
        yield "string"
    for inner in schema.get("anyOf", ()):
        yield from _types(inner)


def _between(name: str, begin: str, end: str, read: Callable[[str, Schemas], list[ToolCall]]) -> Dialect:
    return Dialect(name, re.escape(begin), re.escape(end), read, (begin, end))


HERMES = ("<tool_call>", "</tool_call>")
QWEN_XML = _elements(r"\s*<function=(.+?)>", r"<parameter=(.+?)>\n?(.*?)\n?</parameter>")
GLM = _elements(r"\s*([^\s<>{}]+)\s*(?=<arg_key>|\Z)", r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>")
DEEPSEEK = _named(r"(?:function<｜tool▁sep｜>)?(.+?)(?:<｜tool▁sep｜>|\n```json\n)(.*?)(?:\n```)?")
KIMI = _named(r"\s*(?:functions\.)?(.+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>(.*)")
HARMONY = _named(r"([\w.-]+).*?<\|message\|>(.*)")
PYTHON_TAG = r"\A\s*(?:<\|python_tag\|>)?(?=\s*\{)"
DIALECTS = {
    each.name: each
    for each in (
        _between("hermes", *HERMES, _objects),
        _between("qwen_xml", *HERMES, QWEN_XML),
        _between("glm", *HERMES, GLM),
        Dialect("mistral", r"\[TOOL_CALLS\]", r"(?=\[TOOL_CALLS\])|\Z", _mistral, ("[TOOL_CALLS]",)),
        _between("deepseek", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", DEEPSEEK),
        _between("kimi", "<|tool_call_begin|>", "<|tool_call_end|>", KIMI),
        Dialect("harmony", r"to=functions\.", r"<\|call\|>|\Z", HARMONY, ("<|call|>",), most=1),
        Dialect("llama3", PYTHON_TAG, r"\Z", _objects, ("<|python_tag|>",), most=1),
        Dialect("tags", r"(?=<(?:NAMES)>)", r"</(?:NAMES)>", _tag),
        Dialect("inline", r"(?=<(?:NAMES)>)", r"</(?:NAMES)>", _tag, most=1, inline=True),
    )
}
"""By name. Where two read the same text, the first is meant; inline, where no stop token stands behind a call."""


def _public(text: str) -> str:
    """The text without the characters that stand for marker tokens."""
    return re.sub("[\ue000-\ue00f]", "\ufffd", text)
