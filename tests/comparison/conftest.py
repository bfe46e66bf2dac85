"""The shipped model's programs in every format."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import pytest

from moecompiler.config import ExportOptions, NormalizationMode
from moecompiler.graph import Program

if TYPE_CHECKING:
    from programs import Programs, Subject


@pytest.fixture(scope="session")
def fused(programs: Programs, shipped: Subject) -> Callable[..., Program]:
    """The shipped model's program for one rank after the pipeline ``plugins``: ``(dtype, format, mode)``."""
    from format_recipes import recipe_of
    from programs import GRID, MAX_SEQ_LEN

    from moecompiler.passes.pipelines import PLUGINS, named_pipelines
    from moecompiler.pipeline import run_passes

    @cache
    def made(
        dtype: str = "float32", form: str = "none", mode: NormalizationMode = NormalizationMode.RENORMALIZE
    ) -> Program:
        options = ExportOptions(dtype, mode, MAX_SEQ_LEN)
        exported = programs.exported(shipped.config, GRID["one-rank"], 0, options)
        return run_passes(named_pipelines(recipe_of(form, shipped))[PLUGINS], exported)[0]

    return made
