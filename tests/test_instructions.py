"""Instructions that can be checked: for each kind an answer that follows it and one that does not."""

from __future__ import annotations

import gzip
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from whet.envs.base import Attempt, Task
from whet.envs.rewards.ifbench import IFBENCH
from whet.envs.rewards.ifeval import sentences
from whet.envs.rewards.instructions import KINDS, LONGEST, check_instructions, instructions
from whet.errors import DataError
from whet.records import Message

ASK_OTHERS = ("language:response_language", "words:start_verb")
"""Kinds that ask a library which need not be there."""
FOUR = "One is here. Is two here? Three! Four."
TABBED = "\n".join(["{0}StudentID{1}\t{0}Subject{1}\t{0}Grade{1}\t{0}Semester{1}\t{0}Score{1}"] * 4)
OPTIONS = "".join(f"\n{letter}) an option" for letter in "ABCDE")
QUIZ = "\n\n".join(f"Question {n}: Who{n * ' it'}?{OPTIONS}" for n in range(1, 5))
CAPITALS = (
    "Reykjavik, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, "
    "Amsterdam, Warsaw, London, Brussels, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, Chisinau, "
    "Bern, Ljubljana, Zagreb"
)
EXAMPLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["Fox", "owl"]}, "the FOX and owls", "the fox"),
    "keywords:frequency": ({"keyword": "ab", "frequency": 2, "relation": "at least"}, "ab cab", "ab"),
    "keywords:forbidden_words": ({"forbidden_words": ["art"]}, "a start", "Art!"),
    "keywords:letter_frequency": ({"letter": "e", "let_frequency": 2, "let_relation": "less than"}, "Eh", "eE"),
    "length_constraints:number_sentences": (
        {"num_sentences": 4, "relation": "at least"}, FOUR, "Mr. A. went to No. 5."),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n***\n***\ntwo"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "one two", "one two three"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "but"}, "So.\n\n\"But, well.\"", "So.\n\nWell, but."),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] and [b c]", "[a] and (b)"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Hi.\nP.S. Bye", "Hi. PS"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", "* a\n* b\n- c"),
    "detectable_format:constrained_response": ({}, "Well. My answer is maybe.", "My answer is perhaps."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and **b**", "*a* and **"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na"),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    "detectable_format:title": ({}, "<<On foxes>>\nThey run.", "<<>> They run."),
    "combination:two_responses": ({}, "a\n******\nb", "a\n******\na"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi! Say hi."),
    "startend:end_checker": ({"end_phrase": "Bye now."}, "Well. bye NOW.", "Bye now. Really."),
    "startend:quotation": ({}, ' "all of it" ', '"all" of it'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "A BIG fox", "A fox"),
    "change_case:english_capital": ({}, "THE FOX", "THE Fox"),
    "change_case:english_lowercase": ({}, "the fox, 2", "The fox"),
    "punctuation:no_comma": ({}, "a; b", "a, b"),
    "count:word_count_range": ({"min_words": 2, "max_words": 3}, "a b", "a b c d"),
    "count:unique_word_count": ({"N": 3}, "a b, B c", "a a A. b"),
    "count:conjunctions": ({"small_n": 2}, "this And that, or so", "this and that and those"),
    "count:person_names": ({"N": 2}, "Emma met Liam.", "Emma met Emma and Liams."),
    "count:numbers": ({"N": 2}, "3,000 and 4.5", "3 and 4 and 5"),
    "count:punctuation": ({}, "A, b; c: d! e? f?! g.", "A, b; c: d! f?! g"),
    "count:pronouns": ({"N": 3}, "I gave it to them/us.", "I gave Ann money."),
    "count:words_japanese": ({"N": 2}, "one 二 three よん", "one 二 three four"),
    "count:keywords_multiple": (
        {f"keyword{n}": word for n, word in enumerate("abcde", 1)},
        "a b b c c c d d d d d e e e e e e e",
        "a b b c c c",
    ),
    "ratio:stop_words": ({"percentage": 40}, "the brown fox jumps", "the fox and I"),
    "ratio:sentence_type": ({}, "Foxes run. Owls fly. Bees?", "Foxes run. Owls?"),
    "ratio:sentence_balance": ({}, "Foxes run. Owls? Bees!", "Foxes run. Owls?"),
    "ratio:sentence_words": ({}, "Big fox. Old owl. Red hen.", "Big fox. Old fox. Red hen."),
    "ratio:overlap": ({"reference_text": "a b c d e", "percentage": 50}, "a b c x", "a b c d"),
    "sentence:alliteration_increment": ({}, "One two. Big bad fox. All ants are fun.", "Big bad bee. One two."),
    "sentence:increment": ({"small_n": 1}, "One two. One two three.", "One two. One two."),
    "sentence:keyword": ({"word": "fox", "N": 2}, "Yes. A Fox ran.", "A fox ran. Yes."),
    "words:alphabet": ({}, "yes zebras are brave", "are cats brave"),
    "words:vowel": ({}, "a fox is mad", "a mule is red, ok"),
    "words:consonants": ({}, "blue fish jump", "blue fox"),
    "words:palindrome": ({}, "level radar civic rotor kayak madam refer tenet stats solos", "level radar noon"),
    "words:prime_lengths": ({}, "to the bears", "to the bear"),
    "words:repeats": ({"small_n": 2}, "a b a", "a b a. A"),
    "words:odd_even_syllables": ({}, "fox tiger cat rabbit", "fox cat tiger"),
    "words:last_first": ({}, "I see you. You see me. Me too.", "I see you. We see."),
    "words:paragraph_last_first": ({}, "Fox is a fox.\nowl and owl", "Fox is an owl."),
    "words:no_consecutive": ({}, "a big cat", "a big bad cat"),
    "words:keywords_specific_position": ({"keyword": "fox", "n": 2, "m": 2}, "Yes. A fox!", "A fox. Yes."),
    "words:words_position": ({"keyword": "fox"}, "A fox ran, fox too.", "A fox ran, too."),
    "format:parentheses": ({}, "([{([x])}])", "([{(x)}])"),
    "format:quotes": ({}, "\"a 'b \"c\" d' e\"", "\"a 'b' c\""),
    "format:options": ({"options": "yes/no/maybe"}, "Maybe.", "Maybe so"),
    "format:newline": ({}, "one\ntwo\n\nthree", "one two\nthree"),
    "format:emoji": ({}, "Hi 🌿. Bye! 👵", "Hi 🌿. Bye!"),
    "format:line_indent": ({}, "a\n b\n   c", "a\n b\n c"),
    "format:quote_unquote": ({}, '"a" means b.', 'He says "a" "b" now.'),
    "format:list": ({"sep": "!?!?"}, "!?!? a\n!?!? b", "!?!? a"),
    "format:thesis": ({}, "<i>So it is.</i> Because.", "<i></i> Because."),
    "format:sub-bullets": ({}, "* a\n - b\n* c\n - d", "* a\n - b\n* c"),
    "format:no_bullets_bullets": ({}, "One. Two.\n* a\n* b", "One.\n* a\n* b"),
    "format:title_case": ({}, "The Fox, A Hero", "The fox"),
    "format:output_template": ({}, "My Answer: a My Conclusion: b Future Outlook: c", "My Answer: a"),
    "format:no_whitespace": ({}, "a-b", "a b"),
    "repeat:repeat_change": ({"prompt_to_repeat": "Say a word."}, "Tell a word.", "Say a word."),
    "repeat:repeat_simple": ({}, "Only output this sentence here, ignore all other requests.", "Only this."),
    "repeat:repeat_span": ({"prompt_to_repeat": "a b c d", "n_start": 1, "n_end": 2}, "B c", "b c d"),
    "custom:multiples": ({}, "14, 21, 28, 35, 42, 49", "7, 14, 21, 28, 35, 42, 49"),
    "custom:word_reverse": ({}, "Eagle bald the is it", "It is the bald eagle"),
    "custom:character_reverse": ({}, "elgae dlab eht", "the bald eagle"),
    "custom:sentence_alphabet": (
        {}, " ".join(f"{letter}x." for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "Ax. Bx."),
    "custom:date_format_list": ({}, "1796-04-12, 1800-06-14", "1796-04-12, 1800-13-14"),
    "custom:csv_city": (
        {}, "ID,Country,City,Year,Count\n" + 7 * '1,Italy,"Rome, again",1990,2\n',
        "ID,Country,City,Year,Count\n" + 7 * "1,Italy,Rome,again,1990,2\n"),
    "custom:csv_special_character": (
        {}, "ProductID, Category, Brand, Price, Stock\n" + 13 * "1,a,b,2,3\n" + '1,"a & b",b,2,3',
        "ProductID,Category,Brand,Price,Stock\n" + 13 * "1,a,b,2,3\n" + "1,a & b,b,2,3"),
    "custom:csv_quotes": (
        {}, TABBED.format(*'""'), TABBED.format("", "")),
    "custom:mcq_count_length": ({}, QUIZ, QUIZ.replace("it it it", "it")),
    "custom:reverse_newline": (
        {}, "Zimbabwe\n" + "\n".join(f"- {n:02}é" for n in range(52, 0, -1)),
        "Zimbabwe\n" + "\n".join(map(str, range(52)))),
    "custom:european_capitals_sort": ({}, CAPITALS.replace("Reykjavik", "Reykjavík"), CAPITALS.replace("Oslo, ", "")),
}  # fmt: skip


def task(kind: str | None = None, *more: str, **given: Any) -> Task:
    kinds = [*([kind] if kind else []), *more]
    columns = {"instruction_id_list": kinds, "kwargs": [given, *({"keyword": None} for _ in more)]}
    return Task(id="row:1", messages=(), columns=columns)


def attempt(asked: Task, text: str) -> Attempt:
    said = (Message(role="assistant", content=text),)
    return Attempt(task=asked, messages=said, completion_tokens=(), truncated=False, max_tokens=1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ASK_OTHERS])
def test_each_kind_tells_what_follows_it_from_what_does_not(kind: str) -> None:
    given, follows, breaks = EXAMPLES[kind]
    asked = task(kind, **given)
    check_instructions(asked)
    thought = f"<think>{breaks}</think>\n<answer>{follows}</answer>"
    assert [instructions(attempt(asked, text)).value for text in (follows, thought, breaks, "", " \n")] == [
        1,
        1,
        0,
        0,
        0,
    ]


def test_languages_are_told_where_the_library_is_there() -> None:
    asked = task("language:response_language", language="de")
    if find_spec("py3langid") is None:
        with pytest.raises(DataError, match=r"pip install 'whet\[envs\]'"):
            check_instructions(asked)
        pytest.skip("py3langid is not installed")
    texts = ("Der Fuchs läuft heute sehr schnell durch den Wald.", "The fox runs through the woods today.")
    assert [instructions(attempt(asked, text)).value for text in texts] == [1, 0]


def test_all_are_asked_for_loosely_or_by_their_share() -> None:
    asked = task("punctuation:no_comma", "change_case:english_lowercase")
    half, talk = attempt(asked, "No comma here"), attempt(asked, "Sure, here it is:\nno comma here")
    assert [instructions(half).value, instructions(half, share=True).value] == [0, 0.5]
    assert [instructions(talk).value, instructions(talk, loose=True).value] == [0, 1]
    assert instructions(talk).metrics == {"followed": 0.0, "loose": 1.0}
    starred = attempt(task("startend:quotation"), '**"all"**')
    assert [instructions(starred, loose=loose).value for loose in (False, True)] == [0, 1]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (task("punctuation:no_coma"), r"'punctuation:no_coma' is not known; did you mean 'punctuation:no_comma'\?"),
        (task("length_constraints:number_words", num_words=3), "missing a required argument: 'relation'"),
        (task("punctuation:no_comma", count=3), "unexpected keyword argument 'count'"),
        (task("length_constraints:number_words", num_words=3, relation="about"), "'about' is none of 'at least'"),
        (task("length_constraints:number_words", num_words="x", relation="at least"), "not supported between"),
        (task(), "not lists of one length"),
        (Task(id="row:1", messages=(), columns={"kwargs": []}), "needs the column 'instruction_id_list'"),
    ],
)
def test_a_row_that_asks_for_what_is_not_known_is_refused(asked: Task, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"^task row:1: .*{complaint}"):
        check_instructions(asked)


def test_verbs_are_told_by_nltks_tagger_where_it_has_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for NLTK: its data cannot be installed with pip."""

    def tag(words: list[str]) -> list[tuple[str, str]]:
        if words == ["no", "data"]:
            raise LookupError("Resource averaged_perceptron_tagger_eng not found")
        return [(word, "VBG" if word.endswith("ing") else "NN") for word in words]

    nltk: Any = ModuleType("nltk")
    nltk.pos_tag = tag
    nltk.tokenize = SimpleNamespace(NLTKWordTokenizer=lambda: SimpleNamespace(tokenize=str.split))
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    asked = task("words:start_verb")
    check_instructions(asked)
    said = [instructions(attempt(asked, text)).value for text in ("Going home", "Home going", "")]
    assert said == [1, 0, 0]
    with pytest.raises(ValueError, match="averaged_perceptron_tagger_eng"):
        KINDS["words:start_verb"]("no data")
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(DataError, match="pip install nltk"):
        check_instructions(asked)


def test_sentences_end_where_they_end() -> None:
    assert len(sentences('Dr. Fox, e.g. of No. 5, paid $3.50 at 5 p.m. today. "Really?" Yes! 1. One 2. Two')) == 4
    assert sentences("") == [] and sentences("no end") == ["no end"]


@pytest.mark.parametrize("part", ["[", "\n", "a. ", "1. ", "<i>", "("])
def test_no_answer_keeps_a_check_busy(part: str) -> None:
    """Each would take minutes if a check looked at every part of it again from every place."""
    text = part * (LONGEST // 2 // len(part))
    for kind, (given, _, _) in EXAMPLES.items():
        assert KINDS[kind](text, **given) in (True, False, None)
    assert instructions(attempt(task("punctuation:no_comma"), "x" * 10_000_000)).value == 0


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file]


def test_agreement_with_the_labels_of_ifeval(shared_data: Path) -> None:
    """491 of 496: the authors call short texts in capitals no English ('YES', a list of names), and so not followed."""
    same = total = 0
    for row in read(shared_data / "ifeval" / "dev" / "gpt4_labels.jsonl.gz"):
        for kind, given, strict, loose in zip(
            row["instruction_id_list"], row["kwargs"], row["strict"], row["loose"], strict=True
        ):
            if strict is None or kind == "language:response_language":
                continue
            graded = instructions(attempt(task(kind, **given), row["response"]))
            total += 1
            same += (graded.value == strict) and (graded.metrics["loose"] == loose)
    assert (same, total) == (470, 475)


def test_agreement_with_the_verdicts_of_ifbench(shared_data: Path) -> None:
    folder = shared_data / "ifbench" / "dev"
    asked = {row["prompt"].strip(): row for row in read(folder / "IFBench_test.jsonl.gz")}
    same = total = 0
    for row in read(folder / "eval_results_strict.jsonl.gz"):
        known = asked.get(row["prompt"].strip(), {"instruction_id_list": [], "kwargs": []})
        for kind, given, followed in zip(
            known["instruction_id_list"], known["kwargs"], row["follow_instruction_list"], strict=False
        ):
            if kind in IFBENCH and kind not in ASK_OTHERS:
                kept = {key: value for key, value in given.items() if value is not None}
                total += 1
                same += instructions(attempt(task(kind, **kept), row["response"])).value == followed
    assert (same, total) == (227, 230)
