"""The same computation spelled in other ways, node by node, in exports of Hugging Face's models: all of it fuses all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hf_exports import Kind, exported, exported_logits, logits

from moecompiler.graph import DOMAIN, Program
from moecompiler.passes.pattern import producer_of
from moecompiler.passes.pipelines import OOTB, PLUGINS, named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.shape_inference import infer_symbolic_shapes

pytestmark = pytest.mark.xdist_group("foreign")

EAGER_ATTENTION = Kind("mixtral", attention="eager", exporter="traced")
FLOAT16 = Kind("llama", attention="eager", dtype="float16", exporter="traced")
BATCHED = Kind("mixtral")
TRACED_LOOP = Kind("mixtral", experts="eager", attention="eager", exporter="traced")
BIASED = Kind("qwen2", attention="eager", dtype="float16")


def _nodes(graph: gs.Graph, op: str, inside: str) -> list[gs.Node]:
    return [node for node in graph.nodes if node.op == op and inside in node.name]


def _constant(name: str, value: object, dtype: type = np.int64) -> gs.Constant:
    return gs.Constant(name, np.array(value, dtype))


def _put_before(graph: gs.Graph, node: gs.Node, which: int, op: str, others: list[gs.Tensor], **attrs: object) -> None:
    """A node between a node and one of its inputs."""
    made = gs.Variable(f"{node.outputs[0].name}_{op}_{which}", node.inputs[which].dtype)
    graph.nodes.append(gs.Node(op, f"{node.name}_{op}", attrs, [node.inputs[which], *others], [made]))
    node.inputs[which] = made


def rotary_by_split(graph: gs.Graph) -> None:
    for low in _nodes(graph, "Slice", "self_attn"):
        high = next(
            (n for n in _nodes(graph, "Slice", "self_attn") if n.inputs[0] is low.inputs[0] and n is not low), None
        )
        if high is None or not low.outputs or not high.outputs or len(low.inputs[0].shape) != 4:
            continue
        if np.asarray(low.inputs[1].values).item() != 0:
            low, high = high, low
        halves, x = [low.outputs[0], high.outputs[0]], low.inputs[0]
        low.outputs.clear()
        high.outputs.clear()
        graph.nodes.append(gs.Node("Split", f"{low.name}_Split", {"axis": 3, "num_outputs": 2}, [x], halves))


def negated_by_a_product(graph: gs.Graph) -> None:
    for node in _nodes(graph, "Neg", "self_attn"):
        node.op = "Mul"
        node.inputs.insert(0, _constant(f"{node.name}_minus", -1, np.float32))


def operands_the_other_way(graph: gs.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("Add", "Mul"):
            node.inputs = [node.inputs[1], node.inputs[0]]


def divided_by_the_root(graph: gs.Graph) -> None:
    for product in _nodes(graph, "MatMul", "self_attn/"):
        for node in product.outputs[0].outputs:
            if node.op == "Mul":
                node.op = "Div"
                node.inputs[1] = _constant(
                    f"{node.name}_root", 1 / np.asarray(node.inputs[1].values).item(), np.float32
                )


def softmax_in_float32(graph: gs.Graph) -> None:
    for node in _nodes(graph, "Softmax", "self_attn"):
        _put_before(graph, node, 0, "Cast", [], to=onnx.TensorProto.FLOAT)
        (reader,) = node.outputs[0].outputs
        _put_before(graph, reader, 0, "Cast", [], to=onnx.TensorProto.FLOAT16)
        node.outputs[0].dtype = np.dtype(np.float32)


def mask_without_batch_and_heads(graph: gs.Graph) -> None:
    for node in _nodes(graph, "Softmax", "self_attn"):
        added = producer_of(node.inputs[0])
        assert added is not None
        which = next(i for i in (0, 1) if added.inputs[i].shape[1] == 1)
        for _ in range(2):
            first = _constant(f"{node.name}_first_{_}", 0)
            made = gs.Variable(f"{node.name}_mask_{_}", added.inputs[which].dtype)
            graph.nodes.append(gs.Node("Gather", f"{node.name}_Mask{_}", {}, [added.inputs[which], first], [made]))
            added.inputs[which] = made


def projections_by_gemm(graph: gs.Graph) -> None:
    """As matrices of all tokens, biases included, and weights as they are stored."""
    for product in [node for node in _nodes(graph, "MatMul", "self_attn.") if "o_proj" not in node.name]:
        weight = product.inputs[1]
        flat = _constant(f"{product.name}_flat", [-1, weight.shape[0]])
        _put_before(graph, product, 0, "Reshape", [flat])
        product.op, product.attrs = "Gemm", {"alpha": 1.0, "beta": 1.0}
        product.outputs[0].shape = None
        (add,) = [each for each in product.outputs[0].outputs if each.op == "Add"]
        product.inputs.append(next(each for each in add.inputs if each is not product.outputs[0]))
        product.outputs, add.outputs = list(add.outputs), []


def numbers_by_gather(graph: gs.Graph) -> None:
    for node in _nodes(graph, "GatherND", "experts"):
        unsqueeze = producer_of(node.inputs[1])
        assert unsqueeze is not None
        node.op, node.attrs, node.inputs[1] = "Gather", {"axis": 0}, unsqueeze.inputs[0]


def tiled(graph: gs.Graph) -> None:
    for node in _nodes(graph, "Expand", "experts"):
        node.op = "Tile"


def views_by_reshape(graph: gs.Graph) -> None:
    """The size of 1 behind rows, added and removed by the shape."""
    for node in [*_nodes(graph, "Squeeze", "experts"), *_nodes(graph, "Unsqueeze", "experts")]:
        if len(node.inputs[0].shape) == 3 or (len(node.outputs[0].shape) == 3 and node.outputs[0].shape[-1] == 1):
            shape = [dim if isinstance(dim, int) else -1 for dim in node.outputs[0].shape]
            node.op, node.inputs[1] = "Reshape", _constant(f"{node.name}_shape", shape)


def not_clipped(graph: gs.Graph) -> None:
    for node in _nodes(graph, "Clip", "experts"):
        for reader in list(node.outputs[0].outputs):
            reader.inputs = [node.inputs[0] if each is node.outputs[0] else each for each in reader.inputs]


def router_by_matmul(graph: gs.Graph) -> None:
    for node in _nodes(graph, "Gemm", "gate"):
        node.op, node.attrs = "MatMul", {}
        _put_before(graph, node, 1, "Transpose", [], perm=[1, 0])


SPELLINGS = [
    (EAGER_ATTENTION, rotary_by_split),
    (EAGER_ATTENTION, negated_by_a_product),
    (EAGER_ATTENTION, operands_the_other_way),
    (EAGER_ATTENTION, divided_by_the_root),
    (EAGER_ATTENTION, mask_without_batch_and_heads),
    (FLOAT16, softmax_in_float32),
    (BIASED, projections_by_gemm),
    (BATCHED, operands_the_other_way),
    (BATCHED, numbers_by_gather),
    (BATCHED, tiled),
    (BATCHED, views_by_reshape),
    (BATCHED, not_clipped),
    (BATCHED, router_by_matmul),
    (TRACED_LOOP, operands_the_other_way),
]


@pytest.mark.parametrize(("kind", "respell"), SPELLINGS, ids=lambda each: str(getattr(each, "__name__", each)))
def test_another_spelling_fuses_too(kind: Kind, respell: Callable[[gs.Graph], None]) -> None:
    foreign = exported(kind)
    tidy = run_passes(named_pipelines()[OOTB], foreign.program)[0]
    graph = gs.import_onnx(tidy.model)
    respell(graph)
    graph.cleanup().toposort()
    respelled = Program(infer_symbolic_shapes(gs.export_onnx(graph, do_type_check=False)), tidy.weights)
    assert respelled.model.graph != tidy.model.graph
    fused, results = run_passes(named_pipelines()[PLUGINS], respelled)
    assert not any(result.missed for result in results)
    ops = Counter(node.op_type for node in fused.model.graph.node if node.domain == DOMAIN)
    assert ops["ContextAttention"] == kind.layers
    assert ops["MoE"] == (kind.layers if kind.model == "mixtral" else 0)
    assert next(result for result in results if result.name == "merge-qkv").matches == kind.layers
    tolerance = 2e-2 if kind.dtype == "float16" else 2e-5
    before, after = (logits(program, foreign.reader, (2, 7)) for program in (respelled, fused))
    np.testing.assert_allclose(before, exported_logits(kind, (2, 7)), atol=tolerance, rtol=0)
    np.testing.assert_allclose(after, before, atol=tolerance, rtol=0)
