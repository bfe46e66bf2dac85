"""Which passes the options choose, and what is said where they choose none."""

from __future__ import annotations

import pytest

from moecompiler.errors import UserError
from moecompiler.passes.selection import Selection

OOTB = ["constant-folding", "clean-up", "constant-folding", "clean-up"]


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (Selection(), OOTB),
        (Selection("debug"), []),
        (Selection("debug, clean-up"), ["clean-up"]),
        (Selection("ootb,restore,ootb"), [*OOTB, "restore", *OOTB]),
        (Selection(only=("clean-up",)), ["clean-up", "clean-up"]),
        (Selection(only=("clean-up", "constant-folding")), OOTB),
        (Selection(disable=("clean-up",)), ["constant-folding", "constant-folding"]),
        (Selection(disable=("clean-up", "constant-folding")), []),
        (Selection(stop_after="clean-up"), OOTB[:2]),
        (Selection(stop_after="03-constant-folding"), OOTB[:3]),
        (Selection(disable=("constant-folding",), stop_after="01-clean-up"), ["clean-up"]),  # numbers are of what runs
    ],
)
def test_chosen(selection: Selection, names: list[str]) -> None:
    assert [step.name for step in selection.passes()] == names


WHICH = "is not in pipeline ootb, which is 01-constant-folding, 02-clean-up, 03-constant-folding, 04-clean-up"


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (Selection(only=("fuse-moe",)), f"--only_pass fuse-moe: {WHICH}"),
        (Selection(disable=("fuse-moe",)), f"--disable_pass fuse-moe: {WHICH}"),
        (Selection(stop_after="fuse-moe"), f"--stop_after fuse-moe: {WHICH}"),
        (Selection(stop_after="03-clean-up"), f"--stop_after 03-clean-up: {WHICH}"),
        (Selection("debug", only=("clean-up",)), "--only_pass clean-up: is not in pipeline debug, which is empty"),
        (Selection("ootb,"), "--pipeline : there is none of that name"),
    ],
)
def test_refused(selection: Selection, said: str) -> None:
    with pytest.raises(UserError) as caught:
        selection.passes()
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
