"""The named orders of passes: plain lists."""

from __future__ import annotations

from moecompiler.errors import UserError
from moecompiler.passes.cleanup import CleanUp
from moecompiler.passes.common_subexpressions import CommonSubexpressions
from moecompiler.passes.constant_folding import ConstantFolding
from moecompiler.passes.fuse_add_rms_norm import FuseAddRMSNorm
from moecompiler.passes.fuse_attention import FuseAttention
from moecompiler.passes.fuse_moe import FuseMoE
from moecompiler.passes.fuse_rms_norm import FuseRMSNorm
from moecompiler.passes.merge_qkv import MergeQKV
from moecompiler.pipeline import Pass

OPTIMIZE = "optimize"
PLUGINS = "plugins"
DEBUG = "debug"


def named_pipelines() -> dict[str, tuple[Pass, ...]]:
    """``optimize``: plain operators, what an engine without plugins is built from. ``plugins``: fused ops, whose bodies a
    backend without plugins inlines. ``debug``: the export as it is."""
    # clean-up exposes constants (a cast of a constant to its own type), folding exposes no-ops: twice settles both
    tidy: tuple[Pass, ...] = (ConstantFolding(), CleanUp(), ConstantFolding(), CleanUp())
    fuse: tuple[Pass, ...] = (FuseRMSNorm(), FuseAttention(), FuseMoE(), FuseAddRMSNorm(), MergeQKV())
    return {
        OPTIMIZE: tidy,
        PLUGINS: (*tidy, CommonSubexpressions(), *fuse),
        DEBUG: (),
    }


def find_pipeline(name: str) -> tuple[Pass, ...]:
    """Raises UserError where there is no such pipeline."""
    pipelines = named_pipelines()
    if name not in pipelines:
        raise UserError(f"--pipeline {name}: there is none of that name; choose from {', '.join(sorted(pipelines))}")
    return pipelines[name]
