"""Law 5: where answers begin is the same with what was learnt of a template, and when every prompt is rendered."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from tests.chat_templates import EOS, TEMPLATES, tokenizer_of
from whet.errors import DataError
from whet.records import Message
from whet.templates import JinjaTemplate
from whet.templates.base import Script

WORDS = [
    "alpha", "bravo charlie", " led by a space", "ends with one\n", "\n\n", "[INST] said [/INST]", "a </think> b",
    "<think>why</think>so", "<tool_response>\nx\n</tool_response>", "{{ braces }}", "Probe72611x", "user", "é ½ 你好",
]  # fmt: skip
SHAPES = [("user", "assistant") * turns for turns in (1, 2, 3)]
CONVERSATIONS = [
    tuple(Message(role=role, content=WORDS[(at + place) % len(WORDS)]) for place, role in enumerate(head + shape))
    for head, shape, at in itertools.product(((), ("system",)), SHAPES, range(len(WORDS)))
]


def template_of(name: str) -> JinjaTemplate:
    tokenizer = tokenizer_of(name)
    return JinjaTemplate(tokenizer, eos_ids=tokenizer.convert_tokens_to_ids(EOS.get(name, ("</s>",))))


def written(template: JinjaTemplate, messages: tuple[Message, ...], **settings: Any) -> Script | str:
    try:
        return template.script(messages, settings=settings)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_outline_finds_what_prompts_show(name: str) -> None:
    template, asking = template_of(name), template_of(name)
    asking._outlines._looked_for = re.compile("")  # every message looks like markup: all prompts are rendered
    for messages in CONVERSATIONS:
        assert written(template, messages) == written(asking, messages), messages
    assert not asking._outlines._known
    for messages in CONVERSATIONS[:2]:
        both = [written(each, messages, enable_thinking=False) for each in (template, asking)]
        assert both[0] == both[1]


def test_a_kind_that_is_known_is_rendered_once_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    template, calls = template_of("ChatML"), []
    template.script(CONVERSATIONS[26])  # three turns
    render = template._render
    monkeypatch.setattr(template, "_render", lambda *args, **rest: calls.append(1) or render(*args, **rest))
    template.script(tuple(Message(role=m.role, content=f"other {n}") for n, m in enumerate(CONVERSATIONS[26])))
    assert len(CONVERSATIONS[26]) == 6
    assert len(calls) == 1


def test_a_template_that_treats_the_prompts_words_otherwise_is_asked() -> None:
    """It shortens a word that holds its markup unless an answer follows, so the prompt is not what the row begins."""
    tokenizer = tokenizer_of("ChatML")
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if not loop.last or '[cut]' not in m.content else '...' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = JinjaTemplate(tokenizer, chat_template=source)
    row = (Message(role="user", content="long"), Message(role="assistant", content="bravo"))
    template.script(row)  # the kind is known now
    with pytest.raises(DataError, match="differently than in the prompt"):
        template.script((Message(role="user", content="[cut] long"), row[1]))
