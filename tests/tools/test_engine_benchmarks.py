"""What of the engines' benchmarks can be tested without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.tensorrt_program import prepare
from moecompiler.config import PRESETS
from moecompiler.graph import ONNX_DTYPES
from moecompiler.plugin_switches import parse_plugins
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.plugins.tactics import tactics
from moecompiler.tools import (
    bench_engine_attention,
    bench_engine_build,
    bench_engine_decode,
    bench_engine_moe,
    bench_engine_overhead,
    bench_engine_quantized_moe,
)
from moecompiler.tools.bench_engine_build import first_layers
from moecompiler.tools.bench_engine_decode import bytes_of_a_step, experts_hit
from moecompiler.tools.bench_moe import LAYERS, Layer
from moecompiler.tools.one_node_program import one_node, profile, take_codes_as_bytes
from moecompiler.tools.quantized_layers import FORMATS, QuantizedLayer
from moecompiler.weights import whole


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.parametrize(
    ("benchmark", "more"),
    [
        (bench_engine_moe, []),
        (bench_engine_quantized_moe, []),
        (bench_engine_attention, []),
        (bench_engine_overhead, []),
        (bench_engine_build, []),
        (bench_engine_decode, ["engines"]),
    ],
)
def test_without_a_gpu_a_benchmark_says_so(
    benchmark: Any, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main([str(tmp_path / "rows.json"), *more])
    assert end.value.code == 2
    assert "there is none here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_moe_is_a_plugin_of_the_layers_sizes(layer: Layer) -> None:
    """The engine's inputs have the shapes that tactics are looked up by, and that weights come in."""
    spec, sizes = bench_engine_moe.SPEC, bench_engine_moe.sizes_of(layer)
    program = one_node(spec, bench_engine_moe.ATTRIBUTES, sizes, "bfloat16")
    dims = [[dim.dim_value or -1 for dim in v.type.tensor_type.shape.dim] for v in program.model.graph.input]
    assert dims[2:4] == [
        [layer.local, 2 * layer.intermediate, layer.hidden],
        [layer.local, layer.hidden, layer.intermediate],
    ]
    assert {v.type.tensor_type.elem_type for v in program.model.graph.output} == {ONNX_DTYPES["bfloat16"]}
    assert tactics("MoE", bench_engine_moe.ATTRIBUTES, tuple(map(tuple, dims)), "bfloat16", 90)
    assert profile(spec, sizes, ({"tokens": 16},) * 3) == {"x": ((16, layer.hidden),) * 3}


@pytest.mark.parametrize(
    ("kind", "block"), [("int8", 0), ("int4", 64), ("int4_asymmetric", 64), ("fp8", 0), ("nvfp4", 16)]
)
def test_quantized_moe_is_a_plugin_that_gets_bytes(kind: str, block: int) -> None:
    """The engine's inputs have the shapes and types of what is bound to them, and all but the tokens is known."""
    layer = QuantizedLayer(FORMATS[kind], 256, 128, block, device="cpu")
    spec, sizes = bench_engine_quantized_moe.spec_of(layer), bench_engine_quantized_moe.sizes_of(layer)
    program = bench_engine_quantized_moe.program_of(layer)
    onnx.checker.check_model(program.model)
    settings = BuildSettings(EngineLimits(1, 1, 2, 1), parse_plugins("on"))
    prepared = prepare(program, settings, "float16", 90, TensorRTPlugins())
    assert list(prepared.plugins.values()) == [layer.op]
    take_codes_as_bytes(prepared.program.model)
    given = {value.name: value.type.tensor_type for value in prepared.program.model.graph.input}
    tensors = layer.inputs(torch.zeros(3, 256, dtype=torch.float16))
    for name, tensor in zip([value.name for value in spec.inputs], tensors, strict=True):
        assert [dim.dim_value or 3 for dim in given[name].shape.dim] == list(tensor.shape), name
        assert given[name].elem_type == ONNX_DTYPES[str(tensor.dtype).removeprefix("torch.")], name
    assert profile(spec, sizes, ({"tokens": 16},) * 3) == {"x": ((16, 256),) * 3}


def test_overheads_chain_is_what_its_reference_is() -> None:
    x, weight = torch.randn(1, 1, 128), torch.randn(128).sign()
    once = bench_engine_overhead.expected(x, weight, 1)
    torch.testing.assert_close(bench_engine_overhead.expected(x, weight, 41), once, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bench_engine_overhead.expected(x, weight, 40), weight * once, rtol=1e-3, atol=1e-3)


def test_bytes_of_a_decode_step() -> None:
    """Four layers of 8x7B and the head, one sequence: 744 µs at 4.59 TB/s."""
    model = PRESETS["8x7b"].with_layers(4)
    small = bytes_of_a_step(model, "float16", 1, 128)
    assert 1e6 * small / 4.59e12 == pytest.approx(744, abs=2)
    layer = 2 * 4096 * 14336 * 3 * 2  # the two experts of a token, in float16
    more = bytes_of_a_step(PRESETS["8x7b"].with_layers(5), "float16", 1, 128)
    assert layer < more - small < 1.15 * layer
    assert bytes_of_a_step(model, "float16", 1, 1128) - small == 2 * 2 * 4 * 1000 * 8 * 128


@pytest.mark.parametrize(("tokens", "hit"), [(0, 0), (1, 2), (1000, 8)])
def test_experts_hit(tokens: int, hit: float) -> None:
    assert experts_hit(tokens, 8, 2) == pytest.approx(hit)


def test_experts_hit_by_several_tokens() -> None:
    rng = np.random.default_rng(0)
    drawn = [len(np.unique([rng.permutation(8)[:2] for _ in range(3)])) for _ in range(4000)]
    assert experts_hit(3, 8, 2) == pytest.approx(np.mean(drawn), abs=0.1)


def test_weights_of_the_first_layers() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1, 10) for part in ("gate_up_proj", "down_proj")
    ]
    bound = {name: whole(name, "float16", (2, 2)) for name in names}
    assert list(first_layers(bound, 2)) == names[:4]
