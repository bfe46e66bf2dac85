"""One TensorRT plugin for all ops: what is an op's own is its spec and its tactics.

When an engine is built, a node's kernels are compiled for the GPU at hand, TensorRT times the tactics, and the cubins go into
the engine. When it runs, they come out of it again: neither Triton nor a compiler is there. ``tensorrt`` is imported with this
module, so import it late.
"""

from __future__ import annotations

import atexit
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import tensorrt as trt

from moecompiler.errors import UserError
from moecompiler.graph import COLLECTIVES, DOMAIN, exchanges
from moecompiler.ops import VERSION, plugin_name
from moecompiler.plugins.barrier_plugin import BarrierCreator
from moecompiler.plugins.collective_plugin import CollectiveCreator
from moecompiler.plugins.driver import Function, load, run
from moecompiler.plugins.fields import CUBINS, PLAN, Baked, BakedTactic, fingerprint, pack, unpack
from moecompiler.plugins.launch import AnyKernel, Cubin, Dims, Tactic, scratch_bytes
from moecompiler.plugins.library import PluginOp
from moecompiler.plugins.output_dims import output_dims
from moecompiler.plugins.tactics import tactics
from moecompiler.runtime.device import checked, driver
from moecompiler.runtime.lifetime import never_freed

_TYPES = {trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16", trt.DataType.FLOAT: "float32"}
_KEPT = {"int64": trt.DataType.INT64, "float32": trt.DataType.FLOAT}
_KEPT |= dict.fromkeys(("int8", "int4", "float8_e4m3fn"), trt.DataType.INT8)  # codes come as bytes
_NUMBERS = {int: (trt.PluginFieldType.INT32, np.int32), float: (trt.PluginFieldType.FLOAT32, np.float32)}
_NUMBERS |= {list: _NUMBERS[int]}
_BASES = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)


class Modules:
    """Kernels compiled and loaded, each once, however many nodes use them."""

    def __init__(self) -> None:
        self._cubins: dict[tuple[AnyKernel, int], Cubin] = {}
        self._functions: dict[tuple[int, Cubin], Function] = {}

    def cubin(self, kernel: AnyKernel, sm: int) -> Cubin:
        """The kernel compiled for ``sm``."""
        if (kernel, sm) not in self._cubins:
            from moecompiler.plugins.compile import compile_kernel

            self._cubins[kernel, sm] = compile_kernel(kernel, sm)
        return self._cubins[kernel, sm]

    def function(self, kernel: AnyKernel, cubin: Cubin) -> Function:
        """The kernel loaded into the current CUDA context."""
        key = int(checked(driver().cuCtxGetCurrent())), cubin
        if key not in self._functions:
            self._functions[key] = load(cubin, kernel)
        return self._functions[key]


class FusedOp(*_BASES):  # type: ignore[misc]
    """A node of one of our ops. ``baked`` grows when the node's shapes and types come to be known.

    It is never freed. TensorRT deletes the C++ half of a plugin itself, and the destructor of that half (``~PyIPluginV3Impl`` in
    TensorRT's Python bindings) lets go of the Python object. Was that the last reference, Python frees the C++ half once more. It
    happens to what a context made of a plugin for a profile that it does not use, and the heap is broken from then on.
    """

    def __init__(self, op: PluginOp, baked: Baked, modules: Modules):
        for base in _BASES:
            base.__init__(self)
        never_freed(self)
        self.plugin_name, self.plugin_namespace = plugin_name(op.spec.name), DOMAIN
        self.plugin_version = str(VERSION)
        self.num_outputs = len(op.spec.outputs)
        self.op, self.baked, self.modules = op, baked, modules
        self._name_timings()

    def get_capability_interface(self, kind: Any) -> FusedOp:
        return self

    def clone(self) -> FusedOp:
        return FusedOp(self.op, self.baked, self.modules)

    # build

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Those of the node's own type are of the type of its first such input."""
        own = input_types[self._first]
        return [_KEPT.get(output.type, own) for output in self.op.spec.outputs]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        """TensorRT knows a dim again only if it is the very expression."""
        spec = self.op.spec
        given = [[each[axis] for axis in range(len(each))] for each in inputs]
        return [trt.DimsExprs(output_dims(spec, output, given)) for output in spec.outputs]

    def get_aliased_input(self, output_index: int) -> int:
        return self.op.aliases.get(output_index, -1)

    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        values = (*self.op.spec.inputs, *self.op.spec.outputs)
        desc = in_out[position].desc
        if desc.format != trt.TensorFormat.LINEAR:
            return False
        if values[position].type in _KEPT:
            return desc.type == _KEPT[values[position].type]
        return desc.type in _TYPES and desc.type == in_out[self._first].desc.type

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._bake(self._dims(each.desc.dims for each in inputs), _TYPES[inputs[self._first].desc.type], _sm())

    def get_valid_tactics(self) -> list[int]:
        return list(range(1, len(self.baked.tactics) + 1))

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """For every tactic at the largest shapes: which will be set is not known yet."""
        dims = self._dims(each.max for each in inputs)
        return max(
            tactic.workspace(dims) + scratch_bytes(tactic.launches(dims), baked.cubins)
            for tactic, baked in zip(self._tactics, self.baked.tactics, strict=True)
        )

    # runtime

    def attach_to_context(self, context: Any) -> FusedOp:
        plugin = self.clone()
        if plugin.baked.selected:
            plugin.set_tactic(plugin.baked.selected)
        return plugin

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Launches are planned when they are made: it costs less than the launch."""

    def set_tactic(self, tactic: int) -> None:
        self.baked = replace(self.baked, selected=tactic)
        self.__dict__.pop("_ready", None)

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> int:
        tactic, functions = self._ready
        dims = self._dims(each.dims for each in input_desc)
        scratch = workspace + tactic.workspace(dims)
        run(functions, tactic.launches(dims), inputs, outputs, workspace, scratch, stream)
        return 0

    def get_fields_to_serialize(self) -> Any:
        """TensorRT keeps no references: the arrays and fields live as long as this object."""
        packed = pack(self.baked)
        self._arrays = {name: np.frombuffer(data, np.int8).copy() for name, data in packed.items()}
        self._fields = [trt.PluginField(name, array, trt.PluginFieldType.INT8) for name, array in self._arrays.items()]
        self._collection = trt.PluginFieldCollection(self._fields)
        return self._collection

    # what both share

    @cached_property
    def _first(self) -> int:
        """The first input of the node's own floating-point type."""
        return next(i for i, value in enumerate(self.op.spec.inputs) if value.type == "T")

    def _dims(self, dims: Iterable[Any]) -> Dims:
        """The inputs' shapes as the graph has them: of int4, TensorRT has bytes of two."""
        values = self.op.spec.inputs
        shapes = zip(values, (tuple(each[axis] for axis in range(len(each))) for each in dims), strict=True)
        return tuple((*shape[:-1], 2 * shape[-1]) if value.type == "int4" else shape for value, shape in shapes)

    @cached_property
    def _tactics(self) -> tuple[Tactic, ...]:
        """The ways to compute the node, in the order of their numbers.

        Raises: UserError where the engine holds other kernels than this version's plans are for.
        """
        baked = self.baked
        now = {each.name: each for each in tactics(baked.op, baked.attributes, baked.dims, baked.dtype, baked.sm)}
        for kept in baked.tactics:
            if kept.name not in now or fingerprint(now[kept.name].kernels) != kept.kernels:
                raise UserError(
                    f"the engine's plugin {baked.op} was made by another version of moecompiler (tactic {kept.name}):"
                    " build it anew"
                )
        return tuple(now[kept.name] for kept in baked.tactics)

    @cached_property
    def _ready(self) -> tuple[Tactic, tuple[Function, ...]]:
        """The selected tactic (the first, if none was selected), its kernels loaded."""
        index = max(self.baked.selected, 1) - 1
        tactic, cubins = self._tactics[index], self.baked.tactics[index].cubins
        return tactic, tuple(
            self.modules.function(kernel, cubin) for kernel, cubin in zip(tactic.kernels, cubins, strict=True)
        )

    def _bake(self, dims: Dims, dtype: str, sm: int) -> None:
        """Compiles every tactic's kernels for these shapes."""
        compiled = tuple(
            BakedTactic(
                each.name, fingerprint(each.kernels), tuple(self.modules.cubin(kernel, sm) for kernel in each.kernels)
            )
            for each in tactics(self.baked.op, self.baked.attributes, dims, dtype, sm)
        )
        self.baked = replace(self.baked, dims=dims, dtype=dtype, sm=sm, tactics=compiled)
        for name in ("_tactics", "_ready"):
            self.__dict__.pop(name, None)
        self._name_timings()

    def _name_timings(self) -> None:
        """TensorRT times a plugin anew for every node unless told what makes two alike, besides shapes and types."""
        if self.baked.tactics:
            about = repr((sorted(self.baked.attributes.items()), self.baked.tactics))
            self.timing_cache_id = f"{self.baked.op}-{hashlib.sha256(about.encode()).hexdigest()[:32]}"


class Creator(trt.IPluginCreatorV3One):
    """Makes an op's plugin from a node's attributes, or from what an engine kept."""

    def __init__(self, op: PluginOp, modules: Modules):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = plugin_name(op.spec.name), DOMAIN, str(VERSION)
        self._op, self._modules = op, modules
        self._fields = [
            trt.PluginField(name, np.array([], _NUMBERS[kind][1]), _NUMBERS[kind][0])
            for name, kind in op.spec.attributes.items()
        ]
        self.field_names = trt.PluginFieldCollection(self._fields)

    def create_plugin(self, name: str, fields: Any, phase: Any) -> FusedOp:
        data = {field.name: np.array(field.data, copy=True) for field in fields}
        if PLAN in data:
            return self._made(unpack({key: data[key].tobytes() for key in (PLAN, CUBINS)}), runs=True)
        attributes = {
            key: data[key].reshape(-1).tolist() if kind is list else kind(data[key].reshape(-1)[0])
            for key, kind in self._op.spec.attributes.items()
        }
        return self._made(Baked(self._op.spec.name, attributes, (), "", 0, ()), runs=False)

    def _made(self, baked: Baked, runs: bool) -> FusedOp:
        return FusedOp(self._op, baked, self._modules)


def register(ops: Mapping[str, PluginOp]) -> None:
    """Makes the plugins known to TensorRT, unless they are already.

    Raises: UserError where numpy and TensorRT's bindings do not fit together.
    """
    from moecompiler.plugins.all_reduce_norm_plugin import ExchangingCreator  # which is made of what is here

    check_fields()
    registry = trt.get_plugin_registry()
    modules = Modules()
    creators = [(ExchangingCreator if exchanges(name) else Creator)(op, modules) for name, op in ops.items()]
    creators += [*(CollectiveCreator(op) for op in COLLECTIVES), BarrierCreator()]
    for creator in creators:
        if registry.get_creator(creator.name, str(VERSION), DOMAIN) is None:
            registry.register_creator(creator, DOMAIN)
            atexit.register(
                registry.deregister_creator, creator
            )  # and till then keeps it: the registry does not own it


def check_fields() -> None:
    """TensorRT 10.6's bindings misread arrays of numpy 2: every element becomes the first, and engines would hold garbage.

    Raises: UserError where they do.
    """
    array = np.array([1, 2, 3], np.int8)
    field = trt.PluginField("probe", array, trt.PluginFieldType.INT8)
    if field.data.tolist() != [1, 2, 3]:
        raise UserError(
            f"TensorRT {trt.__version__}'s Python bindings misread arrays of numpy {np.__version__}, and plugins would be"
            " corrupt: pip install 'numpy<2', or use --plugins off"
        )


def _sm() -> int:
    """The compute capability of the current GPU, 90 for 9.0."""
    cuda = driver()
    device, attribute = checked(cuda.cuCtxGetDevice()), cuda.CUdevice_attribute
    major = checked(cuda.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    minor = checked(cuda.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    return 10 * int(major) + int(minor)
