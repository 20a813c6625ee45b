"""Published data sets in their own shapes become rows of our formats. Rows are made up; those of files are real."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from whet.algorithms.reward_model import stepped
from whet.config import DataConfig
from whet.data.base import Comparison
from whet.data.faults import BadRow
from whet.data.formats import load_conversations, load_tasks
from whet.data.preferences import load_comparisons, load_judged, load_rated
from whet.data.stepwise import load_stepwise
from whet.errors import DataError
from whet.models.create import byte_tokenizer
from whet.templates.jinja import JinjaTemplate
from whet.training.answers import judged_stats, tokenise_answers


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def compared(folder: Path, *rows: dict[str, Any], **fields: Any) -> list[Comparison]:
    return load_comparisons(DataConfig(path=write(folder, *rows), **fields))[0]


def shape(found: Comparison) -> tuple[list[str], list[str]]:
    return [message.content for message in found.prompt], [answer[-1].content for answer in found.answers]


def node(role: str, text: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), **fields}


def reply(text: str, *replies: dict[str, Any], rank: int | None = None) -> dict[str, Any]:
    return node("assistant", text, *replies, rank=rank)


TREE = {
    "message_tree_id": "t",
    "prompt": node(
        "prompter",
        "2+2?",
        reply("5", node("prompter", "sure?", reply("no", rank=1), reply("yes", rank=0)), rank=1),
        reply("4", node("prompter", "thanks", reply("welcome")), rank=0),
        reply("maybe 4"),
    ),
}


def test_a_tree_is_a_ranked_list_for_each_message_that_was_answered(tmp_path: Path) -> None:
    config = DataConfig(path=write(tmp_path, TREE))
    found, dropped = load_comparisons(config)
    assert [shape(each) for each in found] == [(["2+2?"], ["4", "5"]), (["2+2?", "5", "sure?"], ["yes", "no"])]
    assert [str(each.origin).partition(":")[2] for each in found] == ["1 part 1", "1 part 3"]
    assert dropped.counts == {"answers: an answer with nothing to compare it with": 2}, "said, and no error"


def test_demonstrations_of_a_tree_are_its_best_and_its_unranked_answers(tmp_path: Path) -> None:
    config = DataConfig(path=write(tmp_path, TREE))
    found, dropped = load_conversations(config)
    assert [[message.content for message in each.messages] for each in found] == [
        ["2+2?", "4"],
        ["2+2?", "maybe 4"],
        ["2+2?", "5", "sure?", "yes"],
        ["2+2?", "4", "thanks", "welcome"],
    ]
    trained = [[m.content for m in each.messages if m.role == "assistant" and m.trained is None] for each in found]
    assert trained == [["4"], ["maybe 4"], ["yes"], ["welcome"]], "each answer once, and none as what came before"
    assert not dropped.total
    tasks, _ = load_tasks(config)
    assert len({task.id for task in tasks}) == len(tasks) == 4


def test_ultrafeedback_is_a_ranked_list_by_the_fine_grained_score(tmp_path: Path) -> None:
    def completion(text: str, score: float) -> dict[str, Any]:
        return {"response": text, "fine-grained_score": score, "overall_score": 10 - score, "model": "m"}

    texts = {"worst": 1.25, "good": 4.5, "tied": 4.5, "best": 4.75}
    row = {"instruction": "Do.", "completions": [completion(text, score) for text, score in texts.items()]}
    (found,) = compared(tmp_path, row)
    assert shape(found) == (["Do."], ["best", "good", "worst"]) and found.tied == 1
    other = {"prompt": "instruction", "answers": "completions[].response", "scores": "completions[].overall_score"}
    (found,) = compared(tmp_path, row, columns=other)
    assert shape(found)[1] == ["worst", "good", "best"], "columns that the recipe names come first"
    with pytest.raises(BadRow, match=r":1: completions\[0\]\.fine-grained_score: no such field; did you mean 'fine_gr"):
        compared(tmp_path, {**row, "completions": [{"response": "a", "fine_grained_score": 1}]})


def arena(winner: str, **fields: Any) -> dict[str, Any]:
    def spoken(answer: str) -> list[dict[str, str]]:
        said = [("user", "x"), ("assistant", answer), ("user", "more"), ("assistant", answer * 2)]
        return [{"role": role, "content": content} for role, content in said]

    return {"conversation_a": spoken("a"), "conversation_b": spoken("b"), "winner": winner, **fields}


def panda(*votes: object) -> dict[str, Any]:
    row = {"instruction": "x", "input": "", "response1": "a", "response2": "b"}
    return {**row, **{f"annotator{index}": vote for index, vote in enumerate(votes, start=1)}}


@pytest.mark.parametrize(
    ("row", "answers", "confidence"),
    [
        ({"input": "x", "output_1": "a", "output_2": "b", "label": 2}, ["b", "a"], 1.0),
        (panda(1, 1, 1), ["a", "b"], 1.0),
        (panda(2, 1, 2), ["b", "a"], 2 / 3),
        (panda(2, 0, 2), ["b", "a"], 2.5 / 3),
        ({"prompt": "x", "response_1": "a", "response_2": "b", "preference_strength": -3}, ["a", "b"], 1.0),
        (
            {
                "context": [{"role": "user", "content": "x"}],
                "response1": "a",
                "response2": "b",
                "overall_preference": 1,
            },
            ["b", "a"],
            1.0,
        ),
        (arena("model_b", turn=1), ["b", "a"], 1.0),
        (arena("model_a"), ["aa", "bb"], 1.0),
        (
            {
                "prompt": "?",
                "text_correct": "\n\nHuman: x\n\nAssistant: a",
                "text_incorrect": "Human: x\n\nAssistant: b",
            },
            ["a", "b"],
            1.0,
        ),
    ],
    ids=[
        "llmbar",
        "all agree",
        "two of three",
        "one undecided",
        "helpsteer2",
        "helpsteer3",
        "mt-bench",
        "arena",
        "hhh",
    ],
)
def test_verdicts_are_pairs(tmp_path: Path, row: dict[str, Any], answers: list[str], confidence: float) -> None:
    (found,) = compared(tmp_path, row)
    assert shape(found) == (["x"], answers) and found.confidence == pytest.approx(confidence)
    assert found.margin == {"preference_strength": 3, "overall_preference": 1}.get(list(row)[-1])
    good, bad = load_judged(DataConfig(path=write(tmp_path, row)))[0]
    assert [(each.answer[-1].content, each.good) for each in (good, bad)] == [(answers[0], True), (answers[1], False)]


@pytest.mark.parametrize("said", [{"columns": {"chosen": "worse", "rejected": "better"}}, {"format": "pair"}])
def test_what_the_recipe_says_of_the_columns_goes_before_a_known_shape(tmp_path: Path, said: dict[str, Any]) -> None:
    known = {"input": "q", "output_1": "a", "output_2": "b", "label": 1, "prompt": "2+2?"}
    own = {"worse": "5", "better": "4"} if "columns" in said else {"chosen": "5", "rejected": "4"}
    assert [shape(found) for found in compared(tmp_path, known | own, **said)] == [(["2+2?"], ["5", "4"])]


@pytest.mark.parametrize("row", [panda(0, 0, 1), panda(1, 2, 0), arena("tie"), arena("tie (bothbad)")], ids=str)
def test_a_tie_is_counted_and_makes_no_pair(tmp_path: Path, row: dict[str, Any]) -> None:
    pair = {"prompt": "x", "chosen": "a", "rejected": "b"}
    found, dropped = load_comparisons(DataConfig(path=write(tmp_path, row, pair)))
    assert len(found) == 1 and dropped.counts == {"a tie between the two answers": 1}


def test_refusing_is_good_where_the_prompt_is_unsafe(tmp_path: Path) -> None:
    labels = ("1_full_compliance", "2_full_refusal", "3_partial_refusal")
    rows = [
        {"prompt": "x", "completion": "a", "type": kind, "final_label": label}
        for kind in ("homonyms", "contrast_homonyms")
        for label in labels
    ]
    found, dropped = load_judged(DataConfig(path=write(tmp_path, *rows)))
    assert [each.good for each in found] == [True, False, False, True] and dropped.total == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "x", "output_1": "a", "output_2": "b", "label": 3}, "label: none of 1, 2; it is a number (3)"),
        ({"input": "x", "output_1": "a", "output_2": "b", "label": True}, "label: none of 1, 2; it is true or false"),
        ({"input": "x", "output_1": "a", "output_2": "a", "label": 1}, "rejected: is the same as the chosen answer"),
        (panda(1, "2", 1), "annotator2: none of 0, 1, 2; it is text ('2')"),
        (arena("model_c"), "winner: none of model_a, model_b; it is text ('model_c')"),
        (
            {"message_tree_id": "t", "prompt": node("prompter", "x", {"role": "assistant", "replies": []})},
            "prompt.replies[0].text: no message of a tree; it is missing",
        ),
        (
            {"message_tree_id": "t", "prompt": node("prompter", "x", node("assistant", "a", deleted=True))},
            "prompt.replies[0].deleted: a deleted message",
        ),
        (
            {"message_tree_id": "t", "prompt": node("prompter", "x", reply("a", rank=0), reply("", rank=1))},
            "answers[1]: empty text",
        ),
        (
            {"message_tree_id": "t", "prompt": node("prompter", "x", reply("a", rank=0), reply("b", rank="1"))},
            "ranks[1]: not a finite number; it is text ('1')",
        ),
    ],
)
def test_a_damaged_row_is_named_with_its_field(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        compared(tmp_path, row)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: {message}")


def test_a_comparison_is_a_good_and_a_bad_answer(tmp_path: Path) -> None:
    pair = {"prompt": "x", "chosen": "a", "rejected": "b", "margin": 0.5}
    ranked = {"prompt": "y", "answers": ["c", "a", "d", "b"], "scores": [1, 4, 1, 2]}
    single = {"prompt": "z", "completion": "a", "label": False}
    found, _ = load_judged(DataConfig(path=write(tmp_path, pair, ranked, single)))
    assert [(each.prompt[0].content, each.answer[0].content, each.good) for each in found] == [
        ("x", "a", True),
        ("x", "b", False),
        ("y", "a", True),
        ("y", "c", False),
        ("z", "a", False),
    ]
    template = JinjaTemplate(byte_tokenizer())
    passed, _ = tokenise_answers(found, template, max_length=100, on_bad_row="error")
    stats = judged_stats(passed, found)
    assert stats.describe().endswith("; 2 middling answers left out"), "the one between and the tied one"
    with pytest.raises(BadRow, match="rejected: is the same as the chosen answer"):
        load_judged(DataConfig(path=write(tmp_path, {**pair, "rejected": "a"})))


# ------------------------------------------------------------------------------------------------ ratings

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def test_helpsteer_and_ultrafeedback_rate_by_objectives(tmp_path: Path) -> None:
    row = {"prompt": "x", "response": "a", **{name: index for index, name in enumerate(ATTRIBUTES)}}
    (found,), _ = load_rated(DataConfig(path=write(tmp_path, row)), ATTRIBUTES)
    assert found.answer[0].content == "a" and found.ratings == {name: float(i) for i, name in enumerate(ATTRIBUTES)}

    several = "x\n<extra_id_1>Assistant\ny\n<extra_id_1>User\nz"
    (found,), _ = load_rated(DataConfig(path=write(tmp_path, {**row, "prompt": several})), ATTRIBUTES)
    assert [(m.role, m.content) for m in found.prompt] == [("user", "x"), ("assistant", "y"), ("user", "z")]

    def completion(text: str, **ratings: object) -> dict[str, Any]:
        return {"response": text, "annotations": {name: {"Rating": rating} for name, rating in ratings.items()}}

    answers = [completion("a", honesty="5", helpfulness="N/A"), completion("b", honesty="N/A"), completion("c")]
    answers.append(completion("d", honesty="3"))
    config = DataConfig(path=write(tmp_path, {"instruction": "x", "completions": answers}), on_bad_row="drop")
    (found, last), dropped = load_rated(config, ("honesty", "helpfulness"))
    assert (last.answer[0].content, last.ratings) == ("d", {"honesty": 3.0})
    assert (found.prompt[0].content, found.answer[0].content, found.ratings) == ("x", "a", {"honesty": 5.0})
    lost = {"ratings: not one rating by the stage's objectives": 2}
    assert dropped.counts == lost, "one answer of a row may be left out and another kept"
    for rating, message in (("five", "honesty.Rating: not a rating; it is text"), (True, "ratings.honesty: not a f")):
        bad = {"instruction": "x", "completions": [completion("a", honesty=rating)]}
        with pytest.raises(BadRow, match=message):
            load_rated(DataConfig(path=write(tmp_path, bad)), ("honesty",))


# ------------------------------------------------------------------------------------------------- steps


def stepwise(folder: Path, row: dict[str, Any]) -> list[tuple[str, list[str], tuple[float | None, ...]]]:
    found, _ = load_stepwise(DataConfig(path=write(folder, row)))
    return [(each.prompt[0].content, "".join(each.steps).split("\n"), each.labels) for each in found]


def offered(*graded: tuple[str, int | None], chosen: int | None, human: str | None = None) -> dict[str, Any]:
    completions = [{"text": text, "rating": rating, "flagged": None} for text, rating in graded]
    written = None if human is None else {"text": human, "rating": None, "source": "human"}
    return {"completions": completions, "human_completion": written, "chosen_completion": chosen}


def prm800k(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"labeler": "l", "question": {"problem": "x"}, "label": {"steps": list(steps), "finish_reason": "solution"}}


def test_prm800k_is_the_solution_and_each_alternative_to_a_step(tmp_path: Path) -> None:
    row = prm800k(
        offered(("a", 1), chosen=0),
        offered(("b", 0), ("c", -1), chosen=0),
        offered(("d", -1), ("e", None), chosen=None, human="f"),
        offered(("g", -1), chosen=0),
        offered(("never reached", 1), chosen=0),
    )
    assert stepwise(tmp_path, row) == [
        ("x", ["a", "b", "f", "g"], (1.0, 1.0, 1.0, 0.0)),
        ("x", ["a", "c"], (None, 0.0)),
        ("x", ["a", "b", "d"], (None, None, 0.0)),
    ]
    _, dropped = load_stepwise(DataConfig(path=write(tmp_path, row)))
    assert dropped.counts == {"labels: no step has a label": 1}, "the alternative e, which nobody graded"
    ended = prm800k(offered(("a", 1), chosen=0), offered(("b", -1), ("c", 1), chosen=None))
    assert stepwise(tmp_path, ended) == [
        ("x", ["a"], (1.0,)),
        ("x", ["a", "b"], (None, 0.0)),
        ("x", ["a", "c"], (None, 1.0)),
    ]


def test_only_graded_steps_are_read(tmp_path: Path) -> None:
    row = {"prompt": "x", "steps": ["a", "b", "c", "d"], "labels": [None, 1, None, 0.5]}
    found, _ = load_stepwise(DataConfig(path=write(tmp_path, row)))
    (read,), _ = tokenise_answers(found, JinjaTemplate(byte_tokenizer()), max_length=100, on_bad_row="error")
    assert stepped(read).rows[0].columns["label"].tolist() == [1.0, 0.5] and read.atom.rows[0].trained_count == 2


K = "\u043a\u0438"


@pytest.mark.parametrize(
    ("row", "steps", "labels"),
    [
        (
            {
                "input": f"x Step 1: a {K}\nStep 2: b {K}\nStep 3: c {K}\n",
                "label": "x Step 1: a +\nStep 2: b -\nStep 3: c -\n",
                "task": "MATH",
            },
            ["Step 1: a", "Step 2: b", "Step 3: c"],
            (1.0, 0.0),
        ),
        ({"problem": "x", "steps": ["a", "b"], "label": -1}, ["a", "b"], (1.0, 1.0)),
        ({"input": "x", "steps": ["a", "b"], "mistake_index": None}, ["a", "b"], (1.0, 1.0)),
        ({"input": "x", "steps": ["a", "b"], "mistake_index": 0}, ["a", "b"], (0.0,)),
        ({"modified_question": "x", "modified_process": ["a", "b"], "error_steps": [2]}, ["a", "b"], (1.0, 0.0)),
        ({"modified_question": "x", "modified_process": ["a", "b"], "error_steps": []}, ["a", "b"], (1.0, 1.0)),
    ],
    ids=["math-shepherd", "processbench", "no mistake", "a mistake", "prmbench", "prmbench without an error"],
)
def test_graded_steps_in_every_shape(
    tmp_path: Path, row: dict[str, Any], steps: list[str], labels: tuple[float, ...]
) -> None:
    assert stepwise(tmp_path, row) == [("x", steps, labels)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (prm800k(offered(("a", 2), chosen=0)), "label.steps[0].completions[0].rating: none of -1, 0, 1; it is a num"),
        (prm800k(offered(("a", 1), chosen=-1)), "label.steps[0].chosen_completion: none of the completions; it is"),
        (prm800k(offered(("a", 1), chosen=1)), "label.steps[0].chosen_completion: none of the completions; it is"),
        (prm800k({"completions": [{"rating": 1}]}), "label.steps[0].completions[0].text: no such field; there are:"),
        ({"input": "x Step 1: a", "label": "x", "task": "t"}, "input: no steps that begin with 'Step 1:'"),
        ({"input": f"x Step 1: a {K}", "label": "x Step 1: b +", "task": "t"}, "label: not the input with + or -"),
        (
            {"modified_question": "x", "modified_process": ["a"], "error_steps": [0]},
            "error_steps[0]: not one of the steps; it is a number (0) of 1",
        ),
        ({"input": "x", "steps": ["a"], "mistake_index": 1}, "label: not the index of a step; it is a number (1)"),
        ({"problem": "x", "steps": ["a"], "label": 0.5}, "label: not the index of a step"),
    ],
)
def test_a_damaged_row_of_steps_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        stepwise(tmp_path, row)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: {message}")


# ------------------------------------------------------------------------------------------------- damage


UNHARMED = [
    TREE,
    {
        "instruction": "x",
        "completions": [{"response": "a", "fine-grained_score": 1, "annotations": {"b": {"Rating": "5"}}}],
    },
    arena("model_a", turn=1),
    panda(1, 2, 1),
    {"prompt": "x\n<extra_id_1>Assistant\ny", "response_1": "a", "response_2": "b", "preference_strength": 2},
    {"prompt": "x", "completion": "a", "type": "contrast", "final_label": "2_full_refusal"},
    prm800k(offered(("a", 1), ("b", -1), chosen=0), offered(("c", -1), chosen=None, human="d")),
    {"input": f"x Step 1: a {K}", "label": "x Step 1: a +", "task": "t"},
    {"modified_question": "x", "modified_process": ["a"], "error_steps": [1]},
    {"input": "x", "steps": ["a"], "mistake_index": 0},
]


def damaged(value: Any) -> Iterator[Any]:
    """The value with one thing in it, at any depth, taken away or replaced by something of another kind."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        without = dict(value) if isinstance(value, dict) else list(value)
        del without[key]
        yield without
        for other in (None, True, 7, "", [], {}, [None], *damaged(value[key])):
            changed = dict(value) if isinstance(value, dict) else list(value)
            changed[key] = other
            yield changed


@pytest.mark.parametrize("row", UNHARMED, ids=lambda row: next(iter(row)))
def test_whatever_is_wrong_with_a_row_is_a_data_error(tmp_path: Path, row: dict[str, Any]) -> None:
    for changed in damaged(row):
        config = DataConfig(path=write(tmp_path, changed))
        for load in (load_comparisons, load_judged, load_conversations, load_tasks, load_stepwise):
            with suppress(DataError):
                load(config)
        with suppress(DataError):
            load_rated(config, ("b",))


# ------------------------------------------------------------------------------------------------ columns


def test_a_path_leads_into_a_column(tmp_path: Path) -> None:
    row = {"a": {"b": [{"c": "x"}, {"c": "y"}]}, "dotted.name": "z"}
    columns = {"prompt": "{a.b[0].c}?", "gold": "a.b[1].c", "all": "a.b[].c", "flat": "dotted.name"}
    (task,), _ = load_tasks(DataConfig(path=write(tmp_path, row), columns=columns))
    assert task.messages[0].content == "x?"
    assert [task.columns[name] for name in ("gold", "all", "flat")] == ["y", ["x", "y"], "z"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a.d", r"a\.d: no such field; there are: b"),
        ("a.b.c", r"a\.b\.c: no such field; it stands in a list"),
        ("a.b[2]", r"a\.b\[2\]: no such item; there are 2"),
        ("a[]", r"a: not a list; it is an object"),
        ("a.b[].d", r"a\.b\[0\]\.d: no such field; there are: c"),
        ("d.b", r"gold: no column 'd\.b'"),
        ("a..b", r"'a\.\.b' is no path; write column\.key"),
        ("a.b[-1]", r"'a\.b\[-1\]' is no path"),
    ],
)
def test_a_path_that_ends_is_named(tmp_path: Path, path: str, message: str) -> None:
    row = {"prompt": "x", "a": {"b": [{"c": "x"}, {"c": "y"}]}}
    with pytest.raises(DataError, match=message):
        load_tasks(DataConfig(path=write(tmp_path, row), columns={"gold": path}))


def test_a_transcript_that_waits_for_its_answer_is_a_prompt(tmp_path: Path) -> None:
    asked = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: 2+2?\n\nAssistant:"
    (found,) = compared(tmp_path, {"prompt": asked, "chosen": "4", "rejected": "5"})
    assert shape(found) == (["hi", "ho", "2+2?"], ["4", "5"])


# --------------------------------------------------------------------------------------------- real files


PM = {"answers": "sampled_answers[].sampled_string", "scores": "sampled_answers[].pm_scores[0].pm_score"}
CHOICE = {"chosen": "corrects[0]", "rejected": "incorrects[0]"}


@pytest.mark.parametrize(
    ("name", "columns", "rows", "lost"),
    [
        ("oasst/dev/en_100_tree.jsonl.gz", {}, 145, 30),
        ("pandalm/dev/testset-v1.jsonl.gz", {}, 541, 88),
        ("llmbar/dev/Natural.jsonl", {}, 72, 0),
        ("llmbar/dev/Adversarial_Neighbor.jsonl", {}, 99, 0),
        ("llmbar/dev/Processed_LLMEval2.jsonl", {}, 130, 2),
        ("constitution/dev/438HHHEvaluations.jsonl.gz", {}, 299, 0),
        ("constitution/dev/rl_samples_with_pm_scores.jsonl.gz", {"prompt": "rl_prompt", **PM}, 151, 54),
        ("constitution/dev/HarmfulVsEthical.jsonl", CHOICE, 165, 0),
    ],
)
def test_real_comparisons(shared_data: Path, name: str, columns: dict[str, str], rows: int, lost: int) -> None:
    config = DataConfig(path=str(shared_data / name), columns=columns, on_bad_row="drop")
    found, dropped = load_comparisons(config)
    assert (len(found), dropped.total) == (rows, lost)
    answers, _ = load_judged(config)
    assert len(answers) == 2 * rows and sum(each.good for each in answers) == rows


def test_real_judged_answers(shared_data: Path) -> None:
    good = {"gpt4": (292, 280), "llama2orig": (266, 196), "mistralinstruct": (281, 201)}
    for name, expected in good.items():
        found, _ = load_judged(DataConfig(path=str(shared_data / f"xstest/dev/completions_{name}.jsonl.gz")))
        assert (len(found), sum(each.good for each in found)) == expected
    samples = {"prompt": "question", "completion": "6b_finetuning.solution", "label": "6b_finetuning.is_correct"}
    path = str(next((shared_data / "gsm8k/dev").glob("example_model_solutions.jsonl*")))
    found, _ = load_judged(DataConfig(path=path, columns=samples))
    assert (len(found), sum(each.good for each in found)) == (872, 193)
    verdicts = {"prompt": "question", "completion": "pred"}
    path = str(shared_data / "verifier_real_pairs/dev/real_pred_pairs.jsonl.gz")
    found, dropped = load_judged(DataConfig(path=path, columns=verdicts, on_bad_row="drop"))
    assert (len(found), dropped.total) == (4670, 20)


@pytest.mark.parametrize(
    ("name", "rows", "lost"),
    [
        ("processbench/dev/gsm8k.jsonl.gz", 270, 0),
        ("processbench/dev/omnimath.jsonl.gz", 684, 0),
        ("prmbench/dev/prmbench_all.jsonl.gz", 4021, 65),
        ("bigbench_mistake/dev/dyck_languages.jsonl.gz", 656, 0),
        ("bigbench_mistake/dev/multistep_arithmetic.jsonl.gz", 206, 0),
    ],
)
def test_real_graded_steps(shared_data: Path, name: str, rows: int, lost: int) -> None:
    found, dropped = load_stepwise(DataConfig(path=str(shared_data / name), on_bad_row="drop"))
    assert (len(found), dropped.total) == (rows, lost)
    assert all(None not in each.labels and 0.0 not in each.labels[:-1] for each in found)
