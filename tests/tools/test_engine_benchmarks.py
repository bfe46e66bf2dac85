"""What of the engines' benchmarks can be tested without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moecompiler.config import PRESETS
from moecompiler.graph import ONNX_DTYPES
from moecompiler.plugins.tactics import tactics
from moecompiler.tools import (
    bench_engine_attention,
    bench_engine_build,
    bench_engine_decode,
    bench_engine_moe,
    bench_engine_overhead,
)
from moecompiler.tools.bench_engine_build import first_layers
from moecompiler.tools.bench_engine_decode import bytes_of_a_step, experts_hit
from moecompiler.tools.bench_moe import LAYERS, Layer
from moecompiler.tools.one_node_program import one_node, profile
from moecompiler.weights import whole


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.parametrize(
    ("benchmark", "more"),
    [
        (bench_engine_moe, []),
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
