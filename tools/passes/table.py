"""The table of the verbs of ``moecompiler passes``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from moecompiler.tools.passes.bisect import bisect
from moecompiler.tools.passes.diff import diff
from moecompiler.tools.passes.explain import explain
from moecompiler.tools.passes.listing import list_
from moecompiler.tools.passes.reduce import reduce
from moecompiler.tools.passes.report import report
from moecompiler.tools.passes.verify import verify

VERBS: dict[str, Callable[..., Any]] = {
    "list": list_,
    "diff": diff,
    "explain": explain,
    "verify": verify,
    "bisect": bisect,
    "reduce": reduce,
    "report": report,
}


def make_passes_app() -> typer.Typer:
    """The typer application ``passes``."""
    said = "Look into graph passes: what they did, whether it was right, and which rewrite was not."
    app = typer.Typer(help=said, no_args_is_help=True)
    for name, function in VERBS.items():
        app.command(name)(function)
    return app
