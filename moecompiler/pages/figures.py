"""Figures as a reader wants them."""

from __future__ import annotations


def figure(value: float) -> str:
    """An error, in two digits."""
    return "0" if value == 0 else f"{value:.1e}"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def counted(count: int, noun: str, plural: str = "s") -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {noun}{'' if count == 1 else plural}"
