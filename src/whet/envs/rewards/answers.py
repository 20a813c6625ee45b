r"""Where the final answer stands in a text, and what number it is.

A completion is searched only *after* its thinking block, for the last of these, in this order: the inside of
`<answer>...</answer>`; `\boxed{...}` with balanced braces; `#### x`; "answer is x"; a number; the whole text.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST_NUMBER = 400
"""Characters; Python refuses to read much longer integers, and no answer is one."""

_ANSWER_TAGS = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
"""Also one that is not closed: a sampler may stop at `</answer>`."""
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN = re.compile(
    r"[^.\n\\]{0,20}(?:\\text\{[^{}.]*)?(?:,|and\b)[^.\n\\]{0,20}|(?:\s|\$|\\[(),;\[\]]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|,|;|and\b|or\b|(?:[a-zA-Z](?:_\{?\w+\}?)?\s*=))*"
)
_HASHES = re.compile(r"####[ \t:]*([^\n]*)")
_ANSWER_IS = re.compile(r"(?:\banswer(?:\s+is\b|[ *]*[:=])|答案\s*[是为:：])[ *:]*([^\n]+)", re.IGNORECASE)
_WHOLE = re.compile(rf"{_HASHES.pattern}|{_ANSWER_IS.pattern}", re.IGNORECASE)
_GOLD_IS = re.compile(r"\bthe answer is:?\s+(.+)$", re.IGNORECASE | re.DOTALL)
_SPECIAL = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end|end_of_text)\|>.*", re.DOTALL)
"""A template's tokens that were decoded, and what follows them."""
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
"""GSM8K's annotations, `2+3=<<2+3=5>>5`."""
_SENTENCE_END = re.compile(r"\.(?:\s|$)")
# Not inside a word, an index, an exponent or a LaTeX argument, whose digits alone are not the answer.
_NUMBER = re.compile(r"(?<![\w.{^])(?:(?<![)\]])-)?\$?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?(?:(?<=\d)/\d+)?")
_THOUSANDS = re.compile(r",\\!\s*")
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def final_answer(text: str) -> str:
    """The answer that a completion gives, in its own words; empty where there is none."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    region = after_thinking(text)
    numbers = _NUMBER.findall(region)
    return numbers[-1] if numbers else region.strip()


def marked_answer(text: str) -> str | None:
    """The answer where the completion says which it is (tags, box, hashes, "answer is"); None where it does not."""
    region = spoken(text)
    tagged = _ANSWER_TAGS.findall(region)
    if tagged:
        region = tagged[-1]
    marked = _marked(region)
    return region.strip() if marked is None and tagged else marked


def in_tags(text: str) -> str:
    """What stands in the last answer tags, else all that follows the thinking."""
    region = after_thinking(text)
    tagged = _ANSWER_TAGS.findall(region)
    return (tagged[-1] if tagged else region).strip()


def whole_answer(text: str) -> str:
    """An answer of several lines: inside the last tags or the box, after `####` or "answer is", else all of it."""
    region = in_tags(text)
    boxed = last_boxed(region)
    if boxed is not None:
        return boxed.strip()
    marks = [found.start(found.lastindex or 0) for found in _WHOLE.finditer(region)]
    return region[marks[-1] :].strip() if marks else region.strip()


def gold_answer(value: object) -> str:
    r"""The answer that a data set's gold column means: `#### 42`, `\boxed{42}`, or the value as it stands."""
    text = str(value)
    for found in (last_boxed(text), _last(_HASHES, text), _last(_GOLD_IS, text)):
        if found is not None:
            return found.strip()
    opened = _BOX.search(text)  # a box that never closes: a gold is not cut off
    return text[opened.end() :].strip() if opened else text.strip()


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; all of it without a thinking block; nothing while a block is still open."""
    rest = text.rpartition("</think>")[2]
    return "" if "<think>" in rest else rest


def spoken(text: str) -> str:
    """What follows the thinking, without a template's tokens that were decoded and without GSM8K's annotations."""
    return _CALCULATOR.sub("", _SPECIAL.sub("", after_thinking(text)))


def last_boxed(text: str) -> str | None:
    r"""The inside of the last `\boxed{...}`, braces balanced; None without one, or where it never closes.

    Boxes with nothing between them but "and", a comma or a name (`x = `) are one answer: `\boxed{1} and \boxed{2}`.
    """
    inside: list[str] = []
    following = len(text)
    for start in reversed(list(_BOX.finditer(text))):
        end = _closing(text, start.end())
        if end is None:
            return None if not inside else ", ".join(inside)
        if inside and (
            end > following or (text[start.end() : end] == inside[0] and not text[end + 1 : following].strip())
        ):
            following = start.start()  # a box around the last one, or the same again
            continue
        if inside and _BETWEEN.fullmatch(text[end + 1 : following]) is None:
            break
        inside.insert(0, text[start.end() : end])
        following = start.start()
    return ", ".join(inside) if inside else None


def _closing(text: str, position: int) -> int | None:
    """Where the brace closes that opens before `position`."""
    depth = 1
    while position < len(text):
        character = text[position]
        if character == "\\":  # the next character is escaped: \{ opens nothing
            position += 1
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 1
    return None


def tidy(text: str) -> str:
    """The answer without what never changes its meaning: outer dollars, thin spaces, a full stop, emphasis."""
    text = _THOUSANDS.sub("", text).replace("\\!", "").replace("\\$", "").replace("\\%", "%").replace("\u2212", "-")
    text = " ".join(text.split())
    previous = None
    while text != previous:
        previous = text
        text = text.strip("* `").removesuffix(".").strip()
        for left, right in _WRAPPERS:
            inner = text[len(left) : -len(right)]
            if text == f"{left}{inner}{right}" and left not in inner and inner:
                text = inner
    return text


def as_number(text: str) -> Fraction | None:
    """A plain number's exact value (`1,234`, `$5.00`, `50%` as 50, `007`, `3/4`); None for anything else."""
    text = tidy(text).replace("{,}", ",").removeprefix("$").removesuffix("$").removesuffix("%").strip()
    if not 0 < len(text) <= LONGEST_NUMBER or _PLAIN_NUMBER.fullmatch(text) is None:
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # "+", or 3/0
        return None


def _marked(region: str) -> str | None:
    boxed = last_boxed(region)
    if boxed is not None:
        return boxed.strip()
    hashes = _last(_HASHES, region)
    if hashes is not None:
        return hashes.strip()
    said = _last(_ANSWER_IS, region)
    while said is not None and (later := _last(_ANSWER_IS, said)) is not None:
        said = later
    return None if said is None else _SENTENCE_END.split(said)[0].strip()


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1] if found else None
