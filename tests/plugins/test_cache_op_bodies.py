"""Attention over a cache of codes computes what torch does with its own FP8 type, and with integers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx.inliner
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from opmodels import op_model, run_op

from moecompiler.plugins.attention.cache_op import ATTENTION_SPECS, cache_spec
from moecompiler.quantization.cache import CacheQuantization, decode_cache, encode_cache
from moecompiler.quantization.schemes import Format

SLOTS = 19


def codes_of(x: torch.Tensor, scale: float, form: Format) -> torch.Tensor:
    """By torch's own cast, or its own rounding."""
    if form is Format.INT8:
        return (x.float() / scale).round().clamp(-127, 127).to(torch.int8)
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def attend(
    inputs: list[torch.Tensor], heads: int, form: Format, window: int, fp8_context: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Straight after the documentation of ``cache_op``, head by head: the output, and the numbers in the caches."""
    query, key, value, cos, sin, positions, past_key, past_value, key_scales, value_scales = inputs
    batch, kv_heads, slots, dim = past_key.shape
    q, k, v = (x.view(batch, x.shape[1], -1, dim).transpose(1, 2) for x in (query, key, value))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    caches = []
    for new, past, scales in ((k, past_key, key_scales), (v, past_value, value_scales)):
        steps = past if form is Format.INT8 else past.view(torch.float8_e4m3fn)
        steps = steps.float()
        for b in range(batch):
            steps[b, :, positions[b]] = codes_of(new[b], float(scales), form).float()
        caches.append(steps * scales.float())
    rounded = fp8_context and q.shape[2] > 1
    q = q.to(torch.float8_e4m3fn).to(q.dtype) if rounded else q
    output = torch.empty(batch, heads, q.shape[2], dim)
    for b in range(batch):
        for h in range(heads):
            keys, values = (cache[b, h // (heads // kv_heads)] for cache in caches)
            slot, own = torch.arange(slots), positions[b][:, None]
            seen = (slot <= own) & ((slot > own - window) | torch.tensor(window <= 0))
            scores = (q[b, h].float() @ keys.T * dim**-0.5).masked_fill(~seen, float("-inf"))
            highest = (scores.max(-1, keepdim=True).values / np.log(2)).ceil()
            powers = torch.exp2(scores / np.log(2) - highest)
            total = powers.sum(-1, keepdim=True)
            if rounded:
                powers = (256 * powers).to(torch.float8_e4m3fn).float() / 256
            output[b, h] = powers / total @ values
    return output.transpose(1, 2).reshape(batch, q.shape[2], -1), caches


def random_inputs(
    first: list[int], length: int, heads: int, kv_heads: int, dim: int, form: Format
) -> list[torch.Tensor]:
    torch.manual_seed(length)
    batch, scales = len(first), (0.0123, 0.25) if form is Format.E4M3 else (0.023, 0.025)
    rows = [2 * torch.randn(batch, length, n * dim) for n in (heads, kv_heads, kv_heads)]
    angles = torch.randn(batch, 1, length, dim)
    past = torch.randn(2, batch, kv_heads, SLOTS, dim)
    bits = [codes_of(each, scale, form).view(torch.int8) for each, scale in zip(past, scales, strict=True)]
    positions = torch.tensor(first)[:, None] + torch.arange(length)
    return [*rows, angles.cos(), angles.sin(), positions, *bits, *(torch.tensor([scale]) for scale in scales)]


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("first", "length"), [([0, 4, 18], 1), ([3, 0], 6)])
@pytest.mark.parametrize(("form", "context"), [(Format.INT8, False), (Format.E4M3, False), (Format.E4M3, True)])
def test_body(form: Format, context: bool, first: list[int], length: int, window: int) -> None:
    inputs = random_inputs(first, length, 4, 2, 8, form)
    attributes = {"num_heads": 4, "num_kv_heads": 2, "scale": 8**-0.5, "window": window}
    got, *caches = run_op(cache_spec(form, context), attributes, *inputs)
    want, wanted_caches = attend(inputs, 4, form, window, context)
    for cache, wanted, scale in zip(caches, wanted_caches, inputs[8:], strict=True):
        assert cache.dtype == np.int8
        np.testing.assert_array_equal(decode_cache(cache, float(scale), form), wanted)
    np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize("floats", [np.float32, np.float16])
@pytest.mark.parametrize("form", [Format.INT8, Format.E4M3])
def test_every_code_is_written_and_kept(form: Format, floats: type) -> None:
    """All numbers between -1.1 and 1.1 times the largest, finely: ties, subnormal numbers and what saturates. What is there
    already stays, bit for bit, whatever its code."""
    largest = 448.0 if form is Format.E4M3 else 127.0
    steps = np.linspace(-1.1 * largest, 1.1 * largest, 1 << 14)
    numbers = np.concatenate([steps, steps / 2**9, steps / 2**15]).astype(floats)
    every = np.arange(-127, 127).astype(np.int8)
    scale = np.array([0.5], floats)
    new = (numbers * scale).astype(floats).reshape(1, 1, -1)
    dim = new.size
    past = np.zeros((1, 1, 3, dim), np.int8)
    past[0, 0, 0, : every.size] = every
    angles = np.ones((1, 1, 1, dim), floats)
    inputs = [np.zeros((1, 1, dim), floats), new, new, angles, 0 * angles, np.array([[1]]), past, past, scale, scale]
    attributes = {"num_heads": 1, "num_kv_heads": 1, "scale": 1.0, "window": 0}
    _, keys, values = run_op(cache_spec(form), attributes, *inputs)
    codes = (new.astype(np.float32) / 0.5).reshape(-1)
    if form is Format.E4M3:
        want = np.clip(codes, -largest, largest).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    else:
        want = np.clip(np.rint(codes), -127, 127)
    for cache in (keys, values):
        np.testing.assert_array_equal(cache[0, 0, 0], past[0, 0, 0])
        np.testing.assert_array_equal(decode_cache(cache[0, 0, 1], 1.0, form), want)
    np.testing.assert_array_equal(decode_cache(encode_cache(new, 0.5, form).reshape(-1), 1.0, form), want)


@pytest.mark.parametrize("spec", ATTENTION_SPECS, ids=lambda spec: spec.name)
def test_bodies_by_another_evaluator(spec: object) -> None:
    """ONNX's own."""
    form = Format.INT8 if "Int8" in spec.name else Format.E4M3  # type: ignore[attr-defined]
    inputs = [np.asarray(each) for each in random_inputs([2], 3, 2, 1, 4, form)]
    attributes = {"num_heads": 2, "num_kv_heads": 1, "scale": 0.5, "window": 0}
    model = onnx.inliner.inline_local_functions(op_model(spec, attributes))  # type: ignore[arg-type]
    feeds = dict(zip((value.name for value in model.graph.input), inputs, strict=True))
    for got, want in zip(ReferenceEvaluator(model).run(None, feeds), run_op(spec, attributes, *inputs), strict=True):  # type: ignore[arg-type]
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_as_json() -> None:
    cache = CacheQuantization(Format.E4M3, ((0.5, 1.0), (0.25, 2.0)), True)
    assert CacheQuantization.from_json(cache.to_json()) == cache
    assert str(cache) == "fp8, FP8 attention in prefill"
