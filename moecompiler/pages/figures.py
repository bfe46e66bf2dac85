"""Figures as a reader wants them."""

from __future__ import annotations

import math


def figure(value: float) -> str:
    """An error, in two digits."""
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else _no_number(value)


def significant(value: float, digits: int = 3) -> str:
    """A number as short as its digits let it be: ``0.5``, ``12.3``, ``1.2e+05``."""
    return f"{value:.{digits}g}" if math.isfinite(value) else _no_number(value)


def byte_size(count: int) -> str:
    """``7.8 MB``, in powers of 1000 as file managers count."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _no_number(value: float) -> str:
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"


def fixed(value: float, digits: int = 4) -> str:
    """With so many digits behind the point."""
    return f"{value:.{digits}f}" if math.isfinite(value) else _no_number(value)


def share(value: float) -> str:
    """Of a whole, in percent."""
    return f"{value:.2%}" if math.isfinite(value) else _no_number(value)


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def counted(count: int, noun: str, plural: str = "s") -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {noun}{'' if count == 1 else plural}"
