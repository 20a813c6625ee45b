"""The 25 kinds of instructions of IFEval (Zhou et al., 2311.07911), each a function of the answer and its arguments.

A kind is called as in the data's `instruction_id_list`, an argument as in its `kwargs`. Where the text of one leaves
something open, what the authors' checkers take counts. Two differ: sentences are split by rule and not by NLTK's model,
and an answer all in capitals or small letters need not be recognised as English.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

Check = Callable[..., bool]

_ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|Inc|Ltd|Co|No|Fig|U\.S|a\.m|p\.m|\d+)\.$", re.IGNORECASE
)
_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def sentences(text: str) -> list[str]:
    """The sentences of a text: up to `.`, `!` or `?` before a space, abbreviations and numbers of lists aside."""
    found, begin, last = list[str](), 0, len(text.rstrip())
    for end in re.finditer(r"[.!?]+[\"')\]*”’]*(?=\s|$)", text):
        before = text[max(begin, end.start() - 20) : end.end()]
        if end[0] == "." and end.end() < last and _ABBREVIATION.search(before):
            continue
        found.append(text[begin : end.end()].strip())
        begin = end.end()
    rest = text[begin:].strip()
    return [*found, rest] if rest else found


def compare(count: int, relation: str, wanted: float) -> bool:
    """Whether a count is `at least` or `less than` what is wanted. Raises `ValueError` for another relation."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"the relation {relation!r} is none of 'at least', 'less than'")
    return count >= wanted if relation == "at least" else count < wanted


def count_of(word: str, text: str, *, whole: bool = False) -> int:
    """How often a word or phrase stands in a text, by itself if it is to be `whole`; case aside."""
    escaped = rf"\b{re.escape(word)}\b" if whole else re.escape(word)
    return len(re.findall(escaped, text, re.IGNORECASE))


def _language(text: str, language: str) -> bool:
    try:
        import py3langid
    except ImportError as error:
        raise ValueError("py3langid tells the language of an answer; pip install 'whet[envs]'") from error
    return bool(py3langid.classify(text)[0] == language.lower().partition("-")[0])


def _json(text: str) -> bool:
    fenced = re.fullmatch(r"```\w*\n?(.*?)\n?```", text.strip(), re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _parts(text: str, separator: str) -> list[str]:
    """The parts of a text; an empty one before the first or after the last separator is none."""
    parts = [part.strip() for part in re.split(separator, text)]
    return parts[(not parts[0]) : len(parts) - (not parts[-1])]


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    found = re.match(r"['\"]*([^\s.,?!'\"]*)", paragraphs[nth_paragraph - 1])
    return found is not None and found[1].lower() == first_word.lower()


IFEVAL: Mapping[str, Check] = {
    "keywords:existence": lambda text, keywords: all(count_of(each, text) for each in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation: compare(
        count_of(keyword, text), relation, frequency),
    "keywords:forbidden_words": lambda text, forbidden_words: not any(
        count_of(each, text, whole=True) for each in forbidden_words),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: compare(
        text.lower().count(letter.lower()), let_relation, let_frequency),
    "language:response_language": _language,
    "length_constraints:number_sentences": lambda text, num_sentences, relation: compare(
        len(sentences(text)), relation, num_sentences),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (
        len(parts := _parts(text, r"\s?\*\*\*\s?")) == num_paragraphs and all(parts)),
    "length_constraints:number_words": lambda text, num_words, relation: compare(len(words(text)), relation, num_words),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders),
    "detectable_content:postscript": lambda text, postscript_marker: bool(
        re.search(_POSTSCRIPTS.get(postscript_marker, re.escape(postscript_marker.lower())), text.lower())),
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        len(re.findall(r"(?m)^[^\S\n]*(?:\*[^*]|-).*$", text)) == num_bullets),
    "detectable_format:constrained_response": lambda text: bool(re.search(r"My answer is (?:yes|no|maybe)\.", text)),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        sum(bool(each.strip()) for stars in ("", r"\*") for each in re.findall(rf"\*{stars}([^\n*]*)\*{stars}", text))
        >= num_highlights),
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections),
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda text: any(inner.strip(" >") for inner in re.findall(r"<<([^\n<]+)>>", text)),
    "combination:two_responses": lambda text: (
        len(parts := _parts(text, r"\*{6}")) == len({*parts} - {""}) == 2),
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())),
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: compare(
        sum(map(str.isupper, re.findall(r"[^\W_](?:[\w'.-]*[^\W_])?", text))), capital_relation, capital_frequency),
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda text: "," not in text,
}  # fmt: skip
"""By IFEval's ids."""
