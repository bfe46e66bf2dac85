"""Groups of options: one parameter of a verb, many options of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from moecompiler.tools.groups import grouped


@dataclass(frozen=True)
class Size:
    """With a default, and without one."""

    height: Annotated[int, typer.Option("--height")]
    width: Annotated[int, typer.Option("--width")] = 3


@dataclass(frozen=True)
class Colour:
    """All with defaults."""

    names: Annotated[list[str] | None, typer.Option("--colour")] = None


@pytest.fixture
def seen() -> list[Any]:
    """What the verb was called with."""
    return []


@pytest.fixture
def app(seen: list[Any]) -> typer.Typer:
    @grouped
    def draw(
        colour: Colour,
        size: Size,
        title: Annotated[str, typer.Argument()],
        quick: Annotated[bool, typer.Option("--quick")] = False,
    ) -> None:
        """Draw something."""
        seen.append((colour, size, title, quick))

    application = typer.Typer()
    application.command()(draw)
    return application


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["x", "--height", "2"], (Colour(), Size(2), "x", False)),
        (
            ["--width", "5", "--colour", "red", "--colour", "blue", "--quick", "--height", "2", "x"],
            (Colour(["red", "blue"]), Size(2, 5), "x", True),
        ),
    ],
)
def test_options_become_groups(words: list[str], wanted: tuple[object, ...], app: typer.Typer, seen: list[Any]) -> None:
    assert CliRunner().invoke(app, words).exit_code == 0
    assert seen == [wanted]


def test_what_is_wrong_is_refused_as_ever(app: typer.Typer, seen: list[Any]) -> None:
    for words in (["x"], ["x", "--height", "many"], ["--height", "2"], ["x", "--height", "2", "--size", "3"]):
        assert CliRunner().invoke(app, words).exit_code == 2
    assert seen == []


def test_help_has_the_verb_s_words_and_every_option(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    for said in ("Draw something.", "--height", "--width", "--colour", "--quick"):
        assert said in text
