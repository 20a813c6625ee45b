r"""One notation for what answers are written in: LaTeX of many dialects, Unicode, HTML and the marks around them.

`plain` maps spellings of the same mathematics onto one spelling and never changes a value: `\dfrac12`, `½` and
`\frac{1}{2}` become `\frac{1}{2}`; `x²` becomes `x^{2}`; dollars, thin spaces, `\left` and emphasis go.
"""

from __future__ import annotations

import re
import unicodedata

_SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "×": "\\cdot ", "·": "\\cdot ", "⋅": "\\cdot ", "∗": "*", "÷": "/",
    "≤": "\\le ", "≥": "\\ge ", "≦": "\\le ", "≧": "\\ge ", "⩽": "\\le ", "⩾": "\\ge ", "≠": "\\ne ",
    "∞": "\\infty ", "π": "\\pi ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "δ": "\\delta ",
    "λ": "\\lambda ", "μ": "\\mu ", "ρ": "\\rho ", "σ": "\\sigma ", "φ": "\\phi ", "ω": "\\omega ", "ε": "\\epsilon ",
    "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "±": "\\pm ", "∀": "\\forall ", "∃": "\\exists ", "∅": "\\emptyset ",
    "°": "^{\\circ}", "º": "^{\\circ}", "’": "'", "‘": "'", "′": "'", "“": '"', "”": '"', "…": "\\ldots ",
    "→": "\\to ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "∠": "\\angle ",
    "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "△": "\\triangle ", "∶": ":",
}  # fmt: skip
_ROOTS = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits|hfill|hspace\{[^{}]*\}|mathopen|mathclose)(?![a-zA-Z])", ""),
    (r"\\(?:text(?:bf|it|rm|normal|sf|up)|math(?:rm|bf|it|sf)|rm|mbox|hbox|emph)\s*\{", r"\\text{"),
    (r"\\text\s+\{", r"\\text{"),
    (r"\\text\{\s*(sin|cos|tan|cot|csc|ln|log|arcsin|arccos|arctan)\s*\}", r"\\\1 "),
    (r"\\operatorname\*?\{(\w+)\}", r"\\\1 "),
    (r"\{\s*\}\s*(?=\^)", ""),
    (r"(?<=\d)\s*\^?\s*\{?\s*(?:\\text\{\s*)?(?:st|nd|rd|th)\s*\}{0,2}(?![a-zA-Z}])", " "),
    (r"\\text\{([^{}]*[^{}\s])\s+(and|or)\s*\}", r"\\text{\1} \\text{ \2 }"),
    (r"\\text\{\s*(and|or)\s+([^{}\s][^{}]*)\}", r"\\text{ \1 } \\text{\2}"),
    (r"\{,\}\s*", ","),
    (r",\\!\s*", ","),
    (r"\\!", ""),
    (r"\\(?:leqslant|leqq|leq|le)(?![a-zA-Z])|<=|=<", r"\\le "),
    (r"\\(?:geqslant|geqq|geq|ge)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\(?:neq|ne)(?![a-zA-Z])|\\not\s*=|!=|<>", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:times|cdotp)(?![a-zA-Z])", r"\\cdot "),
    (r"\\(?:div)(?![a-zA-Z])", "/"),
    (r"\\infin(?![a-zA-Z])", r"\\infty"),
    (r"\+\s*\\infty", r"\\infty"),
    (r"\\(?:cdots|dots|dotsc|dotsb)(?![a-zA-Z])|\.\.\.+", r"\\ldots "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\lvert|\\rvert|\\vert(?![a-zA-Z])", "|"),
    (r"\s*\^\s*\{?\s*\\(?:text)?(?:circ|degree)(?![a-zA-Z])\s*\}?", r"^{\\circ}"),
    (r"\\degree(?![a-zA-Z])|\s*\^\{\\text\{o\}\}", r"^{\\circ}"),
    (r"\\(?:varnothing|emptyset)(?![a-zA-Z])", r"\\emptyset "),
    (r"\\mid(?![a-zA-Z])", "|"),
    (r"\\(?:lor|vee)(?![a-zA-Z])", r"\\text{ or }"),
    (r"\\(?:land|wedge)(?![a-zA-Z])", r"\\text{ and }"),
    (r"\\([%#&$])", r"\1"),
    *(
        (rf"(?<=[\d}}])\$?\s*(\\text\{{)?\s*{word}s?(?![a-zA-Z])", rf" \\cdot 10^{{{power}}} \1")
        for word, power in SCALES.items()
    ),
    (r"(?<![a-zA-Z])(?:minus|negative)\s+(?=[\d.\\])", "-"),
    (r"(?<=\d)\s+plus\s+(?=\d)", "+"),
    (r"(?<=\d)\s+times\s+(?=\d)", r" \\cdot "),
    (r"(?<![a-zA-Z])twice\s+(?=\d)", r"2 \\cdot "),
    (r"(?<=\d)\s+squared(?![a-zA-Z])", r"^{2}"),
    (r"(?<=\d)\s+factorial(?![a-zA-Z])", "!"),
    (r"\\text\{\s*\}", ""),
    (r"\\varphi(?![a-zA-Z])", r"\\phi"),
    (r"\*\*(?=[-\w({])", "^"),
)  # fmt: skip
_SPACES = re.compile(
    r"(?:\s|~|(?<!\\)\\(?:[,;:>\s]|q?quad|(?:enspace|thinspace|medspace|nobreakspace)(?![a-zA-Z])|h?phantom\{[^{}]*\}))+"
)
_COMPILED = tuple((re.compile(pattern), new) for pattern, new in _SPELLINGS)
_HTML = ((re.compile(r"<sup>(.*?)</sup>"), r"^{\1}"), (re.compile(r"<sub>(.*?)</sub>"), r"_{\1}"))
_DAMAGED = re.compile("\x0c(?=rac)|\x08(?=oxed|inom|egin|eta)|\t(?=extcirc)")
"""What is left of `\frac` and `\binom` where a JSON string was written with one backslash."""
_ARGUMENT = re.compile(r"\\(frac|sqrt|binom)(?![a-zA-Z])")
_WORD_SQRT = re.compile(r"(?<![\\a-zA-Z])(sqrt|cbrt)\s*(?=[(\d{])")
_FENCES = ("$$", "$", "**", "*", "`", '"', "'")


def plain(text: str) -> str:
    """The text in the one notation, without what stands around it: see the module."""
    text = _DAMAGED.sub(lambda found: {"\x0c": "\\f", "\x08": "\\b", "\t": "\\t"}[found.group()], text)
    text = _unicode(strip_emphasis(text))
    for html, latex in _HTML:
        text = html.sub(latex, text)
    if "\\\\begin" in text or "\\begin" not in text:  # written with doubled backslashes; rows of a matrix need theirs
        text = re.sub(r"\\\\(?=[a-zA-Z{}()\[\],;!%\s])", r"\\", text)
    text = _SPACES.sub(" ", text)  # first: over runs of spaces the patterns below would backtrack
    for pattern, new in _COMPILED:
        text = pattern.sub(new, text)
    text = re.sub(r"\\[()\[\]]", "$", text)
    text = _WORD_SQRT.sub(lambda found: "\\sqrt" if found.group(1) == "sqrt" else "\\sqrt[3]", text)
    return strip_marks(_braced(text))


def strip_emphasis(text: str) -> str:
    """Without Markdown's `**bold**`: its asterisks are no power."""
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    return re.sub(r"^[*\s]+|\*[*\s.,;:]*$", "", text)


def strip_marks(text: str) -> str:
    """Without dollars, emphasis, quotes, a final stop and runs of spaces."""
    text = " ".join(text.replace("$", " ").split())
    previous = None
    while text != previous:
        previous = text
        text = text.strip().rstrip(".,;:").removesuffix("\\").strip()
        for fence in _FENCES:
            if len(text) > 2 * len(fence) and text.startswith(fence) and text.endswith(fence):
                text = text[len(fence) : -len(fence)].strip()
    return text


def closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`; -1 where none does. `\\{` counts as a bracket too."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
            if depth == 0:
                return place
    return -1


def nesting(text: str) -> int:
    """How many brackets stand within one another at most, closed or not."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def split_top(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The parts between matches that stand in no bracket."""
    parts, start, place, depth = [], 0, 0, 0
    while place < len(text):
        if depth == 0 and (found := pattern.match(text, place)) and found.end() > place:
            parts.append(text[start:place])
            start = place = found.end()
            continue
        depth += (text[place] in "([{") - (text[place] in ")]}")
        place += 1
    return [*parts, text[start:]]


def untext(text: str) -> str:
    r"""`\text{...}` without its wrapper, set off by spaces."""
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).split())


def same_words(left: str, right: str) -> bool:
    """Whether two texts have the same words in the same order; case, punctuation, articles and spaces aside."""
    ours, theirs = words(left), words(right)
    return bool(ours) and ours == theirs


def predicate(text: str) -> str:
    """What a sentence says of its subject (`The function is odd` says `odd`); a text without a verb says itself."""
    found = re.fullmatch(
        r"(?:[A-Z]|it\b|this\b).*?\b(?:is|are|was|were)\s+(?P<said>[^.!?]+)[.!?]?", text.strip(), re.DOTALL
    )
    return found["said"] if found else text


def words(text: str) -> list[str]:
    """The words, numbers and symbols of a text that count."""
    found = re.findall(r"\d+(?:[.,]\d+)*|\w+|[^\w\s.,;:!?'\"()\[\]{}$*`-]", untext(text).casefold())
    return [word for word in found if word not in ("a", "an", "the")] or found


def squeeze(text: str) -> str:
    """The text without what never changes an expression: spaces and braces around single characters."""
    text = re.sub(r"(?<=\d) (?=\d)", ";", untext(text))  # 4 2 is not 42
    text = re.sub(r"\s+(?![a-zA-Z])|(?<![a-zA-Z])\s+", "", text)
    return re.sub(r"(?<=[\^_])\{(\w)\}", r"\1", text)


def digits(text: str) -> int:
    """Significant digits of a decimal number."""
    return len(re.sub(r"\D", "", re.split(r"[eE*\\]", text)[0]).lstrip("0"))


def _unicode(text: str) -> str:
    if text.isascii():
        return text
    out: list[str] = []
    raised = ""
    for character in text:
        kind = "^" if character in _SUPER else "_" if character in _SUB else ""
        if raised and kind != raised:
            out.append("}")
        if kind:
            out.append((kind + "{" if kind != raised else "") + (_SUPER | _SUB)[character])
        elif character in _SYMBOLS:
            out.append(_SYMBOLS[character])
        elif character in _ROOTS:
            out.append(_ROOTS[character])
        else:
            name = "" if unicodedata.category(character) == "Cf" else unicodedata.normalize("NFKC", character)
            top, slash, bottom = name.partition("\u2044")
            out.append(f"\\frac{{{top}}}{{{bottom}}}" if slash and top and bottom else name)
        raised = kind
    return "".join(out) + ("}" if raised else "")


def _braced(text: str) -> str:
    r"""Every argument of `\frac`, `\sqrt` and `\binom` in braces: `\frac12`, `\sqrt3`, `\sqrt(x)`, `\frac{a} b`."""
    out, place = [], 0
    while found := _ARGUMENT.search(text, place):
        out += [text[place : found.start()], "\\", found.group(1)]
        place = found.end()
        if found.group(1) == "sqrt":
            place = _skip(text, place)
            if text[place : place + 1] == "[" and (end := text.find("]", place)) > 0:
                out.append(text[place : end + 1])
                place = end + 1
            arguments = 1
        else:
            arguments = 2
        for _ in range(arguments):
            place = _skip(text, place)
            piece, place = _argument(text, place, digits=arguments == 1)
            out.append("{" + _braced(piece) + "}")
    return "".join([*out, text[place:]])


def _argument(text: str, place: int, *, digits: bool) -> tuple[str, int]:
    if place >= len(text):
        return "", place
    if text[place] == "{" or (digits and text[place] == "("):
        end = closing(text, place)
        return (text[place + 1 : end], end + 1) if end > 0 else (text[place + 1 :], len(text))
    command = re.compile(r"\\[a-zA-Z]+|\d+(?:\.\d+)?|." if digits else r"\\[a-zA-Z]+|.", re.DOTALL).match(text, place)
    assert command is not None, "any character matches"
    return command.group(), command.end()


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] == " ":
        place += 1
    return place
