"""Law 5, over many templates: a row's pieces join to the template's own text, and each answer is trained once.

Whatever a template does, a conversation is refused or: its text is what transformers renders; spans do not overlap;
each holds its own answer, ends with its only stop token, and ends before the next turn begins.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.chat_templates import EOS, TEMPLATES, tokenizer_of
from whet.errors import DataError
from whet.records import Message, ToolCall
from whet.templates import JinjaTemplate, LossOn, Rendered

ASK, TELL = Message(role="user", content="alpha?"), Message(role="assistant", content="bravo")
AGAIN, LAST = Message(role="user", content="charlie!"), Message(role="assistant", content="delta\n\necho")
CALL = ToolCall(name="order", arguments={"gift": True, "note": None, "n": 2, "to": {"city": "Zoë"}}, id="call12345")
CALLING = Message(role="assistant", content="", tool_calls=(CALL,))
RESULT = Message(role="tool", content="foxtrot", tool_call_id="call12345")
CONVERSATIONS = {
    "one turn": (ASK, TELL),
    "two turns": (ASK, TELL, AGAIN, LAST),
    "system": (Message(role="system", content="golf"), ASK, TELL, AGAIN, LAST),
    "ends with a question": (ASK, TELL, AGAIN),
    "a call": (ASK, CALLING, RESULT, LAST),
    "a call at the end": (ASK, TELL, AGAIN, CALLING),
}
REFUSED = {
    ("OLMo", "two turns"),
    ("OLMo", "system"),
    ("OLMo", "ends with a question"),
    ("OLMo", "a call"),
    ("OLMo", "a call at the end"),
    ("gpt-oss", "two turns"),
    ("gpt-oss", "system"),
    ("gpt-oss", "ends with a question"),
    ("gpt-oss", "a call at the end"),
}
"""Where the template ends an earlier answer with no token that a sampler stops at."""
FAMILY = os.environ.get("WHET_TINY_FAMILY")


def template_of(name: str) -> JinjaTemplate:
    tokenizer = tokenizer_of(name)
    return JinjaTemplate(tokenizer, eos_ids=tokenizer.convert_tokens_to_ids(EOS.get(name, ("</s>",))))


def plain(message: Message) -> dict[str, Any]:
    """The message as transformers takes it."""
    calls = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    return (
        found
        | ({"tool_calls": calls} if calls else {})
        | ({"reasoning_content": message.thinking} if message.thinking else {})
    )


@cache
def published(name: str) -> tuple[Any, JinjaTemplate]:
    """A tokenizer of the folder, and its own template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(FAMILY or "") / name)
    return tokenizer, JinjaTemplate(tokenizer)


def spans(template: JinjaTemplate, rendered: Rendered) -> list[str]:
    runs = groupby(zip(rendered.tokens, rendered.trained, strict=True), key=lambda pair: pair[1])
    return [template.decode([token for token, _ in run]) for trained, run in runs if trained]


def check(
    template: JinjaTemplate, tokenizer: Any, messages: tuple[Message, ...], loss_on: LossOn = "assistant"
) -> None:
    """The law, for a conversation that is not refused."""
    rendered = template.conversation(messages, loss_on=loss_on)
    text = tokenizer.apply_chat_template([plain(message) for message in messages], tokenize=False)
    joined = template.decode(rendered.tokens)
    stops = [template.decode([stop]) for stop in template.stop_ids]
    assert joined == text or (joined.removeprefix(text) in stops and messages[-1].role == "assistant")
    answers = [message for message in messages if message.role == "assistant"]
    trained = answers if loss_on == "assistant" else answers[-1:] if messages[-1].role == "assistant" else []
    found = spans(template, rendered)
    assert len(found) == len(trained)
    for message, span in zip(trained, found, strict=True):
        assert message.content in span and all(call.name in span for call in message.tool_calls)
        assert sum(span.count(stop) for stop in stops) == 1 and span.endswith(tuple(stops))
        assert not any(other.content in span for other in messages if other is not message and other.content)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_join_to_the_templates_text_and_each_answer_is_trained_once(name: str, conversation: str) -> None:
    template, messages = template_of(name), CONVERSATIONS[conversation]
    if (name, conversation) in REFUSED:
        with pytest.raises(DataError, match="no stop token between it and the next turn"):
            template.conversation(messages)
    else:
        check(template, tokenizer_of(name), messages)


@pytest.mark.parametrize("conversation", [key for key, turns in CONVERSATIONS.items() if turns[-1].role == "assistant"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_answer_alone_can_be_trained_under_every_template(name: str, conversation: str) -> None:
    if name == "OLMo" and conversation == "a call":
        conversation = "two turns"
    check(template_of(name), tokenizer_of(name), CONVERSATIONS[conversation], "completion")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_next_prompt_begins_with_what_was_trained(name: str) -> None:
    template = template_of(name)
    first = template.conversation((ASK, TELL))
    cut = max(place for place, trained in enumerate(first.trained) if trained) + 1
    if name in ("OLMo", "gpt-oss"):
        with pytest.raises(DataError, match="without a stop token"):
            template.extend(first.tokens[:cut], (AGAIN,))
    elif name != "Qwen 3":  # whose prompt drops what the last answer was trained with
        assert template.extend(first.tokens[:cut], (AGAIN,)) == template.prompt((ASK, TELL, AGAIN))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "deepseek_v3"])
def test_the_law_holds_for_published_templates_and_tokenizers(name: str, conversation: str) -> None:
    if FAMILY is None:
        pytest.skip("needs WHET_TINY_FAMILY: a folder with published tokenizers (qwen3, llama3_1, gemma3, deepseek_v3)")
    tokenizer, template = published(name)
    messages = CONVERSATIONS[conversation]
    if name != "qwen3" and conversation.startswith("a call"):  # without calls, or without an end after them
        with pytest.raises(DataError, match=r"must alternate|leaves out|no stop token"):
            template.conversation(messages)
    else:
        check(template, tokenizer, messages)


def test_a_header_that_ends_turns_is_that_of_who_would_follow() -> None:
    template = template_of("GLM-4")
    (answer,) = spans(template, template.conversation((ASK, TELL)))
    _, call = spans(template, template.conversation((ASK, TELL, AGAIN, CALLING)))
    assert answer == "bravo<|user|>" and call.endswith("</tool_call><|observation|>")


def test_arguments_that_a_template_prints_are_json_and_what_it_drops_is_refused() -> None:
    tokenizer = tokenizer_of("ChatML")
    for printing in (
        "{{ c.function.arguments }}",
        "{{ '' + c.function.arguments }}",
        "{{ c.function.arguments | tojson }}",
    ):
        tokenizer.chat_template = TEMPLATES["ChatML"].replace(
            "{{ c.function | tojson }}", "{{ c.function.name }}" + printing
        )
        rendered = JinjaTemplate(tokenizer).conversation((ASK, CALLING))
        assert '{"gift": true, "note": null, "n": 2, "to": {"city": "Zoë"}}' in JinjaTemplate(tokenizer).decode(
            rendered.tokens
        )
    for dropping, lost in (("", "gift"), ("gift: true", "note"), ("gift true note null n 2 to city", "Zoë")):
        tokenizer.chat_template = TEMPLATES["ChatML"].replace(
            "{{ c.function | tojson }}", "{{ c.function.name }} " + dropping
        )
        with pytest.raises(DataError, match=f"leaves out '{lost}' of the arguments of order"):
            JinjaTemplate(tokenizer).conversation((ASK, CALLING))
    tokenizer.chat_template = TEMPLATES["ChatML"].replace("{{ m.content }}", "{{ m.content if m.content is not none }}")
    only_bare = tokenizer.chat_template.replace(
        "{%- for c in m.tool_calls or [] %}", "{%- for c in m.tool_calls if m.content is none %}"
    )
    tokenizer.chat_template = only_bare
    assert '"gift": true' in spans(JinjaTemplate(tokenizer), JinjaTemplate(tokenizer).conversation((ASK, CALLING)))[0]


def test_settings_of_a_row_are_variables_of_the_template(caplog: pytest.LogCaptureFixture) -> None:
    template = template_of("Qwen 3")
    quiet = template.conversation((ASK, TELL), settings={"enable_thinking": False})
    assert spans(template, quiet) == ["bravo<|im_end|>"]
    assert spans(template, template.conversation((ASK, TELL))) == ["<think>\n\n</think>\n\nbravo<|im_end|>"]
    prompt = template.prompt((ASK,), settings={"enable_thinking": False})
    assert quiet.tokens[: len(prompt)] == prompt
    (end,) = template.stop_ids - {template._tokenizer.eos_token_id} or template.stop_ids
    said = (*prompt, *template.prompt((ASK,))[:3], end)
    longer = template.extend(said, (AGAIN,), settings={"enable_thinking": False})
    assert template.decode(longer[len(template.extend(said, (AGAIN,))) :]) == "<think>\n\n</think>\n\n"
    assert not caplog.records
    template_of("ChatML").conversation((ASK, TELL), settings={"enable_thinking": False})
    assert "the chat template does not read 'enable_thinking'" in caplog.text
    with pytest.raises(DataError, match="'messages' cannot be set there"):
        template.conversation((ASK, TELL), settings={"messages": []})


def test_what_only_a_last_answer_is_trained_with_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    template = template_of("Qwen 3")
    template.conversation((ASK, TELL))
    assert not caplog.records
    for _ in range(2):
        template.conversation((ASK, TELL, AGAIN, LAST))
    (record,) = caplog.records
    assert "writes '<think>\\n\\n</think>\\n\\n' into the last answer" in record.getMessage()
