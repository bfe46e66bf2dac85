"""Plugins in TensorRT engines compute what their ops' bodies compute, at irregular shapes, and run where Triton cannot be
imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecompiler.config import NormalizationMode
from moecompiler.ops import OpSpec
from moecompiler.plugins.attention.op import ATTENTION
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM, RMS_NORM
from moecompiler.tools.one_node_program import one_node, profile
from moecompiler.weights import NUMPY_DTYPES

pytestmark = pytest.mark.gpu
# relative error of a row against the body in float32
BOUNDS = {"float16": 5e-3, "bfloat16": 4e-2}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS)


def body_float32(
    spec: OpSpec, attributes: Mapping[str, Any], sizes: Mapping[str, int], feeds: Mapping[str, np.ndarray]
) -> Any:
    """The body in ONNX Runtime, in float32 on the same values."""
    import onnxruntime

    session = onnxruntime.InferenceSession(one_node(spec, attributes, sizes, "float32").model.SerializeToString())
    wide = {name: array if array.dtype == np.int64 else array.astype(np.float32) for name, array in feeds.items()}
    return dict(zip([value.name for value in spec.outputs], session.run(None, wide), strict=True))


def ranges(spec: OpSpec, sizes: Mapping[str, int], largest: Mapping[str, int]) -> dict[str, Any]:
    """A profile from 1 to ``largest`` of every free dim."""
    least, typical = dict.fromkeys(largest, 1), {name: max(1, size // 2) for name, size in largest.items()}
    return profile(spec, sizes, (least, typical, largest))


def error(got: np.ndarray, wanted: np.ndarray, outliers: float) -> float:
    """The relative error ``‖a - b‖ / ‖b‖`` of the worst row, but for a share of outliers."""
    got = got.astype(np.float64).reshape(-1, got.shape[-1])
    wanted = wanted.reshape(got.shape)
    assert np.isfinite(got).all()
    errors = np.linalg.norm(got - wanted, axis=-1) / np.maximum(np.linalg.norm(wanted, axis=-1), 1e-6)
    return float(np.quantile(errors, 1 - outliers, method="lower"))


def check(
    spec: OpSpec,
    attributes: Mapping[str, Any],
    sizes: Mapping[str, int],
    largest: Mapping[str, int],
    cases: list[dict[str, np.ndarray]],
    dtype: str,
    directory: Path,
    outliers: float = 0.0,
    switches: str = "on",
) -> None:
    from moecompiler.tools.one_node import Runner, build

    engine = build(one_node(spec, attributes, sizes, dtype), [ranges(spec, sizes, largest)], switches, dtype, directory)
    runner = Runner(engine.plan.data, engine.aliases)
    for feeds in cases:
        rounded = {n: a if a.dtype == np.int64 else a.astype(NUMPY_DTYPES[dtype]) for n, a in feeds.items()}
        wanted = body_float32(spec, attributes, sizes, rounded)
        got = runner(rounded)
        errors = {name: error(got[name], wanted[name], outliers) for name in wanted}
        assert max(errors.values()) < BOUNDS[dtype], (errors, {n: a.shape for n, a in feeds.items()})


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed + sum(shape)).standard_normal(shape)).astype(np.float32)


@DTYPES
@pytest.mark.parametrize("spec", [RMS_NORM, ADD_RMS_NORM], ids=lambda spec: spec.name)
def test_norms(spec: OpSpec, dtype: str, tmp_path: Path) -> None:
    sizes = {"hidden": 4096}
    cases = [
        {
            v.name: normal(*((4096,) if v.name == "weight" else (batch, length, 4096)), seed=i)
            for i, v in enumerate(spec.inputs)
        }
        for batch, length in ((1, 1), (3, 17), (2, 129))
    ]
    check(spec, {"epsilon": 1e-5}, sizes, {"batch": 4, "sequence": 256}, cases, dtype, tmp_path)


def moe_case(
    tokens: int, hidden: int, inner: int, experts: int, local: int, drawn: Mapping[int, float] | None = None
) -> dict[str, np.ndarray]:
    """``drawn``: what is added to the logits of some experts, for all tokens."""
    x, router = normal(tokens, hidden), normal(experts, hidden, scale=hidden**-0.5)
    if drawn:
        x[:, 0] = 1.0
        router[list(drawn), 0] = list(drawn.values())
    return {
        "x": x,
        "router": router,
        "gate_up": normal(local, 2 * inner, hidden, scale=hidden**-0.5),
        "down": normal(local, hidden, inner, scale=inner**-0.5),
        "expert_ids": np.arange(experts - local, experts, dtype=np.int64),
    }


ROUTED = [
    pytest.param(0, 1, 8, 8, id="softmax-top1-of-8"),
    pytest.param(0, 3, 5, 5, id="softmax-top3-of-5"),
    pytest.param(1, 2, 8, 8, id="renormalized-top2-of-8"),
    pytest.param(1, 3, 5, 5, id="renormalized-top3-of-5"),
    pytest.param(1, 2, 8, 4, id="renormalized-top2-of-8-half-here"),
    pytest.param(2, 1, 5, 5, id="sparse_mixer-top1-of-5"),
    pytest.param(2, 2, 8, 8, id="sparse_mixer-top2-of-8"),
]


@DTYPES
@pytest.mark.parametrize(("mode", "top_k", "experts", "local"), ROUTED)
def test_moe(mode: int, top_k: int, experts: int, local: int, dtype: str, tmp_path: Path) -> None:
    """All ways of routing, an odd number of experts, a rank that holds half of them, all tokens on one expert, experts without
    a token. Where two experts score alike, rounded logits choose otherwise than the reference's."""
    hidden, inner = 256, 512
    spec = moe_spec(NormalizationMode(mode), top_k)
    sizes = {
        "hidden": hidden,
        "intermediate": inner,
        "twice_intermediate": 2 * inner,
        "experts": experts,
        "local_experts": local,
    }
    shape = hidden, inner, experts, local
    cases = [moe_case(tokens, *shape) for tokens in (1, 3, 17, 129, 300)]
    if local == experts:
        cases.append(moe_case(65, *shape, drawn={0: 30.0}))
    cases.append(moe_case(129, *shape, drawn={experts - 2: -30.0, 1: -30.0}))
    attributes = {"top_k": top_k, "normalization_mode": mode}
    check(spec, attributes, sizes, {"tokens": 512}, cases, dtype, tmp_path, outliers=0.02)


def test_moe_body(tmp_path: Path) -> None:
    """With plugins off, weights as inputs."""
    sizes = {"hidden": 128, "intermediate": 256, "twice_intermediate": 512, "experts": 5, "local_experts": 5}
    attributes = {"top_k": 3, "normalization_mode": 1}
    cases = [moe_case(tokens, 128, 256, 5, 5) for tokens in (1, 17)]
    spec = moe_spec(NormalizationMode.RENORMALIZE, 3)
    check(spec, attributes, sizes, {"tokens": 64}, cases, "float16", tmp_path, outliers=0.02, switches="off")


def attention_case(
    batch: int, length: int, first: int, slots: int, heads: int, kv_heads: int, dim: int
) -> dict[str, np.ndarray]:
    angles = normal(batch, 1, length, dim)
    starts = first + np.arange(batch) % 3
    return {
        "query": normal(batch, length, heads * dim),
        "key": normal(batch, length, kv_heads * dim, seed=1),
        "value": normal(batch, length, kv_heads * dim, seed=2),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "position_ids": (starts[:, None] + np.arange(length)).astype(np.int64),
        "past_key": normal(batch, kv_heads, slots, dim, seed=3),
        "past_value": normal(batch, kv_heads, slots, dim, seed=4),
    }


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(8, 2, 128, 0), (4, 4, 64, 0), (6, 2, 96, 20)])
def test_attention(heads: int, kv_heads: int, dim: int, window: int, dtype: str, tmp_path: Path) -> None:
    """Prefill, ragged later tokens, decode; caches written in place."""
    slots = 160
    sizes = {
        "query_size": heads * dim,
        "key_size": kv_heads * dim,
        "head_dim": dim,
        "kv_heads": kv_heads,
        "slots": slots,
    }
    shape = (slots, heads, kv_heads, dim)
    cases = [attention_case(*each, *shape) for each in ((1, 129, 0), (3, 17, 5), (2, 1, 100), (4, 1, 0), (3, 1, 157))]
    attributes = {"num_heads": heads, "num_kv_heads": kv_heads, "scale": dim**-0.5, "window": window}
    check(ATTENTION, attributes, sizes, {"batch": 4, "sequence": 129}, cases, dtype, tmp_path)


def test_body(tmp_path: Path) -> None:
    """With plugins off."""
    sizes, spec = {"query_size": 256, "key_size": 128, "head_dim": 64, "kv_heads": 2, "slots": 40}, ATTENTION
    attributes = {"num_heads": 4, "num_kv_heads": 2, "scale": 0.125, "window": 0}
    cases = [attention_case(*each, 40, 4, 2, 64) for each in ((3, 17, 5), (2, 1, 30))]
    check(spec, attributes, sizes, {"batch": 4, "sequence": 20}, cases, "float16", tmp_path, switches="off")


def test_runs_without_triton(tmp_path: Path) -> None:
    """An engine holds its kernels: a fresh process in which importing Triton fails runs it."""
    from moecompiler.tools.one_node import Runner, build

    feeds = {"x": normal(2, 5, 512).astype(np.float16), "weight": normal(512).astype(np.float16)}
    sizes = {"hidden": 512}
    shapes = ranges(RMS_NORM, sizes, {"batch": 4, "sequence": 8})
    engine = build(one_node(RMS_NORM, {"epsilon": 1e-5}, sizes, "float16"), [shapes], "on", "float16", tmp_path)
    (tmp_path / "node.plan").write_bytes(engine.plan.data)
    np.savez(tmp_path / "feeds.npz", **feeds)
    code = f"""
import sys
sys.modules["triton"] = None
import numpy as np
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.tools.one_node import Runner
TensorRTPlugins().register()
runner = Runner(open({str(tmp_path / "node.plan")!r}, "rb").read(), {{}})
np.save({str(tmp_path / "y.npy")!r}, runner(dict(np.load({str(tmp_path / "feeds.npz")!r})))["y"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), Runner(engine.plan.data, {})(feeds)["y"])
