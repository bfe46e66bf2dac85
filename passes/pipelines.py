"""The named orders of passes: plain lists."""

from __future__ import annotations

from moecompiler.errors import UserError
from moecompiler.passes.cleanup import CleanUp
from moecompiler.passes.constant_folding import ConstantFolding
from moecompiler.pipeline import Pass

OPTIMIZE = "optimize"
DEBUG = "debug"


def named_pipelines() -> dict[str, tuple[Pass, ...]]:
    """``optimize``: what an engine is built from. ``debug``: the export as it is."""
    return {
        # clean-up exposes constants (a cast of a constant to its own type), folding exposes no-ops: twice settles both
        OPTIMIZE: (ConstantFolding(), CleanUp(), ConstantFolding(), CleanUp()),
        DEBUG: (),
    }


def find_pipeline(name: str) -> tuple[Pass, ...]:
    """Raises UserError where there is no such pipeline."""
    pipelines = named_pipelines()
    if name not in pipelines:
        raise UserError(f"--pipeline {name}: there is none of that name; choose from {', '.join(sorted(pipelines))}")
    return pipelines[name]
