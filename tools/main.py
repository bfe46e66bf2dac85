"""The command line: a table of verbs, and how it speaks when something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from moecompiler import __version__
from moecompiler.errors import UserError
from moecompiler.tools.bench import bench
from moecompiler.tools.build import build
from moecompiler.tools.calibrate import calibrate
from moecompiler.tools.compare import compare
from moecompiler.tools.compile import compile_
from moecompiler.tools.export import export
from moecompiler.tools.inspection import inspect
from moecompiler.tools.optimize import optimize
from moecompiler.tools.passes.table import make_passes_app
from moecompiler.tools.plan import plan
from moecompiler.tools.printing import USER_ERROR, complaint
from moecompiler.tools.run import run
from moecompiler.tools.validate import validate

VERBS: dict[str, Callable[..., Any]] = {
    "plan": plan,
    "compile": compile_,
    "export": export,
    "optimize": optimize,
    "build": build,
    "calibrate": calibrate,
    "run": run,
    "bench": bench,
    "validate": validate,
    "compare": compare,
    "inspect": inspect,
}
# options that take one value or several: --input_text "one" "two"
VARIADIC = ("--input_text",)
# options that may stand without their value: --dump_passes is --dump_passes=all
OPTIONAL = {"--dump_passes": "all"}


def make_app() -> typer.Typer:
    """The typer application with every verb."""
    app = typer.Typer(
        name="moecompiler",
        help="Compile Mixtral-style mixture-of-experts checkpoints into engines, run them, and check them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name, function in VERBS.items():
        app.command(name)(function)
    app.add_typer(make_passes_app(), name="passes")

    @app.callback(invoke_without_command=True)
    def version_option(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if version:
            print(f"moecompiler {__version__}")
            raise typer.Exit

    return app


def normalize(arguments: Sequence[str]) -> list[str]:
    """``--tp-size`` → ``--tp_size``, ``--input_text a b`` → ``--input_text a --input_text b``, ``--dump_passes`` →
    ``--dump_passes=all``."""
    result: list[str] = []
    repeating, has_value = "", False
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument.partition("=")
            name = "--" + name[2:].replace("-", "_")
            repeating, has_value = (name if name in VARIADIC and not equals else ""), False
            if name in OPTIONAL and not equals:
                equals, value = "=", OPTIONAL[name]
            result.append(name + equals + value)
        elif repeating and has_value:
            result += [repeating, argument]
        else:
            has_value = True
            result.append(argument)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 2 for bad input, said in one line on stderr."""
    arguments = normalize(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(make_app())
    try:
        status = command.main(args=arguments, prog_name="moecompiler", standalone_mode=False, obj=tuple(arguments))
    except UserError as error:
        return complain(str(error))
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        # what is wrong with the arguments themselves: typer carries its own copy of click and exports no common base
        if message := getattr(error, "format_message", None):
            return complain(f"{message()} (see moecompiler {' '.join(arguments[:1])} --help)")
        raise
    return status if isinstance(status, int) else 0


def complain(message: str) -> int:
    print(complaint(message), file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
