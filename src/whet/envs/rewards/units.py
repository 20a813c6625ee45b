"""Units of measure: what a word like `km/h`, `dollars` or `m^2` means, as a factor and a dimension.

Only what school books, science sets and word problems use. A word that is not here is a noun (`apples`), not a unit:
nothing follows from it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from whet.envs.rewards.notation import untext


@dataclass(frozen=True, slots=True)
class Unit:
    """`factor` in the base unit of `dimension`: powers of base quantities, sorted, without zeros."""

    factor: Fraction
    dimension: tuple[tuple[str, int], ...]


_BASE = """
m: m meter meters metre metres | g: g gram grams gramme grammes | s: s sec secs second seconds | A: A amp amps ampere
amperes | K: K kelvin kelvins | mol: mol mole moles | L: L l liter liters litre litres | J: J joule joules |
W: W watt watts | V: V volt volts | N: N newton newtons | Pa: Pa pascal pascals | Hz: Hz hertz | C: coulomb coulombs |
eV: eV | B: byte bytes | ohm: ohm ohms \\Omega | T: tesla | F: farad farads | rad: rad rads radian radians
"""
_PREFIXES = {
    "n": -9, "u": -6, "\\mu": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9,
    "nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9,
}  # fmt: skip
_DERIVED = {
    "J": ("1000", {"g": 1, "m": 2, "s": -2}), "W": ("1000", {"g": 1, "m": 2, "s": -3}), "L": ("1/1000", {"m": 3}),
    "V": ("1000", {"g": 1, "m": 2, "s": -3, "A": -1}), "N": ("1000", {"g": 1, "m": 1, "s": -2}),
    "Pa": ("1000", {"g": 1, "m": -1, "s": -2}), "Hz": ("1", {"s": -1}), "C": ("1", {"A": 1, "s": 1}),
    "eV": ("1602176634e-25", {"g": 1, "m": 2, "s": -2}),
}  # fmt: skip
_OTHERS = """
inch inches in = 0.0254 m | foot feet ft = 0.3048 m | yard yards yd = 0.9144 m | mile miles mi = 1609.344 m |
AU = 149597870700 m |
ly = 9460730472580800 m |
minute minutes min mins = 60 s | hour hours hr hrs h = 3600 s | day days = 86400 s | week weeks = 604800 s |
year years yr yrs = 31557600 s | month months = 2629800 s | pound pounds lb lbs = 453.59237 g |
ounce ounces oz = 28.349523125 g | ton tons tonne tonnes = 1000000 g | gallon gallons = 0.003785411784 m3 |
quart quarts = 0.000946352946 m3 | pint pints = 0.000473176473 m3 | cup cups = 0.0002365882365 m3 |
tablespoon tablespoons tbsp = 0.00001478676478125 m3 | teaspoon teaspoons tsp = 0.00000492892159375 m3 |
acre acres = 4046.8564224 m2 | hectare hectares ha = 10000 m2 | atm atmosphere atmospheres = 101325000 Pa0 |
bar = 100000000 Pa0 | cal calorie calories = 4184 J0 | kcal kilocalorie kilocalories = 4184000 J0 |
mph = 0.44704 v | kph kmh = 5/18 v | dollar dollars USD usd buck bucks \\$ $ = 1 usd | cent cents ¢ = 1/100 usd |
euro euros EUR € = 1 eur | £ = 1 gbp | ¥ yen = 1 jpy | rupee rupees ₹ = 1 inr | peso pesos = 1 mxn |
degree degrees deg ° = 1 deg | °C celsius = 1 celsius | °F fahrenheit = 1 fahrenheit | dozen dozens = 12 dozen
"""
_DIMENSIONS: dict[str, dict[str, int]] = {
    "m2": {"m": 2}, "m3": {"m": 3}, "v": {"m": 1, "s": -1},
    "Pa0": {"g": 1, "m": -1, "s": -2}, "J0": {"g": 1, "m": 2, "s": -2},
}  # fmt: skip
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_PIECE = re.compile(r"([a-zA-Z°¢€£¥₹$%\\]+)\s*(?:\^?\s*\{?(-?\d)\}?)?")
SINGLE = frozenset("mgsLlhWVJNKCA")
"""Units of one letter, which may as well be variables."""


def _table() -> dict[str, tuple[Fraction, dict[str, int]]]:
    table: dict[str, tuple[Fraction, dict[str, int]]] = {}
    for entry in _BASE.split("|"):
        symbol, _, names = entry.strip().partition(":")
        factor, dimension = _DERIVED.get(symbol, ("1", {symbol: 1}))
        for name in names.split():
            table[name] = (Fraction(factor), dimension)
            for prefix, power in _PREFIXES.items():
                if (len(prefix) > 2 and prefix[0] != "\\") == (len(name) > 3):
                    table.setdefault(prefix + name, (Fraction(factor) * Fraction(10) ** power, dimension))
    for entry in _OTHERS.split("|"):
        names, _, meaning = entry.partition(" = ")
        number, dimension_name = meaning.split()
        for name in names.split():
            table[name] = (Fraction(number), _DIMENSIONS.get(dimension_name, {dimension_name: 1}))
    return table


TABLE = _table()


@cache
def unit(text: str) -> Unit | None:
    """The unit that `text` names (`m/s^2`, `square inches`, `kJ mol^{-1}`); None where it names no known one."""
    text = (
        untext(text)
        .replace("^{\\circ}", "°")
        .replace("° ", "°")
        .replace("\\cdot", " ")
        .replace("~", " ")
        .replace("(", " ")
        .replace(")", " ")
        .strip(" .,")
    )
    text = re.sub(r"(?<=[a-zA-Z])-(?=[a-zA-Z])", " ", text)
    text = re.sub(r"\bper\b|\ban?\b(?=\s+\w)", "/", text).replace("//", "/")
    text = re.sub(r"/\s*/", "/", text)
    if not text or len(text) > 60:
        return None
    factor, dimension, power, sign, place, known = Fraction(1), Counter[str](), 1, 1, 0, False
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        if text[place] == "/":
            sign, place = -1, place + 1
            continue
        found = _PIECE.match(text, place)
        if found is None:
            return None
        word, raised = found[1], int(found[2] or 1)
        place = found.end()
        if word in ("square", "sq", "cubic", "cu"):
            power = _POWERS[word]
            continue
        if word in ("squared", "cubed") and known:
            return None
        entry = TABLE.get(word) or TABLE.get(word.lower())
        if entry is None:
            return None
        exponent = sign * raised * power
        factor *= entry[0] ** exponent
        for base, times in entry[1].items():
            dimension[base] += times * exponent
        power, known = 1, True
    if not known:
        return None
    return Unit(factor, tuple(sorted((base, times) for base, times in dimension.items() if times)))
