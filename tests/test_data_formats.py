"""Formats: every shape that people have becomes the same records, and a bad row is named by field and remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from whet.config import DataConfig
from whet.data.base import Conversation, Origin, Row
from whet.data.faults import BadRow
from whet.data.formats import detect, load_conversations, load_tasks, to_conversation, to_task
from whet.data.preferences import to_comparison, to_judged, to_rated
from whet.data.sources import read_rows
from whet.data.stepwise import to_stepwise
from whet.errors import DataError
from whet.records import Message, ToolCall

USER = {"role": "user", "content": "x"}


def row(**values: Any) -> Row:
    return Row(origin=Origin(source="train.jsonl", line=17), values=values)


def config(**fields: Any) -> DataConfig:
    return DataConfig(**{"path": "train.jsonl", **fields})


def conversation(fields: dict[str, Any] | None = None, **values: Any) -> Conversation:
    return to_conversation(row(**values), config(**fields or {}))


def turns(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["messages", "tools"], "messages"),
        (["id", "conversations"], "sharegpt"),
        (["prompt", "completion"], "prompt_completion"),
        (["instruction", "input", "output"], "alpaca"),
        (["text", "meta"], "text"),
        (["prompt", "answer"], "prompt"),
        (["question", "answer"], None),
    ],
)
def test_a_format_is_known_by_its_columns(columns: list[str], name: str | None) -> None:
    assert detect(columns) == name


def test_messages_keep_what_they_say() -> None:
    found = conversation(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi", "name": "Ann"},
            {"role": "assistant", "content": "ho", "reasoning_content": "greet", "weight": 0},
            {"role": "assistant", "content": "hey", "train": True},
        ]
    )
    assert found.messages == (
        Message(role="system", content="Be brief."),
        Message(role="user", content="hi"),
        Message(role="assistant", content="ho", thinking="greet", trained=False),
        Message(role="assistant", content="hey", trained=True),
    )
    assert str(found.origin) == "train.jsonl:17"


TEXT = '{"a": 1}'
CALL = ToolCall(name="add", arguments={"a": 1}, id="")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"role": "assistant", "content": "", "tool_calls": '[{"name": "add", "arguments": {"a": 1}}]'},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": TEXT}},
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    ],
)
def test_every_spelling_of_a_tool_call_is_the_same_call(message: dict[str, Any]) -> None:
    found = conversation(messages=[{"role": "user", "content": "1+1"}, message])
    assert found.messages[1] == Message(role="assistant", content="", tool_calls=(CALL,))


def test_tools_may_be_json_or_a_list_of_tools_or_of_functions() -> None:
    function = {"name": "add", "parameters": {"type": "object"}}
    tool = {"type": "function", "function": function}
    for tools in ([tool], [function], json.dumps([function]), [json.dumps(tool)]):
        found = conversation(messages=[{"role": "user", "content": "x"}], tools=tools)
        assert found.tools == (tool,)
        assert conversation(messages=[{"role": "user", "content": "x"}], tool_defs=tools).tools == (tool,)
    for tools in ("", None):
        assert conversation(messages=[{"role": "user", "content": "x"}], tools=tools).tools == ()


def test_content_parts_are_text_and_thinking() -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}, {"type": "text", "text": "b"}]
    found = conversation(messages=[{"role": "assistant", "content": parts, "loss_weight": 1.0}])
    assert found.messages == (Message(role="assistant", content="ab", thinking="hm", trained=True),)


@pytest.mark.parametrize(
    ("alias", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("assistant", "assistant"),
        ("system", "system"),
        ("observation", "tool"),
        ("tool", "tool"),
        ("function_response", "tool"),
    ],
)
def test_sharegpt_roles_have_many_names(alias: str, role: str) -> None:
    assert turns(conversation(conversations=[{"from": alias, "value": "x"}]).messages) == [(role, "x")]


def test_a_prompt_is_context_and_a_completion_is_trained() -> None:
    found = conversation(prompt="2+2?", completion="4").messages
    assert found == (Message(role="user", content="2+2?"), Message(role="assistant", content="4"))
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    found = conversation(prompt=prompt, completion=[{"role": "assistant", "content": "d"}]).messages
    assert [message.trained for message in found] == [None, False, None, None]


def test_alpaca_joins_the_input_and_does_not_train_on_history() -> None:
    found = conversation(
        instruction="Add.", input="1 2", output="3", system="Be exact.", history=[["hi", "ho"]]
    ).messages
    assert turns(found) == [
        ("system", "Be exact."),
        ("user", "hi"),
        ("assistant", "ho"),
        ("user", "Add.\n1 2"),
        ("assistant", "3"),
    ]
    assert [message.trained for message in found] == [None, None, False, None, None]
    assert turns(conversation(instruction="Hi.", input="", output="ho").messages)[0] == ("user", "Hi.")


def test_running_text_stays_text() -> None:
    found = conversation(text="once upon a time")
    assert found.text == "once upon a time" and found.messages == ()


def test_system_is_put_first_where_there_is_none() -> None:
    fields = {"system": "Be brief."}
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "x"}]
    empty = [{"role": "system", "content": ""}, {"role": "user", "content": "x"}]
    assert turns(conversation(fields, messages=own).messages)[0] == ("system", "Be long.")
    assert turns(conversation(fields, messages=empty).messages) == [("system", "Be brief."), ("user", "x")]
    assert turns(conversation(fields, prompt="x", completion="y", system="Row's own.").messages)[0][1] == "Row's own."


def test_columns_rename_and_build_text() -> None:
    fields = {"columns": {"prompt": "Q: {question} {{x}}", "completion": "answer"}}
    assert turns(conversation(fields, question="{1}", answer="a").messages) == [
        ("user", "Q: {1} {x}"),
        ("assistant", "a"),
    ]
    named = {"columns": {"prompt": "question", "completion": "answer"}}
    assert turns(conversation(named, messages=[USER], question="q", answer="a").messages)[0] == ("user", "q")


def test_prompts_keep_all_other_columns() -> None:
    found = to_task(row(question="2+2?", answer="4", level=3), config(columns={"prompt": "question", "gold": "answer"}))
    assert turns(found.messages) == [("user", "2+2?")]
    assert found.columns == {"question": "2+2?", "answer": "4", "level": 3, "gold": "4"}
    found = to_task(row(messages=[{"role": "user", "content": "x"}], ground_truth="y"), config(system="Think."))
    assert turns(found.messages) == [("system", "Think."), ("user", "x")] and found.columns == {"ground_truth": "y"}


def answered(**fields: Any) -> dict[str, Any]:
    """A row whose second message has these fields."""
    return {"messages": [USER, fields]}


IMAGE = [{"type": "image_url", "image_url": "u"}]
BROKEN = [{"name": "f", "arguments": "{x"}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": []}, r"messages: an empty list"),
        ({"messages": "hi"}, r"messages: not a list of messages; it is text \('hi'\)"),
        (answered(role="assistantt", content="y"), r"messages\[1\]\.role: unknown role 'assistantt'; .* 'assistant'"),
        (answered(content="y"), r"messages\[1\]\.role: no role"),
        (answered(role="assistant", contents="y"), r"messages\[1\]\.content: no content; did you mean 'contents'"),
        (answered(role="assistant", content=" "), r"messages\[1\]\.content: the assistant message is empty"),
        (answered(role="assistant", content=4), r"messages\[1\]\.content: not text; it is a number \(4\)"),
        (answered(role="user", content=IMAGE), r"messages\[1\]\.content\[0\]: not a text part"),
        (answered(role="assistant", content="y", weight=0.5), r"messages\[1\]\.weight: neither 0 nor 1"),
        (answered(role="user", content="y", tool_calls=[{"name": "f"}]), r"a tool call outside an assistant message"),
        (answered(role="assistant", tool_calls=BROKEN), r"tool_calls\[0\]\.arguments: not valid JSON"),
        ({"messages": [USER], "tools": "[{]"}, r"tools: not valid JSON"),
        ({"messages": [USER], "tools": [{"description": "d"}]}, r"tools\[0\]\.name: a tool without a name"),
        ({"conversations": [{"from": "humann", "value": "x"}]}, r"conversations\[0\]\.from: .* did you mean 'human'"),
        ({"instruction": "x", "output": ""}, r"output: empty text"),
        ({"instruction": "x", "output": "y", "history": ["a"]}, r"history\[0\]: not a pair"),
        ({"prompt": "x", "completion": None}, r"completion: not text; it is missing"),
        ({"prompt": "x", "answer": "y"}, r"completion: no such column; there are: prompt, answer"),
        ({"id": "x", "answer": "y"}, r"known format; there are: id, answer\. Say in data\.columns which is which$"),
        (
            {"text": "Add two numbers.", "code": "2"},
            r"text: running text, beside 'code', .* completion: code\}, or set data\.f",
        ),
        ({"messages": [USER], "label": False}, r"label: answers labelled good or bad"),
    ],
)
def test_a_bad_row_is_named_with_its_field_and_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=r"^train\.jsonl:17: .*" + message):
        conversation(**values)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "questionn"}, r"train\.jsonl:17: prompt: no column 'questionn'; did you mean 'question'"),
        ({"prompt": "Q: {questionn}"}, r"train\.jsonl:17: prompt: no column 'questionn'; did you mean 'question'"),
        ({"prompt": "{list}"}, r"train\.jsonl:17: prompt: column 'list' cannot stand in a text; it is a list"),
        ({"prompt": "{question:>9}"}, r"only \{column\} may stand in braces"),
        ({"prompt": "{question"}, r"data\.columns: '\{question'"),
    ],
)
def test_a_column_that_is_not_there_names_the_nearest(columns: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_task(row(question="x", list=[1]), config(columns=columns))


SUM = "What is the sum of two and three?"
BODY = "Ann has two apples and Bob has three."


@pytest.mark.parametrize(
    ("values", "sft", "rl"),
    [
        ({"id": 7, "question": SUM, "answer": "5"}, "{prompt: question, completion: answer}", "{prompt: question}"),
        ({"id": "a b c d e f g h", "QUESTION": SUM, "answer": 5}, "", "{prompt: QUESTION}"),
        (
            {"Body": BODY, "Question": SUM, "Answer": "5"},
            r'{prompt: "{Body}\n{Question}", completion: Answer}',
            r'{prompt: "{Body}\n{Question}"}',
        ),
        ({"question": SUM, "choices": ["4", "5"], "answer": "B"}, "", ""),
        ({"input": SUM, "target": "5", "answer": "6"}, "{prompt: input, completion: target}", "{prompt: input}"),
        ({"input": "[1, 2]", "output": "[2]"}, "", ""),
        ({"prompt": SUM, "response": "5", "key": 3}, "{completion: response}", None),
        ({"text": BODY, "url": "u"}, None, ""),
        ({"talk": [USER, {"role": "assistant", "content": "y"}]}, "{messages: talk}", ""),
        ({"talk": [USER]}, "{messages: talk}", "{messages: talk}"),
    ],
)
def test_a_hint_names_columns_only_where_it_can_be_followed(values: dict[str, Any], sft: str, rl: str | None) -> None:
    """`None`: the row is read as it is; empty: no columns are named."""
    for read, hint in ((to_conversation, sft), (to_task, rl)):
        if hint is None:
            read(row(**values), config())
            continue
        with pytest.raises(BadRow) as caught:
            read(row(**values), config())
        said = str(caught.value).partition("for example data.columns: ")[2]
        assert said == hint
        if hint:
            read(row(**values), config(columns=yaml.safe_load(hint)))


PAIR = {"chosen": "Five.", "rejected": "Six."}
LISTS = {name: [USER, {"role": "assistant", "content": said}] for name, said in PAIR.items()}
OPENAI = {
    f"{name}_output": [{"role": "assistant", "content": x}] for name, x in (("preferred", "5"), ("non_preferred", "6"))
}


@pytest.mark.parametrize(
    ("values", "asked", "best"),
    [
        ({"prompt": "2+3", **PAIR}, "2+3", "Five."),
        ({"conversations": [{"from": "human", "value": "2+3"}], **PAIR}, "2+3", "Five."),
        ({"instruction": "2+3", "input": "", "output": "5", **PAIR}, "2+3", "Five."),
        ({name: f"\n\nHuman: 2+3\n\nAssistant: {said}" for name, said in PAIR.items()}, "2+3", "Five."),
        (LISTS, "x", "Five."),
        ({f"{name}_messages": value for name, value in LISTS.items()}, "x", "Five."),
        ({"input": {"messages": [USER]}, **OPENAI}, "x", "5"),
        ({"prompt": "2+3", "chosen": "Five.", "rejected": "Five."}, "2+3", "Five."),
    ],
)
def test_sft_learns_the_chosen_answer_and_a_task_is_the_prompt(values: dict[str, Any], asked: str, best: str) -> None:
    assert turns(conversation(**values).messages) == [("user", asked), ("assistant", best)]
    assert turns(to_task(row(**values), config()).messages) == [("user", asked)]


def test_only_the_answer_to_the_last_message_of_a_comparison_is_trained() -> None:
    before = [USER, {"role": "assistant", "content": "a"}, USER]
    found = conversation(conversations=before, **PAIR).messages
    assert [message.trained for message in found] == [None, False, None, None]
    with pytest.raises(BadRow, match="prompt: no message to answer"):
        conversation(messages=before[:2], **PAIR)
    assert turns(conversation({"format": "messages"}, messages=before[:2], **PAIR).messages)[-1] == ("assistant", "a")


def test_a_text_that_is_a_transcript_becomes_its_turns_unless_it_is_asked_for() -> None:
    text = "### Human: 2+3? ### Assistant: 5\n### Human: sure?\n### Assistant: Yes: ### is no turn."
    expected = [("user", "2+3?"), ("assistant", "5"), ("user", "sure?"), ("assistant", "Yes: ### is no turn.")]
    assert turns(conversation(text=text).messages) == expected
    assert conversation({"format": "text"}, text=text).text == text
    assert conversation({"columns": {"text": "body"}}, body=text, code="x").text == text


def test_alpaca_rows_are_tasks_too() -> None:
    found = to_task(row(instruction="Add.", input="2 3", output="5", history=[["hi", "ho"]]), config())
    assert [said for _, said in turns(found.messages)] == ["hi", "ho", "Add.\n2 3"] and found.columns["output"] == "5"


def test_a_task_does_not_end_with_its_answer() -> None:
    with pytest.raises(BadRow, match="messages: ends with an assistant message"):
        to_task(row(messages=[USER, {"role": "assistant", "content": "y"}]), config())


def test_a_named_format_needs_its_columns() -> None:
    with pytest.raises(BadRow, match="output: format alpaca needs this column; did you mean 'outputs'"):
        conversation({"format": "alpaca"}, instruction="x", outputs="y", text="z")
    assert conversation({"format": "text"}, text="z", messages=[]).text == "z"


# -------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("gsm8k/dev/train.jsonl.gz", 5107, {"prompt": "question", "completion": "answer"}),
        ("gsm8k/dev/test.jsonl", 872, {"prompt": "question", "completion": "answer"}),
        ("llamafactory/dev/alpaca_en_demo.jsonl.gz", 650, {}),
        ("llamafactory/dev/v1_sft_demo.jsonl", 339, {}),
        ("llamafactory/dev/reason_tool_use_demo_50.jsonl", 27, {}),
        ("llamafactory/dev/glaive_toolcall_en_demo.jsonl.gz", 197, {}),
        ("sharegpt_format/dev/dummy_conversation.jsonl", 323, {}),
        ("dolly_open_qa/dev/chinkara-open_qa.jsonl.gz", 2498, {}),
        ("llamafactory/dev/dpo_en_demo.jsonl.gz", 206, {}),
        ("llmbar/dev/Natural.jsonl", 72, {}),
        ("mbpp/dev/mbpp.jsonl.gz", 636, {"prompt": "text", "completion": "code"}),
        ("rasbt/dev/instruction-data.jsonl", 721, {}),
    ],
)
def test_real_files_are_read_whole(shared_data: Path, name: str, rows: int, columns: dict[str, str]) -> None:
    examples, dropped = load_conversations(config(path=str(shared_data / name), columns=columns))
    assert (len(examples), dropped.total) == (rows, 0)
    assert all(example.text or example.messages[-1].role == "assistant" for example in examples)
    calls = sum(len(message.tool_calls) for example in examples for message in example.messages)
    assert calls == {"glaive_toolcall_en_demo.jsonl.gz": 138, "reason_tool_use_demo_50.jsonl": 40}.get(
        Path(name).name, 0
    )


def test_every_hint_about_real_rows_can_be_followed(shared_data: Path) -> None:
    """Over all sets: what the error names reads the row, and what is read silently asks and answers something."""
    hints = 0
    for path in sorted(shared_data.glob("*/dev/*.jsonl*")):
        first = next(read_rows(config(path=str(path), on_bad_row="drop")), None) if "lottery" not in path.name else None
        if first is None:
            continue
        for load in (load_conversations, load_tasks):
            try:
                load(config(path=str(path), limit=1))
            except DataError as error:
                if named := re.search(r"data\.columns: (\{.*\})", str(error)):
                    found, _ = load(config(path=str(path), limit=1, columns=yaml.safe_load(named[1])))
                    hints += len(found)
                    asked = [message.content for message in found[0].messages]
                    assert not any(said.isdigit() or " " not in said for said in asked[:1]), path
    assert hints > 10


def test_settings_of_the_chat_template_come_with_their_row_in_every_form() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    quiet = {"enable_thinking": False}
    for columns in (
        {"chat_template_kwargs": quiet},
        {"chat_template_kwargs": json.dumps(quiet)},
        {"chat_template_kwargs": {**quiet, "of_another_row": None}},
        {"enable_thinking": False},
    ):
        assert conversation(messages=messages, **columns).settings == quiet
        pair = row(prompt="x", chosen="y", rejected="z", **columns)
        assert to_task(pair, config()).settings == to_comparison(pair, config()).settings == quiet
        assert [each.settings for each in to_judged(pair, config())] == [quiet, quiet]
        labelled = row(prompt="x", completion="y", label=True, **columns)
        assert [each.settings for each in to_judged(labelled, config())] == [quiet]
        rated = row(prompt="x", completion="y", ratings={"right": 1}, **columns)
        assert to_rated(rated, config(), objectives=["right"]).settings == quiet
        stepped = row(prompt="x", steps=["y", "z"], labels=[1, 0], **columns)
        assert to_stepwise(stepped, config()).settings == quiet
    assert conversation(messages=messages, chat_template_kwargs=None).settings == {}
    with pytest.raises(BadRow, match="chat_template_kwargs: not an object"):
        conversation(messages=messages, chat_template_kwargs=[1])


@pytest.mark.parametrize("key", ["loss", "train", "weight"])
def test_a_message_marked_out_is_not_trained(key: str) -> None:
    found = conversation(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", key: False}])
    assert found.messages[1].trained is False
    detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    with pytest.raises(BadRow, match=r"train_detail: trains parts of a message"):
        conversation(messages=[{"role": "assistant", "content": "y", "train_detail": detail}])
