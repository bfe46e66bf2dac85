"""The backend of a name, with the plugins it may use."""

from __future__ import annotations

from moecompiler.backends.base import Backend
from moecompiler.backends.choose import find_backend
from moecompiler.graph import Program
from moecompiler.plugins.library import TensorRTPlugins


def open_backend(name: str, device: int = 0) -> Backend:
    """``device``: the GPU to build on, counted round.

    Raises: UserError where there is no such backend, or its library is not there."""
    return find_backend(name, TensorRTPlugins(), tidy, device)


def tidy(program: Program) -> Program:
    """As the pipelines leave plain operators, and nothing twice."""
    from moecompiler.passes.common_subexpressions import CommonSubexpressions
    from moecompiler.passes.pipelines import OOTB, named_pipelines
    from moecompiler.pipeline import run_passes

    return run_passes((*named_pipelines()[OOTB], CommonSubexpressions()), program)[0]
