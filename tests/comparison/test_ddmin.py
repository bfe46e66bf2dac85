"""Delta debugging over plain sets: what it returns fails, and nothing of it can be left out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompiler.comparison.ddmin import Outcome, ddmin, split

FAIL, PASS, UNRESOLVED = Outcome.FAIL, Outcome.PASS, Outcome.UNRESOLVED


@pytest.mark.parametrize("wanted", [(0,), (7,), (3, 4), (0, 7), (1, 4, 6), tuple(range(8))])
def test_finds_exactly_what_is_needed(wanted: tuple[int, ...]) -> None:
    assert ddmin(range(8), lambda part: FAIL if {*wanted} <= {*part} else PASS) == wanted


def test_a_single_culprit_of_many_takes_some_log_n_tries() -> None:
    tried: list[tuple[int, ...]] = []

    def test(part: tuple[int, ...]) -> Outcome:
        tried.append(part)
        return FAIL if 77 in part else PASS

    assert ddmin(range(128), test) == (77,)
    assert len(tried) <= 2 * 7


def test_the_papers_example_with_parts_that_cannot_be_told() -> None:
    """Figure 4 of the paper has 1, 7 and 8 of eight changes fail together; here what holds 2 without 1 cannot be built."""

    def test(part: tuple[int, ...]) -> Outcome:
        if 2 in part and 1 not in part:
            return UNRESOLVED
        return FAIL if {1, 7, 8} <= {*part} else PASS

    assert ddmin(range(1, 9), test) == (1, 7, 8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_no_single_item_can_be_left_out_whatever_the_check_says(count: int, seed: int) -> None:
    """Checks that are not monotone: a part may fail although a larger one that holds it does not."""
    import random

    def test(part: tuple[int, ...]) -> Outcome:
        if not part or len(part) == count:
            return FAIL if part else PASS
        return random.Random(f"{seed} {part}").choice([FAIL, PASS, UNRESOLVED])

    found = ddmin(range(count), test)
    assert test(found) is FAIL
    smaller = [tuple(each for each in found if each != left_out) for left_out in found]
    assert not any(test(part) is FAIL for part in smaller)


@given(st.integers(1, 30), st.integers(1, 30))
def test_pieces_are_the_whole_and_of_like_sizes(count: int, parts: int) -> None:
    pieces = split(range(count), min(parts, count))
    assert [each for piece in pieces for each in piece] == [*range(count)]
    assert {len(piece) for piece in pieces} <= {count // len(pieces), -(-count // len(pieces))}
