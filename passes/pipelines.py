"""The named orders of passes: plain lists."""

from __future__ import annotations

from moecompiler.passes.cleanup import CleanUp
from moecompiler.passes.common_subexpressions import CommonSubexpressions
from moecompiler.passes.constant_folding import ConstantFolding
from moecompiler.passes.fuse_add_rms_norm import FuseAddRMSNorm
from moecompiler.passes.fuse_all_reduce_rms_norm import FuseAllReduceRMSNorm
from moecompiler.passes.fuse_attention import FuseAttention
from moecompiler.passes.fuse_batched_moe import FuseBatchedMoE
from moecompiler.passes.fuse_context_attention import FuseContextAttention
from moecompiler.passes.fuse_eager_moe import FuseEagerMoE
from moecompiler.passes.fuse_grouped_moe import FuseGroupedMoE
from moecompiler.passes.fuse_moe import FuseMoE
from moecompiler.passes.fuse_rms_norm import FuseRMSNorm
from moecompiler.passes.merge_qkv import MergeQKV
from moecompiler.passes.quantize_cache import QuantizeCache
from moecompiler.passes.quantize_weights import QuantizeWeights
from moecompiler.passes.restore import Restore
from moecompiler.passes.standard_ops import StandardOps
from moecompiler.pipeline import Pass
from moecompiler.quantization.recipe import QuantizationRecipe

AUTO = "auto"
OOTB = "ootb"
PLUGINS = "plugins"
DEBUG = "debug"


def named_pipelines(quantization: QuantizationRecipe | None = None) -> dict[str, tuple[Pass, ...]]:
    """``ootb``: plain operators, what an engine without plugins is built from. ``plugins``: fused ops, whose bodies a backend
    without plugins inlines. ``debug``: the export as it is. One of each backend's name has what suits it best: fused ops where
    it has plugins for them, operators of ONNX's own (``standard-ops``) where it has kernels for those. With a recipe, each
    quantizes by it."""
    # clean-up exposes constants (a cast of a constant to its own type), folding exposes no-ops: twice settles both
    tidy: tuple[Pass, ...] = (ConstantFolding(), CleanUp(), ConstantFolding(), CleanUp())
    fuse: tuple[Pass, ...] = (
        FuseRMSNorm(),
        FuseAttention(),
        FuseContextAttention(),
        FuseMoE(),
        FuseBatchedMoE(),
        FuseEagerMoE(),
        FuseGroupedMoE(),
        FuseAddRMSNorm(),
        MergeQKV(),
    )
    plugins: tuple[Pass, ...] = (*tidy, CommonSubexpressions(), *fuse)
    quantize, fused_first = _quantizing(quantization)
    plugins = (*plugins, *quantize)
    attention: tuple[Pass, ...] = (FuseAttention(),) if fused_first else ()
    plain = (*attention, *quantize, Restore()) if quantize else ()  # no op of ours is left
    standard = (*plugins, StandardOps())
    return {
        DEBUG: (*tidy, *plain) if fused_first else plain,
        OOTB: (*tidy, *plain),
        PLUGINS: plugins,
        "onnxruntime": standard,
        "tensorrt": (*plugins, FuseAllReduceRMSNorm()),
        "tensorrt-rtx": standard,
    }


def _quantizing(quantization: QuantizationRecipe | None) -> tuple[tuple[Pass, ...], bool]:
    """The passes that quantize, and whether attention has to be fused for them: its arithmetic is to be FP8 too."""
    if quantization is None:
        return (), False
    weights: tuple[Pass, ...] = (QuantizeWeights(quantization),) if quantization.rules else ()
    if quantization.cache is None:
        return weights, False
    return (*weights, QuantizeCache(quantization.cache)), quantization.cache.fp8_context


def default_pipeline(backend: str) -> str:
    """What ``auto`` stands for: fused ops where they run as plugins, plain operators elsewhere."""
    return backend if backend == "tensorrt" else OOTB


def passes_by_name(quantization: QuantizationRecipe | None = None) -> dict[str, Pass]:
    """The passes that come with this package: those of the pipelines, and those that stand in none."""
    cache = None if quantization is None else quantization.cache
    others: tuple[Pass, ...] = (QuantizeWeights(quantization), QuantizeCache(cache), Restore())
    return {step.name: step for steps in (*named_pipelines().values(), others) for step in steps}
