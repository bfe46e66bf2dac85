"""Times one MoE layer of Mixtral-8x7B's size inside TensorRT engines, as a plugin and as its body: routing, experts, combine.

    python -m moecompiler.tools.bench_engine_moe [--tokens 1,16,64] [--dtype float16] [--json FILE]

Each number of tokens has an optimization profile of its own; a run is one launch of a CUDA graph, of which the median is taken.
``floor``: reading once the weights of the experts hit, at the bandwidth of a large copy measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from moecompiler.graph import DOMAIN, IR_VERSION, OPSET, Program
from moecompiler.ops import add_function
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.weights import NUMPY_DTYPES

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 4096, 14336, 8, 2
_ONNX = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_COPIED = 4 << 30  # bytes


def layer(dtype: str) -> Program:
    """The op alone; its weights are inputs, so that nothing of them is in the plan."""
    from moecompiler.config import NormalizationMode

    spec, kind = moe_spec(NormalizationMode.RENORMALIZE, TOP_K), _ONNX[dtype]
    shapes = {
        "x": ["tokens", HIDDEN],
        "router": [EXPERTS, HIDDEN],
        "gate_up": [EXPERTS, 2 * INTERMEDIATE, HIDDEN],
        "down": [EXPERTS, HIDDEN, INTERMEDIATE],
    }
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    inputs.append(helper.make_tensor_value_info("expert_ids", TensorProto.INT64, [EXPERTS]))
    node = helper.make_node(
        "MoE", [*shapes, "expert_ids"], ["y"], "model/MoE", domain=DOMAIN, top_k=TOP_K, normalization_mode=1
    )
    graph = helper.make_graph([node], "layer", inputs, [helper.make_tensor_value_info("y", kind, shapes["x"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    add_function(model, spec)
    return Program(model)


def feeds(tokens: int, dtype: str) -> dict[str, np.ndarray]:
    """Normal values; a block of rows, again and again, makes the weights."""
    rng = np.random.default_rng(tokens)

    def normal(*shape: int) -> np.ndarray:
        columns = shape[-1]
        block = (rng.standard_normal((997, columns), np.float32) * columns**-0.5).astype(NUMPY_DTYPES[dtype])
        rows = int(np.prod(shape[:-1]))
        return np.resize(block, (rows, columns)).reshape(shape)

    x = rng.standard_normal((tokens, HIDDEN), np.float32).astype(NUMPY_DTYPES[dtype])
    ids = np.arange(EXPERTS, dtype=np.int64)
    weights = normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN), normal(EXPERTS, HIDDEN, INTERMEDIATE)
    return {"x": x, "router": normal(EXPERTS, HIDDEN), "gate_up": weights[0], "down": weights[1], "expert_ids": ids}


def experts_hit(given: dict[str, np.ndarray]) -> int:
    logits = given["x"].astype(np.float32) @ given["router"].astype(np.float32).T
    return len(np.unique(np.argsort(-logits, axis=1)[:, :TOP_K]))


def bandwidth() -> float:
    """Bytes a second that a large copy on the GPU reads and writes."""
    from moecompiler.runtime.device import Buffer, Stream, Timer, checked, driver

    source, target, stream, timer = Buffer(_COPIED), Buffer(_COPIED), Stream(), Timer()
    seconds = []
    for _ in range(6):
        with timer.around(stream):
            checked(driver().cuMemcpyDtoDAsync(target.pointer, source.pointer, _COPIED, stream.handle))
        seconds.append(timer.seconds())
    return 2 * _COPIED / min(seconds)


def measure(tokens: Sequence[int], dtype: str, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each number of tokens: microseconds of each kind (``on``: the plugin, ``off``: the body) and of the floor."""
    from moecompiler.runtime.device import Device
    from moecompiler.tools.one_node import Runner, Shapes, build

    device = Device()
    speed = bandwidth()
    rows: list[dict[str, Any]] = [{"tokens": count} for count in tokens]
    profiles: list[Shapes] = [{"x": ((count, HIDDEN), (count, HIDDEN), (count, HIDDEN))} for count in tokens]
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            engine = build(layer(dtype), profiles, kind, dtype, Path(folder))
        for index, row in enumerate(rows):
            given = feeds(row["tokens"], dtype)
            expert = 3 * HIDDEN * INTERMEDIATE * NUMPY_DTYPES[dtype].itemsize
            row["experts"] = experts_hit(given)
            row["floor"] = row["experts"] * expert / speed * 1e6
            runner = Runner(engine.plan.data, engine.aliases, index)
            runner(given)
            row[kind] = runner.time(runs=20, inner=10) * 1e6
            print(kind, {key: round(value, 1) for key, value in row.items()}, flush=True)
    return [row | {"gpu": device.info().name, "bandwidth_TB_s": speed / 1e12} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    parser.add_argument("--dtype", choices=_ONNX, default="float16")
    parser.add_argument("--plugins", default="on,off", help="on, off or both")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = [int(word) for word in options.tokens.split(",")]
    rows = measure(counts, options.dtype, options.plugins.split(","))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
