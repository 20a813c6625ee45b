r"""From a completion to a verdict: the answer in it, read as the gold's type asks, and compared with the gold.

What stands in `<answer>` or in a box may be a sentence. `answers` compares it as it stands, and where it is prose, the
value that the sentence states: what follows its last "=" or "is", else the one number that the question does not
give, else the first. There is always one candidate, so a list of guesses is never right.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from whet.envs.rewards.agree import agree
from whet.envs.rewards.answers import marked_answer, spoken
from whet.envs.rewards.notation import SCALES, plain, predicate, squeeze, untext
from whet.envs.rewards.reader import read
from whet.envs.rewards.values import (
    LONGEST,
    Choice,
    Date,
    Formula,
    Items,
    Matrix,
    Named,
    Number,
    Region,
    Relation,
    Text,
    Value,
    YesNo,
)

if TYPE_CHECKING:
    from whet.envs.rewards.algebra import Algebra

_NUMBER = (
    r"(?<![A-Za-z0-9.{^_])-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))"
    r"(?:\s*\\frac\{\d+\}\{\d+\}|\s\d+/\d+|/\d+|%|\s*\\cdot\s*10\^\{-?\d+\})?"
    r"|-?\\frac\{\d+\}\{\d+\}"
)
_NUMBERS = re.compile(_NUMBER)
_AFTER = re.compile(
    r"(?:=|\b(?:is|are|was|equals?|be|it's|that's|of about)(?:\s+(?:approximately|about|exactly|only|now))?)"
    rf"\s*({_NUMBER})(?!\s*[*^+(\\])(?![a-z](?![a-z^]))"
)
_OPERAND = re.compile(
    r"\b(?:(?:root|square|cube|log|logarithm|power|half|third|multiple|factor|sum|product)s?\s+of|double|triple)\s*$",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(r"\b(?:if|suppose|assuming|assume)\b[^,.;:]*$", re.IGNORECASE)
"""A clause that states what is given: "if there are 5 puppies"."""
_DECIMAL_COMMA = re.compile(r"^[^\d]*(-?\d+),(\d{1,2})(?![\d,])[^\d]*$")
_CALCULATION = re.compile(r"\d\s*[-+*/×x]\s*\$?\d[^=]*=")
_UNKNOWN = re.compile(
    r"^\W*(?:it |this |the (?:answer|value|result) )?"
    r"(?:cannot|can't|can not|impossible|not possible|unable|insufficient|not enough)\b",
    re.IGNORECASE,
)
_DENIED_NUMBER = re.compile(
    rf"(?:\bnot|n't|\bnever)\s+(?:(?:be|equals?(?:\s+to)?|exactly|just|the number)\s+)*\$?(?:{_NUMBER})", re.IGNORECASE
)
_EITHER = re.compile(
    rf"\$?((?:{_NUMBER})(?:\s+[a-z]+)?)(?:\s+[a-z]+)?\s*,?\s*\bor\s+(?:[a-z]+\s+){{0,2}}\$?((?:{_NUMBER})(?:\s+[a-z]+)?)"
    rf"|\bbetween\s+\$?({_NUMBER})\s+and\s+\$?({_NUMBER})",
    re.IGNORECASE,
)
_FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
_OPERATION = re.compile(r"^(?!-?\d+/\d+$)-?.*[-+*/^!=<>\\(]")
_SCALE = re.compile(rf"(?<=\d)\s*({'|'.join(SCALES)})s?\b", re.IGNORECASE)
_VERDICT = re.compile(r"\b(yes|no|true|false)\b(?=\s*(?:[.,;:/!?]|(?:or|and|yes|no|true|false)\b|$))", re.IGNORECASE)
"""Yes or no as a verdict of its own: not "no" in "yes, there is no limit"."""
_SEVERAL = re.compile(
    r"(?<![a-zA-Z'])[A-J]\)?(?:[.,]?\s*(?:or|and|/|&)\s*\(?[A-J](?![a-zA-Z'])\)?)+"
    r"|\b[A-J]\)?(?:[.,;]?\s*\(?[A-J]\b\)?)+\W*$"
)
_LETTERS = re.compile(r"(?<![a-zA-Z'])([A-J])(?![a-zA-Z'])(?!\s+[a-z]{3,}\s+[a-z])")
_DENIED = re.compile(
    r"(?:\bnot|n't(?:\s+be)?|\bcannot be|\bnon|\bneither|\b(?:any|every)thing but|\bexcept|\bother than|不是)"
    r"\s*\(?[A-J]\)?(?![a-zA-Z])"
    r"(?:\s*(?:,|or|and|nor)\s*\(?[A-J]\)?(?![a-zA-Z]))*"
)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$((?:[^$\\]|\\.)+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'*\\$])|(?<=[。！？])|\n+")
LAST = 20_000
"""Characters at the end of an unmarked completion in which its answer is looked for."""
_VALUED = re.compile(r"\d|\\[a-zA-Z(]|\$[^$\s]|[=√½π∞]")


def final_words(completion: str) -> tuple[str, bool]:
    """The words of a completion that give its answer, and whether it marks them; else they are its last statement.

    A statement is a sentence or line with a number or formula in it, or where there is none, the last one at all.
    """
    marked = marked_answer(completion)
    if marked is not None:
        return marked, True
    said = [part for part in _SENTENCE.split(spoken(completion)[-LAST:]) if part.strip()]
    valued = [part for part in said if _VALUED.search(part)]
    return (valued or said or [""])[-1].strip(), False


def vote(completion: str, question: str) -> str | None:
    """The final answer as a majority counts it: equal for what reads as the same value; None where there is none."""
    given, marked = final_words(completion)
    if not 0 < len(given) <= LONGEST:
        return None
    value = read(given)
    if _has_words(value):
        value = read(statement(given, question, marked=marked) or given)
    match value:
        case Number():
            value = replace(value, text="", places=None, unit=None)
        case Choice():
            value = replace(value, text="")
    return repr(value).casefold()


def answers(
    gold: Value,
    gold_text: str,
    given: str,
    algebra: Algebra,
    question: str | None,
    *,
    marked: bool,
    tolerance: float = 0.0,
) -> bool:
    """Whether the words of an answer give the gold value."""
    value = read(given)
    if isinstance(gold, Number) and (comma := _DECIMAL_COMMA.search(given)) and len(comma[2]) == gold.places:
        return agree(gold, read(f"{comma[1]}.{comma[2]}"), algebra, tolerance)
    if agree(gold, value, algebra, tolerance):
        return not (question and _copied(value, given, gold_text, question))
    if (scale := _SCALE.search(given)) and scale[1].lower() in (question or "").lower():  # how many million?
        given = given.replace(scale[0], "")
        return answers(gold, gold_text, given, algebra, None, marked=marked, tolerance=tolerance)
    if isinstance(gold, YesNo | Choice):
        return _leading(gold, value, given)
    if isinstance(gold, Region | Matrix | Relation) and algebra.otherwise(gold_text, given):
        return True
    if isinstance(gold, Text | Date) or not (_has_words(value) or _CALCULATION.search(given)):
        return False
    stated = statement(given, question, marked=marked)
    return stated is not None and agree(gold, read(stated), algebra, tolerance)


def _copied(value: Value, given: str, gold: str, question: str) -> bool:
    """Whether an answer is an expression that the question writes, where the gold one is another: 6*7, not 42."""
    inner = value.value if isinstance(value, Named) else value
    if not isinstance(inner, Number | Formula | Relation):
        return False
    said = _bare(given if isinstance(inner, Relation) else inner.text)
    return _OPERATION.search(said) is not None and said != _bare(gold) and said in _bare(question)


def _bare(text: str) -> str:
    return _FRACTION.sub(r"\1/\2", squeeze(plain(text)))


def _has_words(value: Value) -> bool:
    """Whether words are left that were not understood."""
    if isinstance(value, Items):
        return any(map(_has_words, value.items))
    if isinstance(value, Relation):
        return any(isinstance(read(side), Text) for side in value.sides)
    return isinstance(value, Text) or (isinstance(value, Named) and _has_words(value.value))


def _leading(gold: YesNo | Choice, value: Value, given: str) -> bool:
    """A yes or no, or the letter of an option, among its reasons."""
    if isinstance(gold, Choice):
        return _has_words(value) and _option(given) == gold.letter
    if read(predicate(given)) == gold:  # "The conclusion is true."
        return True
    first = re.match(r"(yes|no|true|false)\b", plain(given), re.IGNORECASE)
    said = {word.lower() in ("yes", "true") for word in [*_VERDICT.findall(given), *([first[1]] if first else [])]}
    return first is not None and said == {gold.yes}


def _option(text: str) -> str | None:
    """The letter that a sentence settles on: first, after "answer", or last; those that it denies do not count."""
    text = _DENIED.sub(" ", text)
    found = list(_LETTERS.finditer(text))
    said = re.search(r"\b(?:answer|option|choice|r[ée]ponse|respuesta|antwort)\b|答案", text, re.IGNORECASE)
    after = [letter for letter in found if said is not None and letter.start() >= said.end()]
    first = re.match(r"\(?([A-J])(?![a-zA-Z'])(?!\s+[a-z])", text)
    settled = first or (after[0] if after else found[-1] if found else None)
    if settled is None or any(each.start() <= settled.start(1) < each.end() for each in _SEVERAL.finditer(text)):
        return None
    return settled[1]


def statement(text: str, question: str | None, *, marked: bool) -> str | None:
    """The value that prose states; None where it states none."""
    dollars = [text[found.end() : found.end() + 1] for found in re.finditer(r"\$", text)]
    if all(after.isdigit() for after in dollars):  # an amount of money, no formula
        text = text.replace("$", " ")
    sentences = [sentence for sentence in _SENTENCE.split(text) if re.search(r"\d|\$|\\[(\[]", sentence)]
    if not sentences:
        return None
    if _UNKNOWN.search(text):
        return None
    place = text if marked else sentences[-1]
    spans = [span for span in _FORMULA.finditer(place) if not isinstance(read(_inside(span)), Text)]
    if spans:
        said = _AFTER.search(place, spans[-1].end())
        return said[1] if said else _inside(spans[-1])
    prose = _DENIED_NUMBER.sub(" ", untext(plain(text)))
    if any(len({_size(each) for each in found.groups() if each}) > 1 for found in _EITHER.finditer(prose)):
        return None
    before, equals, after = prose.rpartition("=")
    later = _SENTENCE.split(after, maxsplit=1)
    if equals and not (len(later) == 2 and _NUMBERS.search(later[1])):
        return after if isinstance(read(after), Number) else _first(after)
    seen = f"{question or ''} {before}"
    prose = later[1] if equals else prose
    if found := [m for m in _AFTER.finditer(prose) if not _SUPPOSED.search(prose[: m.start()])]:
        return found[-1][1]
    idle = (_OPERAND, _SUPPOSED)
    numbers = [m for m in _NUMBERS.finditer(prose) if m.group() and not any(r.search(prose[: m.start()]) for r in idle)]
    known = {read(m.group()) for m in _NUMBERS.finditer(untext(plain(seen))) if m.group()}
    new = [m.group() for m in numbers if read(m.group()) not in known]
    if known and len(new) == 1:
        return new[0]
    if not numbers:
        return None
    return numbers[0].group() if marked else numbers[-1].group()


def _size(text: str) -> object:
    """A number in the base of its unit: `5 meters or 500 centimeters` is one."""
    found = read(text)
    return found.exact * (found.unit.factor if found.unit else 1) if isinstance(found, Number) else text


def _inside(span: re.Match[str]) -> str:
    return str(next(filter(None, span.groups())))


def _first(prose: str) -> str | None:
    found = next((m for m in _NUMBERS.finditer(prose) if m.group()), None)
    return None if found is None else found.group()
