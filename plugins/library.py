"""The plugins that backends may use: the ops whose tactics there are, and what of them TensorRT has to know."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moecompiler.plugins.launch import TRITON_TYPES, Dims

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from moecompiler.backends.sampling_kernels import SamplingKernels
    from moecompiler.ops import OpSpec
    from moecompiler.runtime.collective_kernels import CollectiveKernels


@dataclass(frozen=True)
class PluginOp:
    """``aliases``: output → the input in whose place it is written."""

    spec: OpSpec
    aliases: Mapping[int, int] = field(default_factory=dict)


def plugin_ops() -> dict[str, PluginOp]:
    """Every op that has a plugin, by its name."""
    from moecompiler.config import NormalizationMode
    from moecompiler.plugins.attention.cache_op import ATTENTION_SPECS
    from moecompiler.plugins.attention.op import ATTENTION
    from moecompiler.plugins.moe.op import moe_spec
    from moecompiler.plugins.quantized.dequantize import forms
    from moecompiler.plugins.quantized.linear import linear_spec
    from moecompiler.plugins.quantized.moe import quantized_moe_spec
    from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM, ALL_REDUCE_ADD_RMS_NORM, RMS_NORM

    anyhow = moe_spec(NormalizationMode.RENORMALIZE, 2)  # inputs and attributes are the same in every mode
    ops: tuple[PluginOp, ...] = (PluginOp(RMS_NORM), PluginOp(ADD_RMS_NORM), PluginOp(anyhow))
    ops += (PluginOp(ALL_REDUCE_ADD_RMS_NORM),)
    ops += tuple(PluginOp(spec, {1: 6, 2: 7}) for spec in (ATTENTION, *ATTENTION_SPECS))  # caches are written in place
    for form in forms():
        if not form.ordered:  # features in another order: only the body can
            ops += PluginOp(quantized_moe_spec(NormalizationMode.RENORMALIZE, 2, form)), PluginOp(linear_spec(form))
    return {op.spec.name: op for op in ops}


class TensorRTPlugins:
    """See ``moecompiler.backends.base.PluginLibrary``. TensorRT is imported when plugins are registered."""

    def refusal(self, node: onnx.NodeProto, dims: Dims, dtype: str, sm: int) -> str | None:
        """Why no plugin can stand for this node; None where one can."""
        from moecompiler.graph import COLLECTIVES

        if node.op_type in COLLECTIVES:
            return None
        if node.op_type not in plugin_ops():
            return "there is no plugin for it"
        if dtype not in TRITON_TYPES:
            return f"its plugin has no kernels for {dtype}"
        if not self.tactics(node, dims, dtype, sm):
            return f"its plugin has no kernels for SM {sm} and inputs of {', '.join(map(str, dims))}"
        return None

    def tactics(self, node: onnx.NodeProto, dims: Dims, dtype: str, sm: int) -> tuple[str, ...]:
        """The names of the plans by which a plugin can compute this node, the best guess first."""
        import onnx

        from moecompiler.plugins.tactics import tactics

        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        return tuple(each.name for each in tactics(node.op_type, attributes, dims, dtype, sm))

    def aliases(self, op_type: str) -> Mapping[int, int]:
        op = plugin_ops().get(op_type)
        return op.aliases if op else {}

    def register(self) -> None:
        from moecompiler.plugins.tensorrt_plugin import register

        register(plugin_ops())

    def check_interpreter(self) -> None:
        """Raises: UserError where there is no Triton."""
        from moecompiler.plugins.interpreter import check_triton

        check_triton()

    def interpret(self, node: str, file: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """In a process of its own. Raises: UserError where a kernel fails."""
        from moecompiler.plugins.interpreter import interpret

        return interpret(node, file, arrays)

    def compile_collectives(self, dtype: str, sm: int) -> bytes | None:
        """None where there is no NVRTC to compile with, no kernel for the type, or none for so old a GPU."""
        if dtype not in TRITON_TYPES or sm < 80 or importlib.util.find_spec("cuda.bindings.nvrtc") is None:
            return None
        from moecompiler.plugins.collectives.kept import compile_collectives

        return compile_collectives(dtype, sm)

    def load_collectives(self, data: bytes) -> CollectiveKernels:
        from moecompiler.plugins.collectives.kept import Collectives

        return Collectives(data)

    def compile_sampling(self, vocab: int, dtype: str, sm: int) -> bytes | None:
        """None where there is no Triton to compile with, or no kernel for the type."""
        if dtype not in TRITON_TYPES or importlib.util.find_spec("triton") is None:
            return None
        from moecompiler.plugins.sampling.kept import compile_sampling

        return compile_sampling(vocab, dtype, sm)

    def load_sampling(self, data: bytes) -> SamplingKernels:
        from moecompiler.plugins.sampling.kept import Sampling

        return Sampling(data)
