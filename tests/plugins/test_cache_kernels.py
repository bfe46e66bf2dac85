"""Attention's kernels over a cache of codes, run by Triton's interpreter, compute what the op's body does in ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from interpreted import interpret, interpreter
from opmodels import run_op

from moecompiler.plugins.attention.cache_op import cache_spec
from moecompiler.plugins.compile import compile_kernel
from moecompiler.plugins.hopper.compile import compile_image
from moecompiler.plugins.launch import AnyKernel, CudaKernel, Dims, Input, Launch, Output
from moecompiler.plugins.tactics import tactics
from moecompiler.quantization.cache import decode_cache, encode_cache
from moecompiler.quantization.schemes import Format


@pytest.fixture(scope="module")
def interpreting() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as pool:
        yield pool


def attention_inputs(
    first: list[int], length: int, heads: int, kv_heads: int, head_dim: int, slots: int, form: Format
) -> list[torch.Tensor]:
    """Half precision; some of the new keys and values saturate."""
    torch.manual_seed(length)
    batch = len(first)
    scales = (0.01, 0.004) if form is Format.E4M3 else (0.02, 0.015)
    rows = [torch.randn(batch, length, n * head_dim).half() for n in (heads, kv_heads, kv_heads)]
    # quarter turns, which every arithmetic does exactly: no rounding before the one to codes
    angles = torch.randint(4, (batch, 1, length, head_dim)) * (torch.pi / 2)
    past = [
        torch.from_numpy(encode_cache(torch.randn(batch, kv_heads, slots, head_dim).numpy(), scale, form))
        for scale in scales
    ]
    positions = torch.tensor(first)[:, None] + torch.arange(length)
    return [
        *rows,
        angles.cos().round().half(),
        angles.sin().round().half(),
        positions,
        *past,
        *(torch.tensor([s]).half() for s in scales),
    ]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "first", "length", "window"),
    [
        (4, 2, 64, [3, 0, 69], 1, 0),
        (3, 1, 48, [7, 68], 1, 5),
        (4, 2, 64, [0, 0], 17, 0),
        (3, 1, 96, [70, 1], 3, 5),
    ],
)
@pytest.mark.parametrize(("form", "context"), [(Format.INT8, False), (Format.E4M3, False), (Format.E4M3, True)])
def test_attention(
    interpreting: ProcessPoolExecutor,
    form: Format,
    context: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    first: list[int],
    length: int,
    window: int,
) -> None:
    """Decode and prefill of a ragged batch, behind tokens or none; the numbers in the cache are the body's."""
    inputs = attention_inputs(first, length, heads, kv_heads, head_dim, 101, form)
    spec = cache_spec(form, context)
    attributes = {"num_heads": heads, "num_kv_heads": kv_heads, "scale": head_dim**-0.5, "window": window}
    want, *caches = (torch.from_numpy(array) for array in run_op(spec, attributes, *inputs))
    tactic = tactics(spec.name, attributes, tuple(tuple(each.shape) for each in inputs), "float16", 80)[0]
    plans = [tactic]
    if length == 1:
        tiles = dataclasses.replace(tactic.decode, slots=16)  # type: ignore[attr-defined]
        plans = [dataclasses.replace(tactic, decode=tiles, processors=2), tactic]  # type: ignore[type-var]
    for plan in plans:
        outputs = [torch.full_like(want, float("nan")), 6, 7]
        got, *written = interpreting.submit(interpret, spec.name, attributes, "float16", inputs, outputs, plan).result()
        for mine, theirs in zip(written, caches, strict=True):
            numbers = [decode_cache(each.numpy(), 1.0, form) for each in (mine, theirs)]
            np.testing.assert_array_equal(*numbers)
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert error < 2e-3, f"off by {error:.1e}"


@dataclasses.dataclass(frozen=True)
class OneLaunch:
    """A tactic of one kernel, whose arguments are the inputs and the outputs in order, and then numbers."""

    kernel: AnyKernel
    launch: Launch
    name: str = "one launch"

    @property
    def kernels(self) -> tuple[AnyKernel, ...]:
        return (self.kernel,)

    def workspace(self, dims: Dims) -> int:
        return 0

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        return (self.launch,)


@pytest.mark.parametrize(("op", "form"), [("AttentionInt8Cache", Format.INT8), ("AttentionFp8Cache", Format.E4M3)])
def test_cache_as_numbers(interpreting: ProcessPoolExecutor, op: str, form: Format) -> None:
    """What prefill on SM 9.0 reads: all slots of the steps up to the last that is seen, wherever in the row of positions that
    stands. Slots 7 and 64 are in the first step."""
    inputs = attention_inputs([3, 60], 5, 4, 2, 64, 150, form)
    inputs[5] = inputs[5].flip(1)
    attributes = {"num_heads": 4, "num_kv_heads": 2, "scale": 0.125, "window": 0}
    dims = tuple(tuple(each.shape) for each in inputs)
    tactic = tactics(op, attributes, dims, "float16", 90)[0]
    launch = tactic.launches(dims)[1]
    kernel = tactic.kernels[launch.kernel]
    assert tactic.workspace(dims) == 2 * 2 * inputs[6].numel()
    arguments = (Input(6), Input(7), Input(5), Output(0), Output(1), *launch.args[5:])
    constants = tuple(dict(kernel.constants, OVERLAPPED=False).items())
    plan = OneLaunch(
        dataclasses.replace(kernel, constants=constants), dataclasses.replace(launch, kernel=0, args=arguments)
    )  # type: ignore[type-var]
    outputs = [torch.full(inputs[6].shape, float("nan")).half() for _ in range(2)]
    wide = interpreting.submit(interpret, op, attributes, "float16", inputs, outputs, plan).result()
    for got, codes, scale in zip(wide, inputs[6:8], inputs[8:], strict=True):
        want = torch.from_numpy(decode_cache(codes.numpy(), float(scale), form)).half()
        torch.testing.assert_close(got[:, :, :128], want[:, :, :128], rtol=0, atol=0)
        assert got[:, :, 128:].isnan().all()


@pytest.mark.parametrize(
    ("op", "dtype", "sm"),
    [
        ("AttentionFp8Cache", "float16", 90),
        ("AttentionInt8Cache", "bfloat16", 90),
        ("AttentionFp8Context", "float16", 89),
    ],
)
def test_kernels_compile(op: str, dtype: str, sm: int) -> None:
    """For GPUs that are not here, without spilling registers where an assembler says."""
    dims = (
        (2, 1, 1024),
        (2, 1, 256),
        (2, 1, 256),
        (2, 1, 1, 128),
        (2, 1, 1, 128),
        (2, 1),
        *[(2, 2, 512, 128)] * 2,
        (1,),
        (1,),
    )
    attributes = {"num_heads": 8, "num_kv_heads": 2, "scale": 0.1, "window": 0}
    tactic = tactics(op, attributes, dims, dtype, sm)[0]
    assert tactic.name == ("warpgroups" if sm == 90 else "tiled")
    for kernel in tactic.kernels:
        if isinstance(kernel, CudaKernel):
            log = compile_image(kernel, sm)[1]
            assert "spill" not in log or " 0 bytes spill stores" in log
        else:
            assert compile_kernel(kernel, sm).image
