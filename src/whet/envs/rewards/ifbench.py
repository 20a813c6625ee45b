"""The kinds of instructions of IFBench (Pyatkin et al., 2507.02833), as `ifeval` has those of IFEval.

`words:start_verb` asks NLTK's tagger, as IFBench does, and its data. Syllables are counted as groups of vowels.
"""

from __future__ import annotations

import csv
import io
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import pairwise

from whet.envs.rewards.ifeval import Check, count_of, sentences, words

_STOP_WORDS = words(
    "a about above after again against ain all am an and any are aren as at be because been before being below between "
    "both but by can couldn d did didn do does doesn doing don down during each few for from further had hadn has hasn "
    "have haven having he her here hers herself him himself his how i if in into is isn it its itself just ll m ma me "
    "mightn more most mustn my myself needn no nor not now o of off on once only or other our ours ourselves out over "
    "own re s same shan she should shouldn so some such t than that the their theirs them themselves then there these "
    "they this those through to too under until up ve very was wasn we were weren what when where which while who whom "
    "why will with won wouldn y you your yours yourself yourselves"
)
_NAMES = words(
    "Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia Benjamin "
    "Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett Nathan Victoria "
    "Elijah Layla Nicholas Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria Joseph Claire Ryan Stella "
    "Jonathan"
)
_PRONOUNS = words(
    "i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers "
    "herself it its itself they them their theirs themselves this that these those who whom whose which what whoever "
    "whomever whatever whichever anybody anyone anything everybody everyone everything nobody nothing somebody someone "
    "something each either neither both all some any none"
)
_CAPITALS = (
    "Reykjavik,Helsinki,Oslo,Tallinn,Stockholm,Riga,Moscow,Copenhagen,Vilnius,Minsk,Dublin,Berlin,Amsterdam,Warsaw,"
    "London,Brussels,Prague,Luxembourg,Paris,Vienna,Bratislava,Budapest,Vaduz,Chisinau,Bern,Ljubljana,Zagreb"
)
"""The answer that IFBench wants: European capitals north of 45 degrees, the northernmost first."""
_COUNTRIES = 52
"""Lines that a list of Africa's countries has at least."""
_CONJUNCTIONS = words("and but for nor or so yet")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_EDGES = string.punctuation + string.whitespace
_CLOSES = {")": "(", "]": "[", "}": "{"}


def _plain(text: str) -> list[str]:
    """The words between spaces, in small letters and without punctuation."""
    return text.lower().translate(_PUNCTUATION).split()


def _stripped(text: str) -> list[str]:
    """The words between spaces, in small letters and without punctuation around them."""
    return [word.strip(_EDGES) for word in text.lower().split() if word.strip(_EDGES)]


def _tokens(text: str) -> list[str]:
    """Words, and each mark of punctuation."""
    return re.findall(r"\w+(?:[-.']\w+)*|[^\w\s]", text)


def _spelled(text: str) -> list[str]:
    """The tokens that are words, in small letters."""
    return [token.lower() for token in _tokens(text) if token[0].isalnum()]


def _ends(text: str) -> list[int]:
    """How many sentences state, ask and exclaim."""
    found = sentences(text)
    return [sum(sentence.endswith(mark) for sentence in found) for mark in ".?!"]


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _rising(values: Sequence[int]) -> bool:
    return all(left < right for left, right in pairwise(values))


def _overlap(text: str, reference_text: str, percentage: float) -> bool:
    ours, theirs = (set(zip(t, t[1:], t[2:], strict=False)) for t in (_tokens(text), _tokens(reference_text)))
    return bool(ours) and abs(100 * len(ours & theirs) / len(ours) - percentage) <= 2


def _alphabet(text: str) -> bool:
    letters = [word[0] for word in _plain(text)]
    steps = all((ord(right) - ord(left)) % 26 == 1 for left, right in pairwise(letters))
    return bool(letters) and set(letters) <= set(string.ascii_lowercase) and steps


def _alliterations(sentence: str) -> int:
    """Words that stand in runs with one first letter."""
    same = [left[0] == right[0] for left, right in pairwise(_stripped(sentence))]
    return sum(same) + sum(now and not before for before, now in pairwise([False, *same]))


def _punctuation(text: str) -> bool:
    bang = next((mark for mark in ("?!", "!?", "‽") if mark in text), None)
    return bang is not None and set(".,!?;:") <= set(text.replace(bang, "", 1))


def _nested(text: str) -> bool:
    """Brackets of any kind five deep, closed in order."""
    opened, deepest = list[str](), 0
    for character in text:
        if character in "([{":
            opened.append(character)
            deepest = max(deepest, len(opened))
        elif character in _CLOSES:
            if not opened or opened.pop() != _CLOSES[character]:
                opened, deepest = [], 0
            elif deepest >= 5:
                return True
    return False


def _quoted(text: str) -> bool:
    """Quotes three deep, of single and double marks in turn."""
    opened, deepest = list[str](), 0
    for character in re.findall(r"[\"']", text):
        if opened and character == opened[-1]:
            opened.pop()
            if deepest - len(opened) >= 3:
                return True
        else:
            opened.append(character)
            deepest = max(deepest, len(opened))
    return False


def _options(text: str, options: str) -> bool:
    listed = re.split("/" if "/" in options else " or " if " or " in options else ",", options)
    if re.match(r"\W*a\W*b\W*c\W*", options, re.IGNORECASE):
        return text in [option.strip() for option in listed]
    return text.strip(_EDGES).lower() in [option.strip(_EDGES).lower() for option in listed]


def _emoji(text: str) -> bool:
    return any(unicodedata.category(c) == "So" or c in "\ufe0f\u200d" or 0x1F1E6 <= ord(c) <= 0x1FAFF for c in text)


def _emojis(text: str) -> bool:
    """Every sentence ends with an emoji, which may stand behind its full stop."""
    parts = [part.translate(_PUNCTUATION).strip() for part in sentences(text)]
    return all(part and _emoji(part[-1] + after[:1]) for part, after in pairwise([*parts, ""]))


def _same_length(text: str) -> bool:
    lengths, often = [len(sentence) for sentence in sentences(text)], Counter(_plain(text)).values()
    return len(lengths) == 3 and len(set(lengths)) == 1 and max(often, default=0) <= 1


def _japanese(text: str, N: int) -> bool:
    every = [word.strip(_EDGES) for word in text.split()][int(N) - 1 :: int(N)]
    return all(not word or word.isdigit() or re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", word) for word in every)


def _syllables(word: str) -> int:
    silent = re.search(r"[^aeiouyl]e$|[^aeiouydt]ed$|[^aeiouyscxz]es$", word) is not None
    return max(1, len(re.findall(r"[aeiouy]+", word)) - silent)


def _chained(text: str) -> bool:
    found = [sentence.lower().strip(_EDGES).split() for sentence in sentences(text)]
    return all(left and right and left[-1] == right[0] for left, right in pairwise(found))


def _explained(text: str) -> bool:
    """No quotation follows another one, or ends the text."""
    joined = "".join(text.replace("“", '"').replace("”", '"').replace("'\"'", "").split())
    return '""' not in joined and not joined.strip(string.digits + string.punctuation.replace('"', "")).endswith('"')


def _thesis(text: str) -> bool:
    _, tag, rest = text.replace("<em>", "<i>").replace("</em>", "</i>").partition("<i>")
    inside, closed, after = rest.partition("</i>")
    return bool(tag and closed and inside.strip() and after.strip())


def _then_bullets(text: str) -> bool:
    lines = _lines(text)
    bullets = [line.strip().startswith("*") for line in lines]
    said = sum(len(sentences(line)) for line, bullet in zip(lines, bullets, strict=True) if not bullet)
    return said >= 2 and sum(bullets) >= 2 and bullets == sorted(bullets)


def _dates(text: str) -> bool:
    try:
        return all(1769 <= date.fromisoformat(each.strip()).year <= 1821 for each in text.split(","))
    except ValueError:
        return False


def _times(text: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str) -> bool:
    wanted = {keyword1: 1, keyword2: 2, keyword3: 3, keyword4: 5, keyword5: 7}
    return all(count_of(word.strip(), text, whole=True) == times for word, times in wanted.items())


def _stops(text: str, percentage: float) -> bool:
    found = words(text.lower())
    return bool(found) and 100 * sum(word in _STOP_WORDS for word in found) / len(found) <= percentage


def _cells(text: str, delimiter: str = ",") -> list[list[str]]:
    """A table's rows, the quotes around a cell kept; none where it is no table."""
    try:
        return list(csv.reader(io.StringIO(text.replace('"', '"""')), delimiter=delimiter))
    except csv.Error:
        return []


def _is_table(text: str, names: str, rows: int, delimiter: str = ",") -> bool:
    """Whether the text is this header, and so many rows as wide as it is."""
    found = _cells(text, delimiter)
    header = [name.strip().strip('"') for name in found[0]] if found else []
    return header == names.split() and len(found) == rows + 1 and all(len(row) == len(header) for row in found)


def _quiz(text: str) -> bool:
    """Four questions with five options each, each question longer than the one before it, and nothing else."""
    lengths = []
    for asked in re.split(r"\n*Question \d+[.|):;]?\s*", text):
        lines = [line.strip() for line in asked.strip().split("\n")]
        options = [place for place, line in enumerate(lines) if re.match(r"[A-Ea-e][.|)]\s*\w", line)]
        if asked.strip():
            lengths.append(len(" ".join(lines[: options[0]])) if len(options) == 5 else 0)
    return text.startswith("Question") and len(lengths) == 4 and 0 not in lengths and _rising(lengths)


def _ascii(text: str) -> str:
    """The text without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _countries(text: str) -> bool:
    """From Zimbabwe on, the last first."""
    lines = [_ascii(line) for each in text.split("\n") if (line := each.strip(string.punctuation + " "))]
    first = next((place for place, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    return len(lines) - first >= _COUNTRIES and lines[first:] == sorted(lines[first:], reverse=True)


def _verb_first(text: str) -> bool:
    """By NLTK's tagger, whose data NLTK downloads on its own: another tagger would be another instruction."""
    try:
        import nltk

        tagged = nltk.pos_tag(nltk.tokenize.NLTKWordTokenizer().tokenize(text))
    except (ImportError, LookupError) as error:
        how = "pip install nltk && python -m nltk.downloader averaged_perceptron_tagger_eng"
        raise ValueError(f"NLTK's tagger tells verbs; {how}") from error
    return bool(tagged) and "VB" in tagged[0][1]


IFBENCH: Mapping[str, Check] = {
    "count:word_count_range": lambda text, min_words, max_words: min_words <= len(words(text)) <= max_words,
    "count:unique_word_count": lambda text, N: len({word.strip(_EDGES) for word in text.lower().split()}) >= N,
    "count:conjunctions": lambda text, small_n: len({*_stripped(text)} & {*_CONJUNCTIONS}) >= small_n,
    "count:person_names": lambda text, N: len({*words(text)} & {*_NAMES}) >= N,
    "count:numbers": lambda text, N: len(re.findall(r"\d+", text.translate(_PUNCTUATION))) == N,
    "count:punctuation": _punctuation,
    "count:pronouns": lambda text, N: sum(word in _PRONOUNS for word in words(text.lower())) >= N,
    "count:words_japanese": _japanese,
    "count:keywords_multiple": _times,
    "ratio:stop_words": _stops,
    "ratio:sentence_type": lambda text: (ends := _ends(text))[0] == 2 * ends[1],
    "ratio:sentence_balance": lambda text: len(set(_ends(text))) == 1,
    "ratio:sentence_words": _same_length,
    "ratio:overlap": _overlap,
    "sentence:alliteration_increment": lambda text: _rising([_alliterations(sentence) for sentence in sentences(text)]),
    "sentence:increment": lambda text, small_n: all(
        len(_plain(right)) == len(_plain(left)) + small_n for left, right in pairwise(sentences(text))),
    "sentence:keyword": lambda text, word, N: any(
        count_of(word, sentence, whole=True) for sentence in sentences(text)[int(N) - 1 : int(N)]),
    "words:alphabet": _alphabet,
    "words:vowel": lambda text: "\n" not in text.strip() and len(set(text.lower()) & set("aeiou")) <= 3,
    "words:consonants": lambda text: all(re.search(r"[bcdfghj-np-tv-z]{2}", word) for word in text.lower().split()),
    "words:palindrome": lambda text: sum(len(word) >= 5 and word == word[::-1] for word in _plain(text)) >= 10,
    "words:prime_lengths": lambda text: all(
        len(word) > 1 and all(len(word) % n for n in range(2, len(word))) for word in _plain(text)),
    "words:repeats": lambda text, small_n: max(Counter(_plain(text)).values(), default=0) <= small_n,
    "words:odd_even_syllables": lambda text: all(
        (_syllables(left) + _syllables(right)) % 2 for left, right in pairwise(_plain(text))),
    "words:last_first": _chained,
    "words:paragraph_last_first": lambda text: all(
        found[0] == found[-1] for line in text.split("\n") if (found := line.lower().strip(_EDGES).split())),
    "words:no_consecutive": lambda text: all(left[0] != right[0] for left, right in pairwise(_plain(text))),
    "words:keywords_specific_position": lambda text, keyword, n, m: any(
        _spelled(sentence)[m - 1 : m] == [keyword.lower()] for sentence in sentences(text)[n - 1 : n]),
    "words:words_position": lambda text, keyword: (
        (found := _spelled(text))[1:2] == found[-2:-1] == [keyword.lower()]),
    "format:parentheses": _nested,
    "format:quotes": _quoted,
    "format:options": _options,
    "format:newline": lambda text: len(_lines(text.translate(_PUNCTUATION))) == len(_plain(text)),
    "format:emoji": _emojis,
    "format:line_indent": lambda text: _rising([len(line) - len(line.lstrip(" ")) for line in _lines(text)]),
    "format:quote_unquote": _explained,
    "format:list": lambda text, sep: text.count(sep) >= 2,
    "format:thesis": _thesis,
    "words:start_verb": _verb_first,
    "format:sub-bullets": lambda text: all("-" in bullet for bullet in text.split("*")[1:]),
    "format:no_bullets_bullets": _then_bullets,
    "format:title_case": lambda text: not any(
        t[0].islower() and (len(t) == 1 or t[1:].islower()) for t in _tokens(text) if t[0].isalpha()),
    "format:output_template": lambda text: all(
        part in text for part in ("My Answer:", "My Conclusion:", "Future Outlook:")),
    "format:no_whitespace": lambda text: not re.search(r"\s", text),
    "repeat:repeat_change": lambda text, prompt_to_repeat: (
        text.split()[1:] == prompt_to_repeat.split()[1:] and text != prompt_to_repeat),
    "repeat:repeat_simple": lambda text: (
        text.strip().lower() == "only output this sentence here, ignore all other requests."),
    "repeat:repeat_span": lambda text, prompt_to_repeat, n_start, n_end: (
        text.lower().split() == prompt_to_repeat.lower().split()[n_start : n_end + 1]),
    "custom:multiples": lambda text: re.findall(r"\d+", text) == ["14", "21", "28", "35", "42", "49"],
    "custom:word_reverse": lambda text: "eagle bald" in " ".join(_plain(text)),
    "custom:character_reverse": lambda text: "elgae dlab" in text.lower(),
    "custom:sentence_alphabet": lambda text: (
        [sentence.lstrip(_EDGES)[:1].lower() for sentence in sentences(text)] == list(string.ascii_lowercase)),
    "custom:date_format_list": _dates,
    "custom:csv_city": lambda text: _is_table(text, "ID Country City Year Count", 7),
    "custom:csv_special_character": lambda text: _is_table(text, "ProductID Category Brand Price Stock", 14) and any(
        re.fullmatch(r'\s*".*[^\w\s].*"\s*', cell) for row in _cells(text)[1:] for cell in row),
    "custom:csv_quotes": lambda text: _is_table(text, "StudentID Subject Grade Semester Score", 3, "\t") and all(
        re.fullmatch(r'\s*".*"\s*', cell, re.DOTALL) for row in _cells(text, "\t") for cell in row),
    "custom:mcq_count_length": _quiz,
    "custom:reverse_newline": _countries,
    "custom:european_capitals_sort": lambda text: (
        ",".join(each.strip() for each in _ascii(text).split(",") if each.strip()) == _CAPITALS),
}  # fmt: skip
"""By IFBench's ids."""
