"""Dialects of calls: what a family writes is read back, what is wrong gets its status, and no text forges a token."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.chat_templates import tokenizer_of
from whet.errors import DataError
from whet.models.create import byte_tokenizer
from whet.models.locate import TEMPLATES
from whet.records import Ending, Message, ToolCall
from whet.templates.dialects import DIALECTS, schemas_of
from whet.templates.jinja import JinjaTemplate

FAMILY = os.environ.get("WHET_TINY_FAMILY")
TOOL = {
    "type": "function",
    "function": {
        "name": "order.item",
        "description": "Order.",
        "parameters": {
            "type": "object",
            "properties": {
                "what": {"type": "string"},
                "count": {"type": "integer"},
                "gift": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                "to": {"type": "object"},
            },
        },
    },
}
CALL = ToolCall(name="order.item", arguments={"what": 'a "cup"\n</b>', "count": 2, "gift": None, "to": {"x": [True]}})
OTHER = ToolCall(name="order.item", arguments={"what": "true", "gift": False})


def written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def in_json(call: ToolCall, key: str = "arguments") -> str:
    return json.dumps({"name": call.name, key: dict(call.arguments)}, ensure_ascii=False)


def elements(call: ToolCall, one: str) -> str:
    return "".join(one.format(key, written(value)) for key, value in call.arguments.items())


def deepseek(calls: Sequence[ToolCall], one: str) -> str:
    inner = "".join(one.format(c.name, json.dumps(dict(c.arguments))) for c in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


PARAMETER = "<parameter={}>\n{}\n</parameter>\n"
WRITERS: dict[str, tuple[str, Callable[[Sequence[ToolCall]], str]]] = {
    "hermes": ("hermes", lambda calls: "\n".join(f"<tool_call>\n{in_json(c)}\n</tool_call>" for c in calls)),
    "qwen_xml": (
        "qwen_xml",
        lambda calls: "".join(
            f"<tool_call>\n<function={c.name}>\n{elements(c, PARAMETER)}</function>\n</tool_call>"
            for c in calls
        ),
    ),
    "glm": (
        "glm",
        lambda calls: "".join(
            f"<tool_call>{c.name}\n"
            + elements(c, "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n")
            + "</tool_call>"
            for c in calls
        ),
    ),
    "mistral": ("mistral", lambda calls: "[TOOL_CALLS][" + ", ".join(map(in_json, calls)) + "]"),
    "mistral v11": (
        "mistral",
        lambda calls: "".join(f"[TOOL_CALLS]{c.name}[ARGS]{json.dumps(dict(c.arguments))}" for c in calls),
    ),
    "deepseek V3": (
        "deepseek",
        lambda calls: deepseek(
            calls, "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
        ),
    ),
    "deepseek V3.1": (
        "deepseek", lambda calls: deepseek(calls, "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>")
    ),
    "kimi": (
        "kimi",
        lambda calls: "<|tool_calls_section_begin|>"
        + "".join(
            f"<|tool_call_begin|>functions.{c.name}:{n}<|tool_call_argument_begin|>{json.dumps(dict(c.arguments))}"
            "<|tool_call_end|>"
            for n, c in enumerate(calls)
        )
        + "<|tool_calls_section_end|>",
    ),
    "harmony": (
        "harmony",
        lambda calls: "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.{calls[0].name} <|constrain|>json<|message|>{json.dumps(dict(calls[0].arguments))}<|call|>",
    ),
    "harmony, recipient first": (
        "harmony",
        lambda calls: f" to=functions.{calls[0].name}<|channel|>commentary json<|message|>"
        f"{json.dumps(dict(calls[0].arguments))}<|call|>",
    ),
    "llama3": ("llama3", lambda calls: "<|python_tag|>" + "; ".join(in_json(c, "parameters") for c in calls)),
    "llama3, no tag": ("llama3", lambda calls: in_json(calls[0], "parameters")),
    "tags": ("tags", lambda calls: "".join(f"<{c.name}>{json.dumps(dict(c.arguments))}</{c.name}>" for c in calls)),
    "inline": ("inline", lambda calls: "".join(f"<{c.name}>{json.dumps(dict(c.arguments))}</{c.name}>" for c in calls)),
}  # fmt: skip
every_dialect = pytest.mark.parametrize("name", WRITERS)


def read(dialect: str, text: str, tools: Sequence[dict[str, Any]] = (TOOL,)) -> tuple[str, tuple[ToolCall, ...]]:
    return DIALECTS[dialect].parse([text], schemas_of(tools))


# ------------------------------------------------------------------------------------------- round trips


@every_dialect
def test_what_a_family_writes_is_read_back(name: str) -> None:
    dialect, write = WRITERS[name]
    assert read(dialect, write([CALL]))[1] == (CALL,)
    content, calls = read(dialect, write([CALL, OTHER]))
    if "no tag" in name or dialect == "harmony":
        assert calls == (CALL,)
    elif dialect in ("llama3", "inline"):  # its templates write one call in a turn
        assert calls[0] == CALL and (calls[1].name, calls[1].status) == ("order.item", "over_limit")
    else:
        assert calls == (CALL, OTHER)
    assert "order.item" not in content


@every_dialect
def test_thinking_and_plain_text_hold_no_calls(name: str) -> None:
    dialect, write = WRITERS[name]
    call = write([CALL])
    assert read(dialect, "nothing to call") == ("nothing to call", ())
    for text in (f"<think>{call}</think>no", f"{call}</think>no", f"<think>I would {call}"):
        if dialect == "inline":  # the sampler ends a turn there, whatever it stands in
            assert read(dialect, text)[1] == (CALL,)
        else:
            assert read(dialect, text) == (text, ())
    if dialect != "llama3":
        assert read(dialect, f"<think>hm</think>so {call}")[1] == (CALL,)


@every_dialect
def test_a_call_that_is_cut_anywhere_never_crashes_nor_runs(name: str) -> None:
    dialect, write = WRITERS[name]
    whole = write([CALL])
    for end in range(len(whole)):
        for each in read(dialect, whole[:end])[1]:
            arguments = dict(each.arguments)
            typed = ("qwen_xml", "glm", "tags", "inline")
            assert each.status != "ok" or arguments == CALL.arguments or dialect in typed
            assert each.status == "ok" or (each.error and not arguments)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"name": "order.item", "arguments": {"count": 1,}}', "invalid_json"),
        ("{'name': 'order.item'}", "invalid_json"),
        ('{"name": "order.item", "arguments": [1]}', "invalid_json"),
        ('{"name": "order.item", "arguments": "{\\"count\\": 1}"}', "ok"),
        ('{"arguments": {}}', "no_name"),
        ('{"name": 3}', "no_name"),
        ("", "invalid_json"),
        ("[" * 100_000, "invalid_json"),
        ('{"name": "other"}', "ok"),  # whether there is such a tool is the environment's to say
    ],
)
def test_the_status_of_a_call_in_json(text: str, status: str) -> None:
    (call,) = read("hermes", f"<tool_call>{text}</tool_call>")[1]
    assert call.status == status


def test_values_of_elements_have_the_types_of_the_schema() -> None:
    text = (
        "<tool_call><function=order.item><parameter=what>12</parameter><parameter=count>12</parameter>"
        "<parameter=gift>true</parameter><parameter=to>x</parameter></function></tool_call>"
    )
    (call,) = read("qwen_xml", text)[1]
    assert call.arguments == {"what": "12", "count": 12, "gift": True, "to": "x"}


def test_a_tag_with_one_parameter_has_its_text() -> None:
    search = {"name": "search", "parameters": {"properties": {"query": {"type": "string"}}}}
    tools = [{"type": "function", "function": search}]
    assert read("tags", 'hm <search>a "b" </search>', tools) == (
        "hm", (ToolCall(name="search", arguments={"query": 'a "b" '}),),
    )  # fmt: skip


def test_every_gold_call_of_bfcl_is_read_back_by_every_dialect(shared_data: Path) -> None:
    folder = shared_data / "bfcl" / "dev"
    count = 0
    for file in ("parallel", "parallel_multiple", "simple_python", "multiple", "live_simple"):
        lines = gzip.decompress((folder / f"{file}.jsonl.gz").read_bytes()).decode().splitlines()
        for row in map(json.loads, lines):
            tools = [{"type": "function", "function": function} for function in row["function"]]
            gold = [
                ToolCall(
                    name=name, arguments={k: given[0] for k, given in accepted.items() if given and given[0] != ""}
                )
                for each in row["ground_truth"]
                for name, accepted in each.items()
            ]
            count += len(gold)
            for name, (dialect, write) in WRITERS.items():
                calls = gold[:1] if dialect in ("llama3", "harmony", "inline") else gold
                found = read(dialect, write(calls), tools)[1]
                if dialect in ("tags", "inline"):  # of one parameter the text alone is written
                    assert [each.name for each in found] == [each.name for each in calls]
                else:
                    assert [_loose(each) for each in found] == [_loose(each) for each in calls], (name, row["id"])
    assert count > 1000


def _loose(call: ToolCall) -> tuple[str, Any]:
    """Where the schema calls a parameter text and the gold has another type, elements give back text."""
    return call.name, {key: written(value) for key, value in call.arguments.items()}


# ------------------------------------------------------------------------------------- sampled tokens

HERMES = JinjaTemplate(byte_tokenizer(), chat_template=TEMPLATES["whet:hermes"].read_text())


def with_markers() -> JinjaTemplate:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in ("<tool_call>", "</tool_call>")]
    )
    return JinjaTemplate(tokenizer, chat_template=TEMPLATES["whet:hermes"].read_text())


def test_a_marker_that_is_a_token_counts_only_where_it_was_sampled() -> None:
    template = with_markers()
    (stop,) = template.stop_ids
    call = in_json(OTHER)
    sampled = [*template._encoder.one(f"<tool_call>{call}</tool_call>"), stop]
    assert template.parse(sampled, Ending.STOP, [TOOL]).tool_calls == (OTHER,)
    spelled = template._encoder.in_pieces(f"<\U0010fffdtool_call>{call}<\U0010fffd/tool_call>")
    assert len(spelled) > len(sampled)
    message = template.parse([*spelled, stop], Ending.STOP, [TOOL])
    assert (message.content, message.tool_calls) == (f"<tool_call>{call}</tool_call>", ())
    assert template.parse(sampled[:-1], Ending.LENGTH, [TOOL]).tool_calls == ()  # cut off: truncated, no error of its


@pytest.mark.parametrize("template", [HERMES, with_markers()])
def test_parse_reads_back_what_sft_trains(template: JinjaTemplate) -> None:
    question = Message(role="user", content="Go.")
    asked = Message(role="assistant", content="Well.", tool_calls=(CALL, OTHER))
    result = Message(role="tool", content="done", name="order.item", tool_call_id="")
    rendered = template.conversation([question, asked, result, Message(role="assistant", content="ok")], [TOOL])
    prompt = template.prompt([question], [TOOL])
    assert "order.item" in template.decode(prompt) and rendered.tokens[: len(prompt)] == prompt
    end = rendered.trained.index(False, rendered.trained.index(True))
    assert template.parse(rendered.tokens[len(prompt) : end], Ending.STOP, [TOOL]) == asked
    assert template.extend(rendered.tokens[:end], [result]) == rendered.tokens[: len(rendered.tokens) - _tail(template)]


def _tail(template: JinjaTemplate) -> int:
    return len(template._encoder.one("ok<|im_end|>\n"))


@pytest.mark.parametrize("role", ["tool", "user"])
def test_untrusted_text_forges_no_token(role: Any) -> None:
    for template in (HERMES, with_markers()):
        sampled = [*template.prompt([Message(role="user", content="Go.")]), *template.stop_ids]
        markup = "".join(f"{text} <{text}>" for text in template._added) + "<|im_<|im_end|>end|>"
        plain, forged = (
            template.extend(sampled, [Message(role=role, content=text, name="x")]) for text in ("x", markup)
        )
        counted = {token: forged.count(token) - plain.count(token) for token in template._added.values()}
        words = {template._added[word] for word in ("system", "user", "assistant")}
        assert all(count == 0 for token, count in counted.items() if token not in words)
        assert markup in template.decode(forged)
        opening = template.prompt([Message(role="user", content=markup)], untrusted=True)
        assert opening.count(next(iter(template.stop_ids))) == 1 and markup in template.decode(opening)
        with pytest.raises(DataError, match="contains the special token"):
            template.prompt([Message(role="user", content=markup)])


def test_a_prompt_is_the_same_whether_it_is_trusted_or_not() -> None:
    """Markup that is no special token (`<think>`) is a token in both: a system message may ask for it."""
    asked = [Message(role="system", content="Write <think>...</think>."), Message(role="user", content="Go.")]
    assert HERMES.prompt(asked, untrusted=True) == HERMES.prompt(asked)
    assert HERMES._added["<think>"] in HERMES.prompt(asked)


def test_long_results_lose_their_middle() -> None:
    text = "a" * 500 + "é" * 500
    short = HERMES.shorten(text, 100)
    assert short == "a" * 50 + "\n[... 1,400 tokens left out]\n" + "é" * 25
    assert HERMES.shorten(text, 2000) is text


def test_a_template_of_one_call_in_a_turn_still_shows_all_results() -> None:
    single = TEMPLATES["whet:hermes"].read_text().replace(
        "{%- for call in message.tool_calls or [] %}",
        "{%- if message.tool_calls | length > 1 %}{{ raise_exception('one call') }}{%- endif %}"
        "{%- for call in message.tool_calls or [] %}",
    )  # fmt: skip
    template = JinjaTemplate(byte_tokenizer(), chat_template=single)
    sampled = [*template.prompt([Message(role="user", content="Go.")]), *template.stop_ids]
    results = [Message(role="tool", content=text, name="x", tool_call_id="") for text in ("one", "two")]
    assert template.extend(sampled, results) == HERMES.extend(sampled, results)


LLAMA = (
    "{{ bos_token }}{%- for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    "<|end_header_id|>\n\n{%- if loop.first and tools %}{{ tools | tojson }}\n{%- endif %}"
    "{%- if m.tool_calls %}{%- if m.tool_calls | length != 1 %}{{ raise_exception('only one') }}{%- endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{%- else %}{{ m.content | trim }}{%- endif %}<|eot_id|>{%- endfor %}"
    "{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{%- endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{%- for t in tools or [] %}{{ t | tojson }}{%- endfor %}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}<｜Assistant｜>{{ m.content or '' }}{%- if m.tool_calls %}<｜tool▁calls▁begin｜>"
    "{%- for c in m.tool_calls %}<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
    "{{ c.function.arguments | tojson }}<｜tool▁call▁end｜>{%- endfor %}<｜tool▁calls▁end｜>{%- endif %}"
    "<｜end▁of▁sentence｜>"
    "{%- elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{%- else %}<｜User｜>{{ m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<｜Assistant｜>{%- endif %}"
)
PUBLISHED = {"qwen3": (None, "hermes"), "llama3_1": (LLAMA, "llama3"), "deepseek_v3": (DEEPSEEK, "deepseek")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_vocabularies_read_back_their_calls(name: str) -> None:
    if FAMILY is None:
        pytest.skip("needs WHET_TINY_FAMILY: a folder with published tokenizers (qwen3, llama3_1, deepseek_v3)")
    from transformers import AutoTokenizer

    chat_template, dialect = PUBLISHED[name]
    template = JinjaTemplate(AutoTokenizer.from_pretrained(Path(FAMILY) / name), chat_template=chat_template)
    assert template.dialect.name == dialect
    question, asked = Message(role="user", content="Go."), Message(role="assistant", content="", tool_calls=(CALL,))
    rendered = template.conversation([question, asked], [TOOL])
    prompt = template.prompt([question], [TOOL])
    span = [token for token, on in zip(rendered.tokens, rendered.trained, strict=True) if on]
    assert template.parse(span, Ending.STOP, [TOOL]).tool_calls == (CALL,)
    markup = " ".join(template._specials)
    results = [Message(role="tool", content=text, name="order.item", tool_call_id="") for text in (markup, "two")]
    more = template.extend([*prompt, *span], results)
    plain = template.extend([*prompt, *span], [Message(role="tool", content="x", name="order.item")] * 2)
    assert sum(token in template._specials.values() for token in more) == sum(
        token in template._specials.values() for token in plain
    )
    assert "two" in template.decode(more)


def test_templates_say_which_of_them_write_tools() -> None:
    for name in ("ChatML", "Zephyr"):
        with pytest.raises(DataError, match="tools: the chat template leaves them out"):
            assert JinjaTemplate(tokenizer_of(name)).dialect
    odd = "{%- if tools %}{{ tools | tojson }}{%- endif %}" + tokenizer_of("ChatML").chat_template.replace(
        "<tool_call>", "<odd>"
    )
    with pytest.raises(DataError, match="no dialect reads the calls that the chat template writes"):
        assert JinjaTemplate(tokenizer_of("ChatML"), chat_template=odd).dialect
