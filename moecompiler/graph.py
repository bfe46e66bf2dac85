"""A rank's program: an ONNX graph and the recipes of its weights; loading, saving, provenance.

Where a node comes from is in its name: ``model.layers.0.self_attn.q_proj/MatMul_3`` is the node ``MatMul_3`` of the HF module
``model.layers.0.self_attn.q_proj``. (onnx-graphsurgeon drops ``metadata_props``, so they cannot carry it.)

On disk a program is ``NAME.onnx`` and ``NAME.weights.json``. The initializers that have recipes hold no data: they point
into ``NAME.safetensors`` at the offset their tensor has once the weights are packed.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto

from moecompiler.errors import UserError
from moecompiler.packing import tensors_of
from moecompiler.safetensors_file import layout
from moecompiler.weights import FLOATS, Recipe

OPSET = 21
IR_VERSION = 10
DOMAIN = "moecompiler"
COLLECTIVES = ("AllReduce", "AllGather")  # ops without a body: every backend has its own
FUSED_COLLECTIVES = ("AllReduceAddRMSNorm",)  # in whose bodies there is one
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter notes the modules a node comes from

ONNX_DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
}


@dataclass(frozen=True)
class Program:
    """One rank's graph, and by name the recipes of those initializers that are weights (the others hold their data)."""

    model: onnx.ModelProto
    weights: Mapping[str, Recipe] = field(default_factory=dict)


def node_name(module: str, name: str) -> str:
    """The name of a node that comes from HF module ``module`` (empty: the model itself)."""
    return f"{module}/{name}"


def module_of(name: str) -> str:
    """The HF module a node's name says it comes from; empty where it says none."""
    return name.rpartition("/")[0]


def enclosing_modules(module: str) -> list[str]:
    """The HF modules that hold one, outermost first, and itself."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def name_in_scopes(scopes: str, name: str) -> str:
    """The name of a node of which torch's exporter noted these scopes (a list of Python strings, as text; empty: none): that
    of the innermost HF module."""
    noted = ast.literal_eval(scopes) if scopes else []
    modules = [scope for scope in noted[:-1] if not scope.startswith("_")]
    return node_name(modules[-1] if modules else "", name)


def output_of(module: str) -> str:
    """The name of the tensor that leaves a layer, its attention or its MoE."""
    return f"{module}/output"


def is_collective(node: onnx.NodeProto) -> bool:
    """Whether ranks exchange something in it."""
    return node.domain == DOMAIN and exchanges(node.op_type)


def exchanges(op: str) -> bool:
    """Whether ranks exchange something in an op of ours."""
    return op in COLLECTIVES or op in FUSED_COLLECTIVES


def weight_tensor(name: str, recipe: Recipe, location: str = "weights", offset: int = 0) -> TensorProto:
    """An initializer without data, which points at ``location``."""
    tensor = TensorProto(name=name, data_type=ONNX_DTYPES[recipe.dtype], dims=recipe.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", recipe.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def point_weights_at(program: Program, location: str) -> Program:
    """The program with its weights' initializers pointing into the safetensors file ``location``, as ``layout`` lays it out."""
    _, offsets, _ = layout(tensors_of(program.weights))
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    for index, tensor in enumerate(model.graph.initializer):
        if recipe := program.weights.get(tensor.name):
            pointer = weight_tensor(tensor.name, recipe, location, offsets[tensor.name])
            model.graph.initializer[index].CopyFrom(pointer)
    return Program(model, program.weights)


def floating_type(program: Program) -> str:
    """The floating-point type of a rank's graph: that of its KV cache; where that holds codes, of its result."""
    names = {ONNX_DTYPES[name]: name for name in FLOATS}
    types = (value.type.tensor_type.elem_type for value in (*program.model.graph.input, *program.model.graph.output))
    return next((names[each] for each in types if each in names), "float32")


def serialize(program: Program, stem: str) -> tuple[bytes, bytes]:
    """The contents of ``stem.onnx`` and ``stem.weights.json``; the same program gives the same bytes."""
    model = point_weights_at(program, f"{stem}.safetensors").model
    recipes = {name: recipe.to_json() for name, recipe in sorted(program.weights.items())}
    return model.SerializeToString(deterministic=True), json.dumps(recipes, separators=(",", ":")).encode()


def load_program(path: Path) -> Program:
    """Reads ``NAME.onnx`` and, where there is one, ``NAME.weights.json``; no weights.

    Raises: UserError where a file is missing or is not what its name says.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except Exception as error:  # protobuf's decode errors share no base class
        raise UserError(f"{path}: is not an ONNX file: {error}") from None
    if not model.HasField("graph"):  # no bytes at all are a valid protobuf
        raise UserError(f"{path}: is not an ONNX file: it holds no graph")
    recipes = path.with_suffix(".weights.json")
    return Program(model, load_recipes(recipes)) if recipes.exists() else Program(model)


def load_recipes(path: Path) -> dict[str, Recipe]:
    """Reads ``NAME.weights.json``. Raises: UserError where it is missing, or is not what its name says."""
    try:
        data = json.loads(path.read_text())
        return {name: Recipe.from_json(recipe) for name, recipe in data.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not a table of weight recipes: {error}") from None


def check(program: Program) -> None:
    """The ONNX checker with full, strict shape inference (weights stand in by their shapes alone).

    Raises: onnx.checker.ValidationError, onnx.shape_inference.InferenceError.
    """
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    for tensor in list(model.graph.initializer):
        if tensor.name in program.weights:
            # the checker insists that an external file exists; as an input a tensor has a type and nothing else
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            model.graph.initializer.remove(tensor)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
