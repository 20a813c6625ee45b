"""The data gate: what passes can be trained on, and what cannot is an error with its place, or counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whet.config import DataConfig
from whet.data.base import Conversation, Origin
from whet.data.faults import BadRow, Rejects
from whet.data.formats import load_conversations, read_conversations
from whet.data.sources import Reading
from whet.errors import DataError
from whet.models.create import byte_tokenizer
from whet.records import Message, TokenRow
from whet.templates import JinjaTemplate
from whet.templates.base import Encoded, Script
from whet.training.gate import Window, segments
from whet.training.tokenize import Gated, Stats, tokenise

TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPPING = TRIMMING.replace("m.content", "m.content.split('</think>')[-1]")
TWO_BOS = "{{ bos_token }}{{ bos_token }}" + TRIMMING


@pytest.fixture(scope="module")
def template() -> JinjaTemplate:
    return JinjaTemplate(byte_tokenizer())


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str, *, trained: bool | None = None) -> Message:
    return Message(role="assistant", content=text, trained=trained)


def example(*messages: Message, line: int = 1, text: str | None = None) -> Conversation:
    return Conversation(origin=Origin(source="train.jsonl", line=line), messages=messages, text=text)


def gate(template: Any, *conversations: Conversation, **changes: Any) -> Gated:
    settings: dict[str, Any] = {"loss_on": "assistant", "max_length": 200, "on_bad_row": "error", **changes}
    reading = Reading(examples=conversations, rejects=Rejects("error"), sources=["train.jsonl"])
    return tokenise(reading, template, **settings)


GOOD = example(user("2+2?"), assistant("4"))


def test_a_good_row_passes_as_the_template_renders_it(template: JinjaTemplate) -> None:
    gated = gate(template, GOOD)
    rendered = template.conversation(GOOD.messages)
    assert list(gated.rows) == [TokenRow(tokens=rendered.tokens, trained=rendered.trained)]
    assert gated.kept.origin(0) == GOOD.origin and gated.dropped.total == 0


def test_the_numbers_can_be_recounted(template: JinjaTemplate) -> None:
    # 10 to 109 letters of running text and a stop token: lengths 11 to 110; the first token is never trained.
    texts = [example(text="x" * count, line=count) for count in range(10, 110)]
    assert gate(template, *texts, texts[0]).stats == Stats(
        rows=101,
        tokens=sum(range(11, 111)) + 11,
        trained_tokens=sum(range(10, 110)) + 10,
        length_p50=60,
        length_p90=100,
        length_p99=109,
        length_max=110,
        duplicates=1,
    )


BAD = {
    "no answer": (example(user("a"), line=7), "messages: no trained token"),
    "marked out": (example(user("a"), assistant("b", trained=False), line=7), "messages: no trained token"),
    "no messages": (example(line=7), "no trained token"),
    "empty answer": (example(user("a"), assistant(" "), line=7), r"messages\[1\]\.content: .* message is empty"),
    "empty text": (example(text=" ", line=7), "the text is empty"),
    "too long": (
        example(user("a"), assistant("b" * 300), line=7),
        "messages: longer than max_length 200; it has .* tokens, and .* of 301 trained ones would be cut off",
    ),
    "special token": (example(user("<|im_start|>"), assistant("b"), line=7), r"messages\[0\]: .* the special token"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_cannot_be_trained_on_is_named_or_counted(template: JinjaTemplate, kind: str) -> None:
    bad, message = BAD[kind]
    with pytest.raises(BadRow, match=rf"^train\.jsonl:7: .*{message}"):
        gate(template, GOOD, bad, GOOD)
    gated = gate(template, GOOD, bad, GOOD, on_bad_row="drop")
    assert (len(gated.rows), gated.dropped.total, gated.stats.duplicates) == (2, 1, 1)
    assert str(gated.dropped.rows[0]).startswith("train.jsonl:7: ")


def test_too_long_counts_the_answer_tokens_that_would_be_lost(template: JinjaTemplate) -> None:
    length = len(template.conversation(GOOD.messages).tokens)
    assert gate(template, GOOD, max_length=length).stats.length_max == length
    # The last two tokens are the stop token and the newline behind it, which is not trained.
    for missing, lost in ((1, 0), (2, 1)):
        with pytest.raises(BadRow, match=f"it has {length} tokens, and {lost} of 2 trained ones would be cut off"):
            gate(template, GOOD, max_length=length - missing)


@pytest.mark.parametrize(("limit", "remedy"), [(20, "raise train.max_length"), (Window(20), "shorten it")])
@pytest.mark.parametrize("letters", [30, 3000])
def test_a_remedy_is_one_that_helps(template: JinjaTemplate, limit: int, remedy: str, letters: int) -> None:
    """A recipe cannot raise the model's window, and a dropped row needs no advice to drop it."""
    long = example(user("a"), assistant("b" * letters), line=7)
    with pytest.raises(BadRow, match=f"; {remedy}, or set data.on_bad_row: drop$"):
        gate(template, long, max_length=limit)
    gated = gate(template, GOOD, long, max_length=Window(200) if letters > 200 else limit, on_bad_row="drop")
    assert "on_bad_row" not in str(gated.dropped.rows[0])


def test_a_turn_whose_stop_token_is_not_trained_is_refused(template: JinjaTemplate) -> None:
    class Unending(JinjaTemplate):
        def encode(self, scripts: Sequence[Script], *, most: int | None = None) -> list[Encoded | DataError]:
            (row,) = super().encode(scripts, most=most)
            assert isinstance(row, Encoded)
            ends = np.isin(row.tokens, list(self.stop_ids))
            return [replace(row, trained=row.trained & ~ends)]

    with pytest.raises(BadRow, match=r"train\.jsonl:1: messages: a trained turn without a trained stop token"):
        gate(Unending(byte_tokenizer()), GOOD)


def test_templates_that_lie_are_refused_with_the_row() -> None:
    thoughts = example(user("a"), assistant("<think>x</think>b"), user("c"), assistant("d"), line=3)
    with pytest.raises(BadRow, match=r"train\.jsonl:3: messages\[1\]: the chat template leaves out"):
        gate(JinjaTemplate(byte_tokenizer(), chat_template=DROPPING), thoughts)
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    with pytest.raises(BadRow, match=r"train\.jsonl:1: the text starts with two '<\|endoftext\|>'"):
        gate(JinjaTemplate(tokenizer, chat_template=TWO_BOS), GOOD)


def test_nothing_to_train_on_is_an_error(template: JinjaTemplate) -> None:
    with pytest.raises(DataError, match="nothing to train on; the data set has no rows"):
        gate(template)
    with pytest.raises(DataError, match="nothing to train on; 2 rows dropped: 2 x messages: no trained token"):
        gate(template, BAD["no answer"][0], BAD["no answer"][0], on_bad_row="drop")


def test_a_row_is_shown_with_its_trained_part(template: JinjaTemplate) -> None:
    parts = segments(gate(template, example(user("2+2?"), assistant("4\x1b[31m"))).rows[0], template)
    assert [(part.text, part.trained) for part in parts] == [
        ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("4\x1b[31m<|im_end|>", True),
        ("\n", False),
    ]


# -------------------------------------------------------------------------------------------- real files

GSM8K = {"prompt": "question", "completion": "answer"}


@pytest.mark.parametrize("chat_template", [None, TRIMMING])
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("gsm8k/dev/train.jsonl.gz", GSM8K),
        ("gsm8k/dev/test.jsonl", GSM8K),
        ("llamafactory/dev/alpaca_en_demo.jsonl.gz", {}),
        ("sharegpt_format/dev/dummy_conversation.jsonl", {}),
    ],
)
def test_real_rows_pass_and_train_on_exactly_their_answers(
    shared_data: Path, name: str, columns: dict[str, str], chat_template: str | None
) -> None:
    template = JinjaTemplate(byte_tokenizer(), chat_template=chat_template)
    config = DataConfig(path=str(shared_data / name), columns=columns)
    examples, _ = load_conversations(config)
    gated = tokenise(read_conversations(config), template, loss_on="assistant", max_length=4096, on_bad_row="error")
    assert gated.stats.rows == len(examples)
    for found, row in list(zip(examples, gated.rows, strict=True))[::10]:
        answers = [part.text for part in segments(row, template) if part.trained]
        expected = [message.content for message in found.messages if message.role == "assistant"]
        if chat_template == TRIMMING:
            expected = [answer.strip() for answer in expected]
        assert answers == [answer + "<|im_end|>" for answer in expected]
