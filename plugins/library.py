"""The plugins of backend ``tensorrt``: which ops have one, and what of it is the op's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moecompiler.plugins.launch import TRITON_TYPES, Dims, Tactic

if TYPE_CHECKING:
    import onnx

    from moecompiler.ops import OpSpec

Tactics = Callable[[str, Mapping[str, Any], Dims, str, int], Sequence[Tactic]]


@dataclass(frozen=True)
class PluginOp:
    """``tactics(op, attributes, dims, dtype, sm)``: see ``launch``. ``aliases``: output → the input in whose place it is
    written."""

    spec: OpSpec
    tactics: Tactics
    aliases: Mapping[int, int] = field(default_factory=dict)


def plugin_ops() -> dict[str, PluginOp]:
    """Every op that has a plugin, by its name."""
    from moecompiler.config import NormalizationMode
    from moecompiler.plugins.attention import launch as attention
    from moecompiler.plugins.attention.op import ATTENTION
    from moecompiler.plugins.moe import launch as moe
    from moecompiler.plugins.moe.op import moe_spec
    from moecompiler.plugins.rmsnorm import launch as rmsnorm
    from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM, RMS_NORM

    anywhere = moe_spec(NormalizationMode.RENORMALIZE, 2)  # inputs and attributes are the same in every mode
    ops = (
        PluginOp(RMS_NORM, rmsnorm.tactics),
        PluginOp(ADD_RMS_NORM, rmsnorm.tactics),
        PluginOp(ATTENTION, attention.tactics, {1: 6, 2: 7}),
        PluginOp(anywhere, moe.tactics),
    )
    return {op.spec.name: op for op in ops}


class TensorRTPlugins:
    """See ``moecompiler.backends.base.PluginLibrary``. TensorRT is imported when plugins are registered."""

    def refusal(self, node: onnx.NodeProto, dims: Dims, dtype: str, sm: int) -> str | None:
        """Why no plugin can stand for this node; None where one can."""
        import onnx

        op = plugin_ops().get(node.op_type)
        if op is None:
            return "there is no plugin for it"
        if dtype not in TRITON_TYPES:
            return f"its plugin has no kernels for {dtype}"
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if not op.tactics(node.op_type, attributes, dims, dtype, sm):
            return f"its plugin has no kernels for SM {sm} and inputs of {', '.join(map(str, dims))}"
        return None

    def aliases(self, op_type: str) -> Mapping[int, int]:
        op = plugin_ops().get(op_type)
        return op.aliases if op else {}

    def register(self) -> None:
        from moecompiler.plugins.tensorrt_plugin import register

        register(plugin_ops())
