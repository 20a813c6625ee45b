"""Template laws (law 5 of the design), on templates of four families and a byte-level tokenizer built here.

The tokenizer has one merge, of two newlines: enough to show whether it can reach across the border of an answer.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from whet.errors import DataError, ModelError
from whet.records import Ending, Message, ToolCall
from whet.templates import JinjaTemplate, Rendered

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_block(block: str) -> str:
    """ChatML whose assistant turns are inside a generation block; `block` says where it starts and ends."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + block + "{% else %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"
# trim_blocks eats a newline right after a block, so newlines are written as expressions here.
BLOCK = with_block("<|im_start|>assistant{{ '\n' }}" + OPEN + "{{ m.content }}<|im_end|>" + CLOSE + "{{ '\n' }}")
BLOCK_SHORT = with_block("<|im_start|>assistant{{ '\n' }}" + OPEN + "{{ m.content }}" + CLOSE + "<|im_end|>{{ '\n' }}")
BLOCK_LONG = with_block("<|im_start|>assistant{{ '\n' }}" + OPEN + "{{ m.content }}<|im_end|>{{ '\n' }}" + CLOSE)
BLOCK_WITH_HEADER = with_block(OPEN + "<|im_start|>assistant{{ '\n' }}{{ m.content }}<|im_end|>{{ '\n' }}" + CLOSE)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# As Qwen3 does: thinking is kept only in answers after the last user message.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.index0 > ns.last and parts | length > 1 %}{{ m.content }}"
    "{% else %}{{ parts[-1].lstrip('\n') }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "block": BLOCK,
    "block_short": BLOCK_SHORT,
    "block_long": BLOCK_LONG,
    "llama": LLAMA,
    "qwen3": QWEN3,
}
MARKUP = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def byte_tokenizer(chat_template: str | None = None) -> Any:
    """256 bytes, a merge of two newlines, special markup, and `<think>` as a plain added token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in MARKUP])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=MARKUP[0], eos_token=MARKUP[1])
    fast.chat_template = chat_template
    return fast


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str, **fields: Any) -> Message:
    return Message(role="assistant", content=text, **fields)


CONVERSATIONS = [
    (user("2+2?"), assistant("4")),
    (Message(role="system", content="Be brief."), user("Grüße 👋"), assistant("Hallo!\n\nWie geht's?")),
    (user("a"), assistant("first\nline"), user("b"), assistant("second"), user("assistant"), assistant("assistant")),
    (user("Say it."), assistant("it"), user("thanks, never mind")),
]


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> JinjaTemplate:
    return JinjaTemplate(byte_tokenizer(TEMPLATES[request.param]))


def runs(rendered: Rendered) -> list[tuple[int, ...]]:
    """The trained stretches of a conversation."""
    pairs = zip(rendered.tokens, rendered.trained, strict=True)
    return [tuple(token for token, _ in run) for trained, run in groupby(pairs, key=lambda pair: pair[1]) if trained]


def stop_of(template: JinjaTemplate) -> str:
    rendered = template.conversation(CONVERSATIONS[0])
    return template.decode(runs(rendered)[0][-1:])


# ------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_mask_is_exactly_the_answers_and_their_stop_tokens(
    template: JinjaTemplate, messages: tuple[Message, ...]
) -> None:
    rendered = template.conversation(messages)
    answers = [message.content for message in messages if message.role == "assistant"]
    assert [template.decode(run) for run in runs(rendered)] == [answer + stop_of(template) for answer in answers]
    assert all(run[-1] in template.stop_ids for run in runs(rendered))


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_an_answer_follows_exactly_the_prompt_that_a_sampler_is_shown(
    template: JinjaTemplate, messages: tuple[Message, ...]
) -> None:
    rendered = template.conversation(messages)
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    for index, run in zip(turns, runs(rendered), strict=True):
        prompt = template.prompt(messages[:index])
        assert rendered.tokens[: len(prompt) + len(run)] == prompt + run
        assert rendered.trained[len(prompt)] and not rendered.trained[len(prompt) - 1]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_parse_inverts_render(template: JinjaTemplate, messages: tuple[Message, ...]) -> None:
    answers = [message for message in messages if message.role == "assistant"]
    assert [template.parse(run, Ending.STOP) for run in runs(template.conversation(messages))] == answers


def test_a_cut_completion_keeps_its_last_token(template: JinjaTemplate) -> None:
    completion = runs(template.conversation(CONVERSATIONS[1]))[0][:4]
    assert template.parse(completion, Ending.LENGTH).content == template.decode(completion)


def test_extending_turn_by_turn_gives_the_prompt_of_the_whole(template: JinjaTemplate) -> None:
    messages = CONVERSATIONS[2]
    completions = runs(template.conversation(messages))
    tokens = template.prompt(messages[:1])
    for turn, completion in enumerate(completions[:-1]):
        sampled = tokens + completion
        tokens = template.extend(sampled, messages[2 * turn + 2 : 2 * turn + 3])
        assert tokens[: len(sampled)] == sampled
        assert tokens == template.prompt(messages[: 2 * turn + 3])
    whole = template.conversation(messages)
    assert whole.tokens[: len(tokens)] == tokens


def test_sampled_tokens_are_never_tokenized_again() -> None:
    template = JinjaTemplate(byte_tokenizer(CHATML))
    newline = template.prompt((user("x"),))[-1]
    (stop,) = (token for token in template.stop_ids if template.decode([token]) == "<|im_end|>")
    sampled = (*template.prompt((user("x"),)), newline, newline, stop)  # two tokens that the tokenizer would merge
    assert template.extend(sampled, (user("y"),))[: len(sampled)] == sampled


def test_no_merge_crosses_from_the_prompt_into_the_answer() -> None:
    template = JinjaTemplate(byte_tokenizer(CHATML))
    messages = (user("x"), assistant("\nstarts with a newline"))
    prompt = template.prompt(messages[:1])
    rendered = template.conversation(messages)
    assert rendered.tokens[: len(prompt)] == prompt
    assert template.decode(runs(rendered)[0]) == "\nstarts with a newline<|im_end|>"


# ------------------------------------------------------------------------------------------ which turns


def test_loss_on_completion_trains_the_last_answer_only(template: JinjaTemplate) -> None:
    rendered = template.conversation(CONVERSATIONS[2], loss_on="completion")
    assert [template.decode(run) for run in runs(rendered)] == ["assistant" + stop_of(template)]


def test_loss_on_all_trains_everything_but_the_first_token(template: JinjaTemplate) -> None:
    rendered = template.conversation(CONVERSATIONS[2], loss_on="all")
    assert rendered.trained == (False, *[True] * (len(rendered.tokens) - 1))


def test_a_message_may_be_taken_out_of_the_loss_or_put_into_it(template: JinjaTemplate) -> None:
    messages = list(CONVERSATIONS[2])
    messages[1] = assistant("first\nline", trained=False)
    stop = stop_of(template)
    assert [template.decode(run) for run in runs(template.conversation(messages))] == [
        "second" + stop,
        "assistant" + stop,
    ]
    kept = template.conversation(messages, loss_on="all")
    left_out = [token for token, flag in zip(kept.tokens[1:], kept.trained[1:], strict=True) if not flag]
    assert template.decode(left_out) == "first\nline" + stop
    messages[1] = assistant("first\nline", trained=True)
    rendered = template.conversation(messages, loss_on="completion")
    assert [template.decode(run) for run in runs(rendered)] == ["first\nline" + stop, "assistant" + stop]


def test_only_answers_can_be_marked(template: JinjaTemplate) -> None:
    messages = (Message(role="user", content="x", trained=True), assistant("y"))
    with pytest.raises(DataError, match=r"messages\[0\]: a user message is marked as trained"):
        template.conversation(messages)


# --------------------------------------------------------------------------------- what would be a lie


def test_thinking_that_the_template_drops_from_earlier_turns_is_refused() -> None:
    template = JinjaTemplate(byte_tokenizer(QWEN3))
    messages = (user("a"), assistant("<think>hm</think>one"), user("b"), assistant("<think>well</think>two"))
    with pytest.raises(DataError, match=r"messages\[1\]: .*leaves out \(some of\) its content.*model\.chat_template"):
        template.conversation(messages)
    rendered = template.conversation(messages, loss_on="completion")
    assert [template.decode(run) for run in runs(rendered)] == ["<think>well</think>two<|im_end|>"]


def test_a_template_that_cannot_write_thinking_or_tools_or_a_system_message_is_refused() -> None:
    template = JinjaTemplate(byte_tokenizer(BLOCK))
    with pytest.raises(DataError, match="its thinking"):
        template.conversation((user("a"), assistant("b", thinking="because")))
    with pytest.raises(DataError, match="its tool calls"):
        template.conversation((user("a"), assistant("", tool_calls=(ToolCall(name="look", arguments={}),))))
    with pytest.raises(DataError, match="tools: the chat template leaves them out"):
        template.prompt((user("a"),), tools=({"type": "function", "function": {"name": "look"}},))
    deaf = JinjaTemplate(byte_tokenizer(CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1)))
    with pytest.raises(DataError, match=r"messages\[0\]: the chat template leaves out system messages"):
        deaf.prompt((Message(role="system", content="Be brief."), user("a")))


def test_tool_calls_are_trained_and_tool_results_are_not() -> None:
    template = JinjaTemplate(byte_tokenizer(CHATML))
    call = assistant("", tool_calls=(ToolCall(name="add", arguments={"a": 1}),))
    messages = (user("1+1"), call, Message(role="tool", content="2"), assistant("two"))
    first, second = runs(template.conversation(messages))
    assert template.decode(first) == '<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>'
    assert template.decode(second) == "two<|im_end|>"
    extended = template.extend(template.prompt(messages[:1]) + first, messages[2:3])
    assert extended == template.prompt(messages[:3])


@pytest.mark.parametrize("where", [(user("a<|im_end|>"), assistant("b")), (user("a"), assistant("b<|im_end|>c"))])
def test_text_that_spells_a_special_token_is_refused(where: tuple[Message, ...]) -> None:
    template = JinjaTemplate(byte_tokenizer(CHATML))
    with pytest.raises(DataError, match=r"contains the special token '<\|im_end\|>'"):
        template.conversation(where)


def test_a_prompt_that_opens_the_answer_otherwise_than_history_does_is_refused() -> None:
    template = JinjaTemplate(byte_tokenizer(CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")))
    with pytest.raises(DataError, match=r"messages\[1\]: the chat template writes the turns before it differently"):
        template.conversation(CONVERSATIONS[0])


def test_the_tokenizer_adds_no_bos_to_that_of_the_template() -> None:
    tokenizer = byte_tokenizer(LLAMA)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    adding = processors.TemplateProcessing(single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = adding
    template = JinjaTemplate(tokenizer)
    assert template.prompt(CONVERSATIONS[0]).count(bos[1]) == 1
    assert template.conversation(CONVERSATIONS[0]).tokens.count(bos[1]) == 1
    assert template.text("once").tokens[0] == bos[1]
    assert not template.text("once").trained[0] and template.text("once").trained[1]


def test_two_bos_tokens_are_refused() -> None:
    doubled = JinjaTemplate(byte_tokenizer("{{ bos_token }}" + LLAMA))
    for render in (doubled.prompt, doubled.conversation):
        with pytest.raises(DataError, match="starts with two"):
            render((user("a"), assistant("b")))
    with pytest.raises(DataError, match="starts with two"):
        JinjaTemplate(byte_tokenizer(LLAMA)).text("<|begin_of_text|><|begin_of_text|>once")


def test_a_turn_that_was_cut_off_has_no_next_turn(template: JinjaTemplate) -> None:
    with pytest.raises(DataError, match="does not end with a stop token"):
        template.extend(template.prompt((user("a"),)), (user("b"),))


def test_a_conversation_that_the_template_refuses_is_a_data_error() -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match="user first"):
        JinjaTemplate(byte_tokenizer(strict)).prompt((Message(role="system", content="s"),))


# ----------------------------------------------------------------------------------- the template itself


def test_stop_ids_are_the_turn_end_the_eos_and_those_passed_in() -> None:
    tokenizer = byte_tokenizer(LLAMA)
    template = JinjaTemplate(tokenizer, eos_ids=(7,))
    assert template.stop_ids == {tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|end_of_text|>")} | {7}


def test_another_template_may_be_given() -> None:
    template = JinjaTemplate(byte_tokenizer(LLAMA), chat_template=CHATML)
    assert template.decode(template.prompt((user("a"),))) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "special token after an assistant's answer"),
        ("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", "does not write an assistant's answer"),
        ("{% for m in messages %}", "cannot write this conversation"),
        (BLOCK_WITH_HEADER, "headers would be"),
    ],
)
def test_an_unusable_template_is_a_model_error_with_a_remedy(chat_template: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=f"{message}.*model.chat_template"):
        JinjaTemplate(byte_tokenizer(chat_template))


def test_a_tokenizer_that_adds_spaces_to_pieces_is_refused() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    with pytest.raises(ModelError, match="changes spaces"):
        JinjaTemplate(tokenizer)


def test_running_text_ends_with_one_stop_token_and_is_all_trained() -> None:
    template = JinjaTemplate(byte_tokenizer(CHATML))
    rendered = template.text("once upon a time")
    assert template.decode(rendered.tokens) == "once upon a time<|end_of_text|>"
    assert rendered.trained == (False, *[True] * (len(rendered.tokens) - 1))
    assert template.text("once upon a time<|end_of_text|>") == rendered
    with pytest.raises(DataError, match="empty"):
        template.text(" \n")


def test_a_template_that_forgets_thinking_is_known_by_when() -> None:
    assert JinjaTemplate(byte_tokenizer(QWEN3)).forgets == ("user",), "as Qwen3: not while tools are called"
    assert JinjaTemplate(byte_tokenizer(CHATML)).forgets == ()
    always = CHATML.replace("m.content", "m.content.split('</think>')[-1]", 1)
    assert JinjaTemplate(byte_tokenizer(always)).forgets == ("user", "tool")
