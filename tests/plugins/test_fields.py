"""What an engine keeps of a plugin comes back as it was."""

from __future__ import annotations

import dataclasses

import pytest

from moecompiler.plugins.fields import CUBINS, PLAN, Baked, BakedTactic, fingerprint, pack, unpack
from moecompiler.plugins.launch import Cubin, Kernel

SHARED, OWN = Cubin(b"\x7fELF\0\n{}" + bytes(range(256)) * 40, "first", 50_000, 8, 128), Cubin(b"", "second", 0, 4, 0)
BAKED = Baked(
    "MoE",
    {"top_k": 2, "epsilon": 1e-5},
    ((-1, 4096), (8, 4096)),
    "bfloat16",
    90,
    (BakedTactic("gemv", "ab12", (SHARED,)), BakedTactic("sorted", "cd34", (OWN, SHARED, SHARED))),
    selected=2,
)


def test_round_trip() -> None:
    assert unpack(pack(BAKED)) == BAKED


def test_a_shared_kernel_is_kept_once() -> None:
    """An engine has a copy of this for every layer and profile."""
    incompressible = Cubin(bytes((i * i * 2654435761 >> 13) & 255 for i in range(20_000)), "first", 0, 8, 0)
    once = dataclasses.replace(BAKED, tactics=(BakedTactic("a", "", (incompressible,)),))
    thrice = dataclasses.replace(BAKED, tactics=tuple(BakedTactic(n, "", (incompressible,)) for n in "abc"))
    assert len(pack(once)[CUBINS]) > 5_000
    assert len(pack(thrice)[CUBINS]) == len(pack(once)[CUBINS])
    assert unpack(pack(thrice)) == thrice


@pytest.mark.parametrize("field", [PLAN, CUBINS])
def test_damage_is_noticed(field: str) -> None:
    """As TensorRT 10.6 hands fields over with numpy 2: every byte is the first."""
    fields = pack(BAKED)
    damaged = fields | {field: fields[field][:1] * len(fields[field])}
    with pytest.raises(ValueError, match="plugin fields are damaged"):
        unpack(damaged)
    with pytest.raises(ValueError, match="plugin fields are damaged"):
        unpack({name: data for name, data in fields.items() if name != field})


def test_fingerprint_sees_every_argument() -> None:
    """A plan for other arguments must not launch an older engine's kernels."""
    kernel = Kernel("m", "f", (("x", "*fp16:16"), ("n", "i32")), (("BLOCK", 64),))
    others = [
        dataclasses.replace(kernel, signature=(("n", "i32"), ("x", "*fp16:16"))),
        dataclasses.replace(kernel, constants=(("BLOCK", 128),)),
        dataclasses.replace(kernel, num_warps=8),
    ]
    assert len({fingerprint((each,)) for each in (kernel, *others)}) == 4
    assert fingerprint((kernel, kernel)) != fingerprint((kernel,))
