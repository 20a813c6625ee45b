"""Data sets that say which answer is better, whether one is good, or how good by several objectives.

| data set                      | known by                               | becomes                                |
|-------------------------------|----------------------------------------|----------------------------------------|
| OpenAssistant trees           | message_tree_id, prompt.replies        | a ranked list for each answered prompt |
| UltraFeedback                 | instruction, completions[].response    | a ranked list by fine-grained_score    |
| LLMBar                        | input, output_1, output_2, label       | a pair                                 |
| PandaLM's human labels        | response1, response2, annotator1 ... 3 | a pair, the share of votes beside it   |
| HelpSteer2 and 3, preferences | two responses, preference_strength or  | a pair with a margin of 1 to 3         |
|                               | overall_preference                     |                                        |
| MT-bench human, Chatbot Arena | conversation_a, conversation_b, winner | a pair                                 |
| Anthropic's HHH               | text_correct, text_incorrect           | a pair of transcripts                  |
| XSTest completions            | prompt, completion, type, final_label  | an answer called good or bad           |
| HarmfulVsEthical and the like | prompt, corrects[0], incorrects[0]     | a pair                                 |

and data sets that rate an answer by several objectives:

| HelpSteer, HelpSteer2         | prompt, response, helpfulness, ...     | an answer with its five ratings        |
| UltraFeedback                 | instruction, completions[].annotations | each answer with its four, those in    |
|                               |                                        | annotations.*.Rating; N/A is no rating |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from whet.data.columns import pick
from whet.data.faults import Place, kind_of
from whet.data.known.base import Columns, Known, helpsteer_prompt, one_of

# -------------------------------------------------------------------------------------- trees and lists


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """A message of a tree, and the messages that answer it."""

    role: str
    text: str
    rank: Any
    replies: list[_Node]


def _node(value: Any, place: Place) -> _Node:
    for name, kind in (("role", str), ("text", str), ("replies", list)):
        found = value.get(name) if isinstance(value, dict) else value
        if not isinstance(value, dict) or not isinstance(found, kind):
            raise place[name].bad("no message of a tree", f"it is {kind_of(found)}; one has role, text and replies")
    if value.get("deleted"):
        raise place["deleted"].bad("a deleted message", "use the trees that are ready for export")
    replies = [_node(reply, place["replies"][index]) for index, reply in enumerate(value["replies"])]
    return _Node(role=value["role"], text=value["text"], rank=value.get("rank"), replies=replies)


def _answered(node: _Node, before: list[Columns]) -> Iterator[Columns]:
    """The ranked answers to each of the user's messages, and on its own each answer without a rank."""
    prompt = [*before, {"role": node.role, "content": node.text}]
    if node.role == "prompter":
        ranked = [reply for reply in node.replies if reply.rank is not None]
        if ranked:
            answers = [reply.text for reply in ranked]
            yield {"prompt": prompt, "answers": answers, "ranks": [reply.rank for reply in ranked]}
        yield from ({"prompt": prompt, "answers": [reply.text]} for reply in node.replies if reply.rank is None)
    for reply in node.replies:
        yield from _answered(reply, prompt)


def _ultrafeedback(columns: Columns, place: Place) -> Columns:
    return {
        "prompt": columns["instruction"],
        "answers": pick(columns, "completions[].response", place),
        # Not overall_score: it is 10 for some answers that are as bad as a 1.
        "scores": pick(columns, "completions[].fine-grained_score", place),
    }


# ------------------------------------------------------------------------------------------------ pairs


_TIE = "a tie between the two answers"


def _llmbar(columns: Columns, place: Place) -> Columns:
    best = one_of(columns["label"], (1, 2), place["label"])
    return {"prompt": columns["input"], "label": None, **_pair(columns["output_1"], columns["output_2"], best == 1)}


def _pandalm(columns: Columns, place: Place) -> Columns:
    names = ("annotator1", "annotator2", "annotator3")
    votes = Counter(one_of(columns[name], (0, 1, 2), place[name]) for name in names)
    (best, most), *others = votes.most_common()
    if best == 0 or any(count == most for _, count in others):
        raise place.left_out(_TIE)
    pair = _pair(columns["response1"], columns["response2"], best == 1)
    return {"confidence": (most + votes[0] / 2) / votes.total(), **pair}


def _helpsteer2(columns: Columns, place: Place) -> Columns:
    pair = _by_strength(columns["response_1"], columns["response_2"], columns, "preference_strength", place)
    return {"prompt": helpsteer_prompt(columns, place), **pair}


def _helpsteer3(columns: Columns, place: Place) -> Columns:
    pair = _by_strength(columns["response1"], columns["response2"], columns, "overall_preference", place)
    return {"prompt": columns["context"], **pair}


def _by_strength(first: Any, second: Any, columns: Columns, name: str, place: Place) -> Columns:
    """From -3, the first is much better, to 3, the second is."""
    strength = one_of(columns[name], (-3, -2, -1, 0, 1, 2, 3), place[name])
    if strength == 0:
        raise place.left_out(_TIE)
    return {"margin": abs(strength), **_pair(first, second, strength < 0)}


def _arena(columns: Columns, place: Place) -> Columns:
    winner = columns["winner"]
    if isinstance(winner, str) and winner.startswith("tie"):
        raise place.left_out(_TIE)
    first_wins = one_of(winner, ("model_a", "model_b"), place["winner"]) == "model_a"
    first, second = columns["conversation_a"], columns["conversation_b"]
    if columns.get("turn") == 1 and isinstance(first, list) and isinstance(second, list):
        first, second = first[:2], second[:2]  # MT-bench shows two turns where it asks about the first, too
    return _pair(first, second, first_wins)


def _pair(first: Any, second: Any, first_is_better: bool) -> Columns:
    chosen, rejected = (first, second) if first_is_better else (second, first)
    return {"chosen": chosen, "rejected": rejected}


# -------------------------------------------------------------------------------------- judged answers


def _xstest(columns: Columns, place: Place) -> Columns:
    """Prompts of a type that begins with `contrast` are unsafe and should be refused, all others answered."""
    at = place["final_label"]
    given = one_of(columns["final_label"], ("1_full_compliance", "2_full_refusal", "3_partial_refusal"), at)
    if given == "3_partial_refusal":
        raise at.left_out("neither answered nor refused")
    unsafe = str(columns["type"]).startswith("contrast")
    return {"label": (given == "2_full_refusal") == unsafe}


ANSWERS: Known = {
    ("message_tree_id", "prompt.replies"): lambda c, at: _answered(_node(c["prompt"], at["prompt"]), []),
    ("instruction", "completions[].response"): _ultrafeedback,
    ("input", "output_1", "output_2", "label"): _llmbar,
    ("response1", "response2", "annotator1", "annotator2", "annotator3"): _pandalm,
    ("prompt", "response_1", "response_2", "preference_strength"): _helpsteer2,
    ("context", "response1", "response2", "overall_preference"): _helpsteer3,
    ("conversation_a", "conversation_b", "winner"): _arena,
    ("text_correct", "text_incorrect"): lambda c, _: {
        "prompt": None, "chosen": c["text_correct"], "rejected": c["text_incorrect"]},
    ("prompt", "corrects[0]", "incorrects[0]"): lambda c, at: {
        "chosen": pick(c, "corrects[0]", at), "rejected": pick(c, "incorrects[0]", at)},
    ("prompt", "completion", "type", "final_label"): _xstest,
}  # fmt: skip


_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def _helpsteer(columns: Columns, place: Place) -> Columns:
    ratings = {name: columns[name] for name in _ATTRIBUTES}
    return {"prompt": helpsteer_prompt(columns, place), "completion": columns["response"], "ratings": ratings}


def _aspects(columns: Columns, place: Place) -> Iterator[Columns]:
    answers = pick(columns, "completions[].response", place)
    for index, aspects in enumerate(pick(columns, "completions[].annotations", place)):
        at = place["completions"][index]["annotations"]
        if not isinstance(aspects, dict):
            raise at.bad("no ratings by aspect", f"it is {kind_of(aspects)}")
        ratings = {name: _rating(pick(aspects, f"{name}.Rating", at), at[name]["Rating"]) for name in aspects}
        yield {"prompt": columns["instruction"], "completion": answers[index], "ratings": ratings}


def _rating(value: Any, place: Place) -> Any:
    """UltraFeedback writes its numbers as texts."""
    if not isinstance(value, str):
        return value
    try:
        return None if value == "N/A" else float(value)
    except ValueError as error:
        raise place.bad("not a rating", f"it is {kind_of(value)}; write a number, or N/A") from error


RATINGS: Known = {
    ("prompt", "response", *_ATTRIBUTES): _helpsteer,
    ("instruction", "completions[].response", "completions[].annotations"): _aspects,
}
