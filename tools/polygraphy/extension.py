"""Options that ``polygraphy run`` gets from us (entry point ``polygraphy.run.plugins``): engines as runners.

Polygraphy imports this module whenever ``polygraphy run`` starts.
"""

from __future__ import annotations

from typing import Any

from polygraphy.tools.args import ModelArgs
from polygraphy.tools.args.base import BaseRunnerArgs
from polygraphy.tools.script import make_invocable


class EngineRunnerArgs(BaseRunnerArgs):
    """
    moecompiler: running a rank's engine as moecompiler runs it

    Depends on:

        - ModelArgs
    """

    def add_parser_args_impl(self) -> None:
        self.group.add_argument(
            "--moecompiler-engine",
            help="Engine file (rankN.onnx, rankN.plan) in a directory that `moecompiler compile` or `build` wrote, for "
            "--moecompiler. Default: the model.",
            default=None,
        )

    def parse_impl(self, args: Any) -> None:
        """
        Attributes:
            engine (str): The engine file.
        """
        self.engine = args.moecompiler_engine

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "moecompiler", "moecompiler"

    def get_extra_help_text_impl(self) -> str:
        return "Needs no plugin library, no file of weights and no peers; see --moecompiler-engine."

    def add_to_script_impl(self, script: Any) -> None:
        path = self.engine or self.arg_groups[ModelArgs].path
        script.add_import(imports=["EngineRunner"], frm="moecompiler.tools.polygraphy.runner")
        script.add_runner(make_invocable("EngineRunner", str(path)))


def argument_groups() -> list[EngineRunnerArgs]:
    """What Polygraphy's entry point asks for."""
    return [EngineRunnerArgs()]
