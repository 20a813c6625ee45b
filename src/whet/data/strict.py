"""JSON and text without surprises: what Python's `json` lets through and training must not see is an error here.

Refused: a key twice in one object, NaN and Infinity, numbers that overflow to infinity, text that is not UTF-8,
NUL characters and halves of surrogate pairs. Errors are `ValueError` (or `RecursionError` for bottomless nesting),
with "what; remedy" as their text; the caller knows the place.
"""

from __future__ import annotations

import json
import math
from typing import Any

LONGEST_NUMBER = 1000
"""Digits. Python refuses to convert much longer ones, and no data means them."""


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError (JSONDecodeError, UnicodeDecodeError) or RecursionError."""
    value = _DECODER.decode(data if isinstance(data, str) else data.decode("utf-8"))
    check_text(value)
    return value


def check_text(value: Any) -> None:
    """Raises ValueError where a text inside the value is one that no tokenizer can take as it is."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("NUL character in the text; remove it, or write the file again if it is damaged")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("half of a surrogate pair in the text; it was cut or encoded wrongly")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key)
            check_text(item)
    elif isinstance(value, list):
        for item in value:
            check_text(item)


def explain(error: Exception) -> tuple[str, str]:
    """(what, remedy) of an error of this file."""
    if isinstance(error, json.JSONDecodeError):
        return "not valid JSON", f"{error.msg}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8", f"byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}"
    if isinstance(error, RecursionError):
        return "nested too deeply", "nothing that can be trained on looks like this"
    what, _, remedy = str(error).partition("; ")
    return what, remedy


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in one object; it is unclear which value is meant")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number overflows; numbers must fit a 64-bit float")
    return value


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number has {len(text)} digits; if it is meant, write it as text")
    return int(text)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; write null, or leave the field out")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_int=_integer, parse_constant=_no_constant
)
