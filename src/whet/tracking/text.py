"""Numbers as people read them, for the report."""

from __future__ import annotations

import math

THIN = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


def counted(count: int, thing: str) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def percent(value: float, digits: int | None = None) -> str:
    """0.364 as `36 %`; without `digits` one decimal only below 1 % and above 99 %, where a whole one would hide all."""
    shown = 100 * value
    if digits is None:
        digits = 1 if 0.05 <= abs(shown) < 1 or 99 < abs(shown) <= 99.95 else 0
    return f"{shown:.{digits}f}{THIN}%".replace("-", MINUS)


def share(value: float) -> str:
    """A share with three significant digits: `36.4 %`, `0.213 %`; for axes and single values."""
    return f"{float(f'{100 * value:.3g}'):.7g}{THIN}%".replace("-", MINUS)


def points(value: float) -> str:
    """A difference of two shares in percentage points, with its sign: 0.55 as `+55`."""
    size = abs(100 * value)
    text = f"{size:.0f}" if size >= 9.95 or size < 0.05 else f"{size:.1f}"
    if text == "0":
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def number(value: float) -> str:
    """Three significant digits, with k and M for thousands and millions and a power of ten below a thousandth."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 999_500:
        text = f"{value / 1e6:.3g}M"
    elif size >= 9_995:
        text = f"{value / 1e3:.3g}k"
    elif size >= 99.95:
        text = f"{value:,.0f}"
    elif size >= 0.000_995:
        text = f"{value:.3g}"
    else:
        power = math.floor(math.log10(size))
        text = f"{value / 10.0**power:.3g}e{power}"
    return text.replace("-", MINUS)


def seconds(value: float) -> str:
    """A duration: `340 ms`, `4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if value == 0:
        return "0"
    if value < 1:
        return f"{1000 * value:.0f}{THIN}ms"
    if value < 60:
        return f"{value:.1f}{THIN}s" if value < 10 else f"{value:.0f}{THIN}s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{THIN}h {minutes:02d}{THIN}min" if hours else f"{minutes}{THIN}min {rest:02d}{THIN}s"
