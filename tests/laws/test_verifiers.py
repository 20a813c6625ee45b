"""Laws of verifiers: rewritings of a right answer are right, wrong variants of it wrong, and no text is its anagram.

The answers are drawn here from seeds, of every type that golds have, so no example can be learnt by heart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

import pytest

from whet.envs.base import Attempt, Task
from whet.envs.rewards.agree import NO_ALGEBRA, Undecided, agree
from whet.envs.rewards.math import MathReward
from whet.envs.rewards.reader import read
from whet.envs.rewards.reading import answers
from whet.envs.rewards.values import LONGEST, Value
from whet.records import Message

COUNT = 2000
WORDS = [
    "silent",
    "parity",
    "evening",
    "triangle",
    "rectangle",
    "monday",
    "Kafelnikov",
    "ellipse",
    "odd",
    "prime",
    "stopped",
    "north",
    "hexagon",
]
UNITS = [
    ("cm", "centimeters", "kg"),
    ("m/s", "meters per second", "km"),
    ("kg", "kilograms", "g"),
    ("hours", "h", "minutes"),
]
MARKS = (
    "<answer>{}</answer>",
    "so \\boxed{{{}}}",
    "work\n#### {}",
    "The answer is {}.",
    "<think>5</think>**Answer:** {}",
)


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    made = MathReward(name="answer", weight=1.0, gold="answer", deadline_s=10.0, words=True)
    yield made
    made.close()


def verdicts(reward: MathReward, pairs: list[tuple[str, str]]) -> list[float | None]:
    return [grade.value for grade in reward.grade([attempt(gold, text) for gold, text in pairs], step=0)]


def attempt(gold: str, text: str, question: str = "Q") -> Attempt:
    return Attempt(
        task=Task(id=gold, messages=(Message(role="user", content=question),), columns={"answer": gold}),
        messages=(Message(role="assistant", content=text),),
        completion_tokens=(),
        truncated=False,
        max_tokens=1,
    )


def refuted(reward: MathReward, pairs: list[tuple[str, str]], value: float) -> list[tuple[str, str]]:
    return [pair for pair, given in zip(pairs, verdicts(reward, pairs), strict=True) if given != value]


def test_every_rewriting_of_a_right_answer_is_right(reward: MathReward) -> None:
    draw = random.Random(1)
    pairs = [REWRITINGS[n % len(REWRITINGS)](draw) for n in range(COUNT)]
    marked = [(gold, draw.choice(MARKS).format(text)) for gold, text in pairs]
    assert refuted(reward, marked, 1.0) == []


def test_every_wrong_variant_is_wrong(reward: MathReward) -> None:
    draw = random.Random(2)
    pairs = [WRONG[n % len(WRONG)](draw) for n in range(COUNT)]
    marked = [(gold, draw.choice(MARKS).format(text)) for gold, text in pairs]
    assert refuted(reward, marked, 0.0) == []


def test_an_expression_that_the_question_writes_is_no_answer_to_it(reward: MathReward) -> None:
    """Algebra holds it for equal to the gold one; a policy would learn to copy."""
    draw = random.Random(7)
    for _ in range(60):
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        cases = [
            (str(a * b), f"{a}*{b}", f"What is ${a} * {b}$?"),
            (f"{a}\\sqrt{{2}}", f"\\sqrt{{{2 * a * a}}}", f"Simplify $\\sqrt{{{2 * a * a}}}$."),
            (f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})", f"Expand $(x+{a})(x + {b})$."),
        ]
        for gold, copied, question in cases:
            asked = [attempt(gold, f"\\boxed{{{said}}}", question) for said in (gold, copied)]
            assert [grade.value for grade in reward.grade(asked, step=0)] == [1, 0], (gold, copied)
            assert reward.grade([attempt(copied, f"\\boxed{{{copied}}}", question)], step=0)[0].value == 1


def test_no_text_gold_accepts_an_anagram() -> None:
    draw = random.Random(3)
    for word in WORDS * 20:
        letters = list(word)
        draw.shuffle(letters)
        anagram = "".join(letters)
        assert agree(read(word), read(anagram), NO_ALGEBRA) == (anagram.lower() == word.lower()), (word, anagram)


def test_no_garbage_raises_or_is_right() -> None:
    """Random strings of the symbols that answers are made of, and brackets without end: read, and wrong."""
    draw = random.Random(5)
    parts = [
        *"()[]{}<>=+-*/^_,.;:|!%$&~ 0123456789abxyzABIE",
        "\\frac",
        "\\sqrt",
        "\\le ",
        "\\cup ",
        "\\{",
        "\\}",
        "\\text{",
    ]
    parts += [
        "\\pm ",
        "\\infty ",
        " and ",
        " or ",
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "\\\\",
        "²",
        "½",
        "√",
        "°",
        "\\in ",
        "#### ",
    ]
    gold = read("\\frac{31}{7}")
    for _ in range(1500):
        text = "".join(draw.choices(parts, k=draw.randint(1, 60)))
        assert not decided(gold, text), text
    for symbol in (
        "(",
        "{",
        "\\frac{",
        "\\{",
        "[",
        "-",
        "^",
        "x_",
        "1,",
        "1 ",
        "a ",
        "\\text{a}",
        "|",
        "\\sqrt",
        "!",
        "%",
        "'",
        "is ",
    ):
        for text in (symbol * 1900, "1" + symbol * 1900, symbol * 900 + "1", (symbol + "1") * 600):
            assert not decided(gold, text[:LONGEST]), symbol
    for text in (
        "(" + ",".join(["\\pm 1"] * 40) + ")",
        "±" * 99 + "1",
        "(" * 900 + "1" + ")" * 900,
        "1" * 10_000_000,
    ):
        assert not decided(gold, text), text[:40]


def decided(gold: Value, text: str) -> bool:
    """The verdict by rule; a question for algebra counts as wrong."""
    try:
        return answers(gold, "31/7", text, NO_ALGEBRA, None, marked=True)
    except Undecided:
        return False


def test_every_value_agrees_with_itself(reward: MathReward) -> None:
    draw = random.Random(4)
    golds = [make(draw)[0] for make in (*REWRITINGS, *WRONG) for _ in range(20)]
    assert refuted(reward, [(gold, f"<answer>{gold}</answer>") for gold in golds], 1.0) == []


# ------------------------------------------------------------------------------------------------- rewritings

Pair = tuple[str, str]


def whole(draw: random.Random) -> Pair:
    number = draw.choice([1, -1]) * draw.randint(1000, 10**7)
    forms = [f"{number:,}", f"${number}$", f"{number}.0", f"{number}.00", f"{number:,} apples", f"\\({number}\\)"]
    forms += [
        f"x = {number}",
        f"{number:,}".replace(",", "{,}"),
        f"{2 * number}/2",
        f"{number:,}".replace(",", "\\!,\\!"),
    ]
    return str(number), draw.choice(forms)


def fraction(draw: random.Random) -> Pair:
    value = Fraction(draw.randint(1, 400), draw.choice([3, 7, 8, 9, 11, 16, 20]))
    if value.denominator == 1:
        value += Fraction(1, 3)
    top, bottom = value.numerator, value.denominator
    entire, rest = divmod(top, bottom)
    forms = [
        f"{top}/{bottom}",
        f"\\dfrac{{{top}}}{{{bottom}}}",
        f"\\tfrac{{{2 * top}}}{{{2 * bottom}}}",
        f"{top} / {bottom}",
    ]
    forms += [f"{entire} {rest}/{bottom}", f"{entire}\\frac{{{rest}}}{{{bottom}}}"] if entire else []
    forms += [f"{float(value)!r}"] if bottom in (8, 16, 20) else []
    return f"\\frac{{{top}}}{{{bottom}}}", draw.choice(forms)


def decimal(draw: random.Random) -> Pair:
    digits, places = draw.randint(101, 99999), draw.randint(1, 4)
    value = Fraction(digits, 10**places)
    gold = f"{digits // 10**places}.{digits % 10**places:0{places}d}"
    power = (
        f"{digits}e-{places}",
        f"{digits} \\times 10^{{-{places}}}",
        f"{digits}\\cdot 10^{{-{places}}}",
        f"{digits}×10⁻{'⁰¹²³⁴'[places]}",
    )
    return gold, draw.choice(
        [gold + "0", f"{value.numerator}/{value.denominator}", f"${gold}$", f"about {gold}", *power]
    )


def repeating(draw: random.Random) -> Pair:
    period, lead = draw.randint(1, 98), draw.randint(0, 9)
    value = lead + Fraction(period, 99)
    return f"{value.numerator}/{value.denominator}", draw.choice(
        [f"{lead}.\\overline{{{period:02d}}}", f"{lead}.({period:02d})"]
    )


def percent(draw: random.Random) -> Pair:
    share = draw.randint(1, 99)
    forms = [f"{share}\\%", f"{share}.0%", f"{share} percent", f"0.{share:02d}", f"{share}/100", str(share)]
    return f"{share}%", draw.choice(forms)


def money(draw: random.Random) -> Pair:
    dollars, cents = draw.randint(1, 5000), draw.randint(10, 99)
    amount = f"{dollars:,}.{cents}"
    forms = [f"${amount}", f"\\${amount}", f"{amount} dollars", f"{amount} USD", f'"${amount}"', f"**${amount}**"]
    return f"{dollars}.{cents}", draw.choice(forms)


def measured(draw: random.Random) -> Pair:
    number, (unit, words, _) = draw.randint(2, 5000), draw.choice(UNITS)
    forms = [
        f"{number} {words}",
        f"{number}\\text{{ {unit}}}",
        f"{number} \\mathrm{{{unit}}}",
        str(number),
        f"It is {number} {words}.",
    ]
    return f"{number} {unit}", draw.choice(forms)


def root(draw: random.Random) -> Pair:
    a, b = draw.randint(2, 12), draw.choice([2, 3, 5, 6, 7, 10])
    forms = [
        f"{a}√{b}",
        f"\\sqrt{{{a * a * b}}}",
        f"{a} \\cdot \\sqrt{b}",
        f"\\sqrt{{{b}}} \\times {a}",
        f"{a}*sqrt({b})",
    ]
    return f"{a}\\sqrt{{{b}}}", draw.choice([*forms, f"\\frac{{{a * b}}}{{\\sqrt{{{b}}}}}"])


def polynomial(draw: random.Random) -> Pair:
    a, b = draw.randint(1, 9), draw.randint(10, 19)
    gold = f"x^2+{a + b}x+{a * b}"
    forms = [
        f"(x+{a})(x+{b})",
        f"{a * b} + {a + b}x + x²",
        f"f(x) = x^{{2}} + {a + b} x + {a * b}",
        f"x(x+{a + b})+{a * b}",
    ]
    return gold, draw.choice(forms)


def interval(draw: random.Random) -> Pair:
    low, high = draw.randint(-50, 0), draw.randint(1, 50)
    forms = [
        f"{low} \\leq x < {high}",
        f"{low} <= x < {high}",
        f"x \\in [{low},{high})",
        f"\\left[{low}, {high}\\right)",
    ]
    return f"[{low}, {high})", draw.choice([*forms, f"{high} > x ≥ {low}"])


def ray(draw: random.Random) -> Pair:
    end = draw.randint(-50, 50)
    return f"(-\\infty, {end}]", draw.choice(
        [f"x \\le {end}", f"{end} \\ge x", f"(-∞, {end}]", f"\\{{x | x \\leqslant {end}\\}}"]
    )


def several(draw: random.Random) -> Pair:
    numbers = draw.sample(range(-99, 99), 3)
    shuffled = draw.sample(numbers, 3)
    a, b, c = shuffled
    forms = [
        f"{a}, {b}, {c}",
        f"\\{{{a}, {b}, {c}\\}}",
        f"{a}, {b} and {c}",
        f"x = {a}, x = {b}, x = {c}",
        f"{a}; {b}; {c}",
    ]
    return ", ".join(map(str, numbers)), draw.choice(forms)


def point(draw: random.Random) -> Pair:
    a, b = draw.randint(-20, 20), draw.randint(21, 40)
    return f"({a}, {b})", draw.choice(
        [f"(x, y) = ({a}, {b})", f"$({a},{b})$", f"\\left({a}, {b}\\right)", f"x={a}, y={b}"]
    )


def choice(draw: random.Random) -> Pair:
    letter = draw.choice("ABCD")
    return letter, draw.choice(
        [f"({letter})", f"{letter}.", f"\\textbf{{({letter})}}", f"{letter}) because", f"option {letter}"]
    )


def day(draw: random.Random) -> Pair:
    month, number, year = draw.randint(1, 12), draw.randint(1, 28), draw.randint(1900, 2030)
    name = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ][month - 1]
    forms = [
        f"{name} {number}, {year}",
        f"{number} {name} {year}",
        f"{month}/{number}/{year}",
        f"{name[:3]} {number}, {year}",
    ]
    return f"{year}-{month:02d}-{number:02d}", draw.choice(forms)


def word(draw: random.Random) -> Pair:
    gold = draw.choice(WORDS)
    return gold, draw.choice([gold.upper(), f"\\text{{{gold}}}", f"the {gold}", f'"{gold}"'])


def in_words(draw: random.Random) -> Pair:
    """Scales and signs in words; yes or no with its reason."""
    number, (scale, zeros) = draw.randint(1, 99), draw.choice([("thousand", 3), ("million", 6), ("billion", 9)])
    gold = number * 10**zeros
    scaled = (
        str(gold),
        draw.choice([f"{number} {scale}", f"{number}\\text{{ {scale}}}", f"There are {number} {scale} people."]),
    )
    return draw.choice(
        [
            scaled,
            (f"{number} {scale}", f"{gold:,}"),
            (str(-gold), f"minus {gold}"),
            ("yes", "Yes, there is no other way."),
            ("no", "No, no such number exists."),
            ("C", "C, because A and B are not"),
            (str(gold), f"Not {number} but {gold}."),
            (f"{number} m", f"It is {number} meters or {100 * number} centimeters."),
        ]
    )


def nothing(draw: random.Random) -> Pair:
    a, b = draw.sample(range(2, 60), 2)
    return "0", draw.choice(
        [f"{a}-{a}", f"\\sqrt{{{a}}}-\\sqrt{{{a}}}", f"\\sin({a}\\pi)", f"\\ln({a * b})-\\ln({a})-\\ln({b})"]
    )


REWRITINGS = (
    whole, fraction, decimal, repeating, percent, money, measured, root, polynomial, interval, ray, several, point,
    choice, day, word, in_words, nothing,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- wrong variants


def other_sign(draw: random.Random) -> Pair:
    number = draw.randint(1, 10**6)
    return str(number), draw.choice([f"-{number}", f"−{number}", f"x = -{number}", f"-{number:,} apples"])


def other_digit(draw: random.Random) -> Pair:
    digits = list(str(draw.randint(100, 10**8)))
    place = draw.randrange(len(digits))
    other = [*digits]
    other[place] = draw.choice([d for d in "123456789" if d != digits[place]])
    point = draw.randrange(1, len(digits))
    if draw.random() < 0.5:
        digits.insert(point, "."), other.insert(point, ".")
    return "".join(digits), "".join(other)


def factor_of_ten(draw: random.Random) -> Pair:
    number = draw.randint(1, 10**5)
    gold = draw.choice([str(number), f"0.{number}", f"{number}e-9", f"{number}\\cdot 10^{{7}}"])
    wrong = {"e-9": "e-8", "{7}": "{8}"}
    for old, new in wrong.items():
        if old in gold:
            return gold, gold.replace(old, new)
    return gold, gold.replace("0.", "0.0", 1) if "." in gold else gold + "0"


def other_fraction(draw: random.Random) -> Pair:
    top, bottom = draw.randint(1, 60), draw.randint(61, 120)
    return f"\\frac{{{top}}}{{{bottom}}}", draw.choice(
        [f"{top + 1}/{bottom}", f"\\frac{{{bottom}}}{{{top}}}", f"-{top}/{bottom}"]
    )


def nearly(draw: random.Random) -> Pair:
    """A decimal beside an exact value: not its rounding, nor its beginning."""
    value, places = Fraction(draw.randint(1, 999), draw.choice([3, 7, 8, 16, 1])), draw.randint(3, 7)
    rounded = round(value, places) + draw.choice([-2, 2, 10]) * Fraction(1, 10**places)
    digits = f"{abs(rounded.numerator) * 10**places // rounded.denominator:0{places + 1}d}"
    gold = f"\\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value)
    return gold, f"{'-' if rounded < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def other_power(draw: random.Random) -> Pair:
    base, exponent = draw.randint(2, 9), draw.randint(20, 99)
    return f"{base}^{{-{exponent}}}", draw.choice([f"{base}^{{-{exponent - 1}}}", f"{base}^{{{exponent}}}", "0"])


def nearly_nothing(draw: random.Random) -> Pair:
    n = draw.randint(60, 300)
    return "0", draw.choice([f"10^{{-{n}}}", f"e^{{-{2 * n}}}", f"\\frac{{\\pi}}{{{n}!}}", f"\\sqrt{{2}}^{{-{4 * n}}}"])


def other_factorial(draw: random.Random) -> Pair:
    n = draw.randint(20, 150)
    return f"\\frac{{1}}{{{n}!}}", draw.choice([f"1/{n - 1}!", f"\\frac{{1}}{{{n + 1}!}}", "0"])


def other_ends(draw: random.Random) -> Pair:
    low, high = draw.randint(-50, 0), draw.randint(1, 50)
    wrong = [
        f"({low}, {high}]",
        f"[{low}, {high}]",
        f"({low}, {high})",
        f"{low} < x \\le {high}",
        f"[{low}, {high + 1})",
    ]
    return f"[{low}, {high})", draw.choice(wrong)


def other_ray(draw: random.Random) -> Pair:
    end = draw.randint(1, 50)
    return f"(-\\infty, {end}]", draw.choice([f"x < {end}", f"x \\ge {end}", f"x \\le -{end}", f"x = {end}", str(end)])


def other_unit(draw: random.Random) -> Pair:
    number, (unit, _, other) = draw.randint(2, 500), draw.choice(UNITS)
    return f"{number} {unit}", draw.choice(
        [f"{number} {other}", f"{number}\\text{{ {other}}}", f"{10 * number} {unit}"]
    )


def other_order(draw: random.Random) -> Pair:
    a, b = draw.randint(-20, 20), draw.randint(21, 40)
    return f"({a}, {b})", draw.choice([f"({b}, {a})", f"(x, y) = ({b}, {a})", f"({a}, -{b})", f"({a}, {b}, 0)", str(a)])


def other_root(draw: random.Random) -> Pair:
    a, b = draw.randint(2, 12), draw.choice([2, 3, 5, 6, 7, 10])
    return f"{a}\\sqrt{{{b}}}", draw.choice(
        [str(a), f"{a}", f"-{a}√{b}", f"{a}\\sqrt{{{b + 1}}}", f"{a + 1}\\sqrt{{{b}}}", f"\\sqrt{{{a * b}}}"]
    )


def only_a_part(draw: random.Random) -> Pair:
    a, b = draw.randint(2, 99), draw.choice([2, 3, 5])
    return str(a), draw.choice(
        [f"{a}\\sqrt{{{b}}}", f"{a} + √{b}", f"x \\geq {a}", f"{a} or {a + b}", f"{a}x", f"{a}, {a + b}", f"{a}\\pi"]
    )


def other_polynomial(draw: random.Random) -> Pair:
    a, b = draw.randint(1, 9), draw.randint(10, 19)
    wrong = [f"(x-{a})(x-{b})", f"x^2+{a + b}x-{a * b}", f"(x+{a})(x+{b + 1})", f"x^2+{a + b + 1}x+{a * b}"]
    return f"x^2+{a + b}x+{a * b}", draw.choice(wrong)


def one_less(draw: random.Random) -> Pair:
    numbers = draw.sample(range(1, 99), 3)
    wrong = [numbers[:2], [*numbers[:2], numbers[2] + 100], [*numbers, 100], [*numbers[:2], -numbers[2]]]
    return ", ".join(map(str, numbers)), ", ".join(map(str, draw.choice(wrong)))


def other_choice(draw: random.Random) -> Pair:
    letter, other = draw.sample("ABCD", 2)
    return letter, draw.choice(
        [f"({other})", f"{other}.", other, f"not {letter} but {other}", f"\\textbf{{({other})}}"]
    )


def other_day(draw: random.Random) -> Pair:
    month, number, year = draw.randint(1, 11), draw.randint(1, 27), draw.randint(1900, 2030)
    wrong = [
        f"{year}-{month + 1:02d}-{number:02d}",
        f"{year}-{month:02d}-{number + 1:02d}",
        f"{year + 1}-{month:02d}-{number:02d}",
        str(year),
    ]
    return f"{year}-{month:02d}-{number:02d}", draw.choice(wrong)


def other_word(draw: random.Random) -> Pair:
    gold, other = draw.sample(WORDS, 2)
    return gold, draw.choice([other, f"not {gold}", gold[::-1], f"{gold} {other}"])


def hedged(draw: random.Random) -> Pair:
    """The gold one beside another: nobody is paid for two."""
    a, b = draw.sample(range(2, 999), 2)
    return str(a), draw.choice(
        [
            f"either {a} or {b}",
            f"between {b} and {a}",
            f"It could be {a}, {b} or {a + b}.",
            f"{a} or maybe {b}",
            f"{a} apples or {b} apples",
            f"{b} = {a}",
            f"{b} = x = {a}",
            f"{b} = {b + 1} = {a}",
        ]
    )


def supposed(draw: random.Random) -> Pair:
    """What is given is no answer."""
    a, b = draw.sample(range(2, 999), 2)
    given = draw.choice([f"If there are {a} apples", f"Suppose the price is {a}"])
    return str(a), draw.choice([f"{given}, we get {b}", f"{given} each day and {b} leave"])


def denied(draw: random.Random) -> Pair:
    a = draw.randint(2, 999)
    return str(a), draw.choice([f"not {a}", f"It isn't {a}.", f"The value is not {a}", f"It cannot be {a}"])


def computed_in_words(draw: random.Random) -> Pair:
    a, b = draw.randint(2, 999), draw.randint(2, 9)
    forms = [f"minus {a}", f"negative {a}", f"{a} million", f"{a} thousand dollars", f"There are {a} billion people."]
    forms += [f"{a} squared", f"{a} factorial", f"{a} plus {b}", f"{a} times {b}", f"twice {a}"]
    return str(a), draw.choice([*forms, f"{a // 10 + 1} {a % 10}" if a > 9 else f"{a} {a}"])


def several_choices(draw: random.Random) -> Pair:
    a, b = draw.sample("ABCD", 2)
    return a, draw.choice(
        [f"{a}) or {b})", f"{b}. {a}.", f"Either {b} or {a}", f"all of {b}, {a}", f"({a})/({b})", f"anything but {a}"]
    )


def both_verdicts(draw: random.Random) -> Pair:
    a, b = draw.choice([("yes", "no"), ("no", "yes"), ("true", "false"), ("false", "true")])
    return a, draw.choice([f"{a} or {b}", f"{a}/{b}", f"{a}, {b}", f"{a} and {b}", f"{a}, but also {b}"])


WRONG = (
    other_sign, other_digit, factor_of_ten, other_fraction, nearly, other_power, other_factorial, other_ends, other_ray,
    other_unit, other_order, other_root, only_a_part, other_polynomial, one_less, other_choice, other_day, other_word,
    hedged, supposed, denied, nearly_nothing, computed_in_words, several_choices, both_verdicts,
)  # fmt: skip
