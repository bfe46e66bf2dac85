"""Delta debugging: the smallest part of a set that still fails.

A. Zeller, R. Hildebrandt: Simplifying and Isolating Failure-Inducing Input. IEEE Transactions on Software Engineering 28(2),
2002, algorithm ``ddmin``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import TypeVar


class Outcome(StrEnum):
    """``UNRESOLVED``: it could not be told, as where no engine could be built."""

    PASS = "pass"
    FAIL = "fail"
    UNRESOLVED = "unresolved"


T = TypeVar("T")


def ddmin(items: Sequence[T], test: Callable[[tuple[T, ...]], Outcome]) -> tuple[T, ...]:
    """A part of ``items``, in their order, that fails, and of which no single item can be taken away so that it still does
    (1-minimal). ``items`` fails and nothing at all passes; neither is tried. A part may be tried more than once.
    """
    kept, parts = tuple(items), 2
    while len(kept) > 1:
        chunks = split(kept, parts)
        if (failing := _first(chunks, test)) is not None:
            kept, parts = failing, 2
        elif parts > 2 and (failing := _first([_without(kept, chunk) for chunk in chunks], test)) is not None:
            kept, parts = failing, parts - 1
        elif parts < len(kept):
            parts = min(len(kept), 2 * parts)
        else:
            break
    return kept


def split(items: Sequence[T], parts: int) -> list[tuple[T, ...]]:
    """``parts`` pieces one after another, of sizes that differ by one at most."""
    edges = [len(items) * index // parts for index in range(parts + 1)]
    return [tuple(items[start:end]) for start, end in pairwise(edges)]


def _first(candidates: Sequence[tuple[T, ...]], test: Callable[[tuple[T, ...]], Outcome]) -> tuple[T, ...] | None:
    return next((each for each in candidates if test(each) is Outcome.FAIL), None)


def _without(items: tuple[T, ...], some: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(each for each in items if each not in some)
