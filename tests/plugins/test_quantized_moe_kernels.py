"""The kernels of quantized MoE ops, run by Triton's interpreter, compute what the ops' bodies do in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from interpreted import interpret, interpreter
from onnx import TensorProto, helper
from opmodels import op_model

from moecompiler.config import NormalizationMode
from moecompiler.graph import ONNX_DTYPES
from moecompiler.plugins.quantized.moe import quantized_moe_spec
from moecompiler.plugins.quantized.moe_compiled import FewTile, ManyTile, OneTile
from moecompiler.plugins.quantized.moe_launch import QuantizedMoETactic, tactics
from moecompiler.plugins.quantized.moe_node import moe_forms
from moecompiler.tools.quantized_layers import QuantizedLayer

KINDS = [
    ("Int8", 0),
    ("Fp8", 0),
    ("Nvfp4", 16),
    ("Int4", 32),
    ("Int4", 48),
    ("Int4Asymmetric", 32),
    ("Int4Asymmetric", 48),
    ("Int4Rows", 0),
    ("Int4AsymmetricRows", 0),
]


@pytest.fixture(scope="module")
def interpreting() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as pool:
        yield pool


def by_body(layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
    """The op's body in ONNX Runtime: codes are constants, int4 and E4M3 what they are in a graph."""
    form = moe_forms()[layer.op]
    mode = NormalizationMode(layer.attributes["normalization_mode"])
    spec = quantized_moe_spec(mode, layer.attributes["top_k"], form)
    model, feeds = op_model(spec, dict(layer.attributes), TensorProto.FLOAT16), {}
    types = {"int4": TensorProto.INT4, "T": TensorProto.FLOAT16} | ONNX_DTYPES
    given = zip(spec.inputs, layer.inputs(x), layer.dims(len(x)), strict=True)
    for value, tensor, shape in given:
        if value.name.startswith(("gate_up_", "down_")) and "input_scales" not in value.name:
            raw = tensor.numpy().tobytes()
            model.graph.initializer.append(helper.make_tensor(value.name, types[value.type], shape, raw, raw=True))
            del model.graph.input[[each.name for each in model.graph.input].index(value.name)]
        else:
            feeds[value.name] = tensor.numpy()
    return torch.from_numpy(np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]))


def layer_of(kind: str, block: int, **changes: object) -> QuantizedLayer:
    small = {"hidden": 96, "intermediate": 192, "experts": 5, "expert_ids": (3, 0, 2), "device": "cpu"}
    return QuantizedLayer(kind, block=block, **small | changes)  # type: ignore[arg-type]


def tactic_of(layer: QuantizedLayer, sm: int = 80) -> QuantizedMoETactic:
    name = str(layer.dtype).removeprefix("torch.")
    return tactics(layer.op, layer.attributes, layer.dims(-1), name, sm)[0]


def run(pool: ProcessPoolExecutor, layer: QuantizedLayer, x: torch.Tensor, tactic: QuantizedMoETactic) -> torch.Tensor:
    name, output = str(layer.dtype).removeprefix("torch."), torch.full_like(x, float("nan"))
    arguments = (layer.op, layer.attributes, name, layer.inputs(x), [output], tactic, layer.dims(len(x)))
    (got,) = pool.submit(interpret, *arguments).result()
    return got


def assert_close(layer: QuantizedLayer, got: torch.Tensor, want: torch.Tensor) -> None:
    """FP8 itself is off by 3e-2: where float16 rounds otherwise, now and then another of two E4M3 neighbours is taken."""
    bound = 1e-2 if layer.kind == "Fp8" else 3e-3
    error = (got.float() - want.float()).norm()
    assert error <= bound * want.float().norm() + 1e-6, f"off by {error / want.float().norm():.1e}"


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("kind", "block"), KINDS)
def test_few_tokens(interpreting: ProcessPoolExecutor, kind: str, block: int, tokens: int) -> None:
    """Rows end within a tile. Of one token, an expert may be another rank's; of three, sums over F are in two parts."""
    torch.manual_seed(tokens)
    layer, x = layer_of(kind, block), torch.randn(tokens, 96).half()
    tactic = tactic_of(layer)
    small = FewTile(16, columns=64, parts=2) if tokens > 1 else OneTile(8, 64, row_bytes=64)
    tactic = replace(tactic, ways=(small,))
    want = by_body(layer, x)
    assert_close(layer, run(interpreting, layer, x, tactic), want)
    assert_close(layer, layer.expected(x), want)  # what GPU tests hold kernels to


@pytest.mark.parametrize(("kind", "block"), KINDS)
def test_many_tokens(interpreting: ProcessPoolExecutor, kind: str, block: int) -> None:
    """Sorted by expert, some tiles of rows partly full."""
    torch.manual_seed(0)
    layer, x = layer_of(kind, block, top_k=3), torch.randn(19, 96).half()
    tactic = replace(tactic_of(layer), ways=(ManyTile(0, 16, 64, 64),))
    assert_close(layer, run(interpreting, layer, x, tactic), by_body(layer, x))


def test_all_tokens_on_one_expert(interpreting: ProcessPoolExecutor) -> None:
    """And none on the others."""
    layer = layer_of("Int4", 32, top_k=1)
    layer.router[2] = 2.0
    x = torch.randn(17, 96).abs().half()
    for ways in ((FewTile(32, columns=64),), (ManyTile(0, 16, 64, 64),)):
        assert_close(layer, run(interpreting, layer, x, replace(tactic_of(layer), ways=ways)), by_body(layer, x))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Int8", {"hidden": 40}),  # rows of 40 bytes
        ("Int4Rows", {"hidden": 48}),
        ("Int8", {"dtype": torch.float32}),
    ],
)
def test_what_has_no_kernels(kind: str, sizes: dict[str, object]) -> None:
    """The op's body runs then."""
    layer = layer_of(kind, 0, **sizes)
    assert tactics(layer.op, layer.attributes, layer.dims(-1), str(layer.dtype).removeprefix("torch."), 90) == ()
    assert tactic_of(layer_of("Int8", 0)).kernels
