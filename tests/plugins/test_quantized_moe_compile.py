"""Kernels and plans of quantized MoE ops, without a GPU: they compile for every SM and fit into it; plans fit their workspace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moecompiler.plugins.compile import compile_kernel
from moecompiler.plugins.launch import ALIGNMENT, Dims, Kernel, Output, Workspace, shared_memory
from moecompiler.plugins.quantized.moe_launch import QuantizedMoETactic, tactics
from moecompiler.tools.quantized_layers import QuantizedLayer

SIZES = {"hidden": 256, "intermediate": 384, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are compiled here, not found from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def found(kind: str, block: int, sm: int, dtype: torch.dtype) -> tuple[tuple[QuantizedMoETactic, ...], QuantizedLayer]:
    layer = QuantizedLayer(kind, block=block, dtype=dtype, **SIZES)  # type: ignore[arg-type]
    return tactics(layer.op, layer.attributes, layer.dims(-1), str(dtype).removeprefix("torch."), sm), layer


@pytest.mark.parametrize(
    ("kind", "block", "sm"),
    [
        ("Int4Asymmetric", 64, 80),
        ("Fp8", 0, 80),
        ("Fp8", 0, 89),
        ("Int8", 0, 90),
        ("Nvfp4", 16, 100),
        ("Int4", 16, 120),
    ],
)
def test_kernels_compile(kind: str, block: int, sm: int) -> None:
    ways, _ = found(kind, block, sm, torch.bfloat16 if sm == 80 else torch.float16)
    kernels = {kernel.function: kernel for tactic in ways[:1] for kernel in tactic.kernels}
    for name in ("one_up", "one_down", "few_up", "few_down", "many_up", "arrange"):
        kernel = kernels.get(name)
        if isinstance(kernel, Kernel):
            cubin = compile_kernel(kernel, sm)
            assert cubin.image[:4] == b"\x7fELF"
            assert cubin.shared <= shared_memory(sm), f"{name}: {cubin.shared} bytes of shared memory"
    assert {"one_up", "one_down", "few_up", "few_down"} <= set(kernels)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize(("kind", "block"), [("Int8", 0), ("Fp8", 0), ("Nvfp4", 16), ("Int4Asymmetric", 128)])
def test_plans(kind: str, block: int, sm: int) -> None:
    """Every launch has the arguments that its kernel takes, and keeps to the workspace, at every limit between ways."""
    ways, layer = found(kind, block, sm, torch.float16)
    many = {kernel.function for kernel in ways[0].kernels if "many" in kernel.function or "grouped" in kernel.function}
    assert many == (
        {"many_up", "many_down"} if sm == 80 else {f"grouped_{layer_name(kind)}_{which}" for which in ("up", "down")}
    )
    for tactic in ways:
        sizes = []
        for tokens in (1, 8, 9, 16, 17, 64, 65, 1024, 1025, 5000):
            dims: Dims = layer.dims(tokens)
            launches = tactic.launches(dims)
            sizes.append(tactic.workspace(dims))
            assert not launches[0].overlapped
            assert any(Output(0) in launch.args for launch in launches)
            for launch in launches:
                assert len(launch.args) == len(tactic.kernels[launch.kernel].signature)
                assert all(each.offset < sizes[-1] for each in launch.args if isinstance(each, Workspace))
        assert sizes == sorted(sizes)
        assert all(size % ALIGNMENT == 0 for size in sizes)
        assert tactic.launches(layer.dims(0)) == ()


def layer_name(kind: str) -> str:
    return "fp8" if kind == "Fp8" else "codes"
