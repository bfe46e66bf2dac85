"""The header ``wgmma.cuh``: SM 9.0's warpgroup matrix products, one C++ function per width, as an asm statement needs it.

PTX ISA, ``wgmma.mma_async``: A is 64 rows by 16 columns, B 16 by N. A thread holds ``N / 2`` sums: of warp w and lane l,
``d[4 * j + 0, 1]`` are row ``16 * w + l / 4``, columns ``8 * j + 2 * (l % 4) + 0, 1``; ``d[4 * j + 2, 3]`` are 8 rows below.
"""

from __future__ import annotations

WIDTHS = range(16, 257, 16)


def wgmma_header() -> bytes:
    """``wgmma<N>(d, a, b, keep)`` has both operands in shared memory, ``wgmma_rs<N>(d, a, b, keep)`` A in registers and B with
    its columns adjacent in memory, ``wgmma_rk<N>`` A in registers and B as ``wgmma`` has it. ``keep`` 0 forgets what ``d`` held.
    ``ELEMENT`` is ``f16`` or ``bf16``. ``wgmma_e4m3<N>`` is ``wgmma<N>`` of bytes: 32 columns where the others take 16."""
    parts = [
        '#pragma once\n#include "ptx.cuh"\n',
        "template <int N> struct Wgmma;\n",
        *(_struct(width) for width in WIDTHS),
        "template <int N> void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) "
        "{ Wgmma<N>::shared(d, a, b, keep); }\n",
        "template <int N> void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int keep) "
        "{ Wgmma<N>::registers(d, a, b, keep); }\n",
        "template <int N> void wgmma_rk(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int keep) "
        "{ Wgmma<N>::registers_rows(d, a, b, keep); }\n",
        "template <int N> void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) "
        "{ Wgmma<N>::e4m3(d, a, b, keep); }\n",
    ]
    return "".join(parts).encode()


def _struct(width: int) -> str:
    count = width // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    halves, bytes_ = 'k16.f32." ELEMENT "." ELEMENT "', "k32.f32.e4m3.e4m3"

    def statement(kind: str, operands: str, predicate: int, inputs: str, flags: str) -> str:
        return (
            f'asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{predicate}, 0; wgmma.mma_async.sync.aligned.m64n{width}{kind}'
            f' {{{sums}}}, {operands}, p, {flags}; }}" : {outputs} : {inputs}, "r"(keep));'
        )

    shared = (f"%{count}, %{count + 1}", count + 2, '"l"(a), "l"(b)')
    both = statement(halves, *shared, "1, 1, 0, 0")
    both_bytes = statement(bytes_, *shared, "1, 1")
    fragments = ", ".join(f"%{count + i}" for i in range(4))
    held = ", ".join(f'"r"(a[{i}])' for i in range(4))
    left = (f"{{{fragments}}}, %{count + 4}", count + 5, f'{held}, "l"(b)')
    left_columns, left_rows = statement(halves, *left, "1, 1, 1"), statement(halves, *left, "1, 1, 0")
    return (
        f"template <> struct Wgmma<{width}> {{\n"
        f"  static void shared(float (&d)[{count}], uint64_t a, uint64_t b, int keep) {{ {both} }}\n"
        f"  static void registers(float (&d)[{count}], const uint32_t (&a)[4], uint64_t b, int keep) {{ {left_columns} }}\n"
        f"  static void registers_rows(float (&d)[{count}], const uint32_t (&a)[4], uint64_t b, int keep) "
        f"{{ {left_rows} }}\n"
        f"  static void e4m3(float (&d)[{count}], uint64_t a, uint64_t b, int keep) {{ {both_bytes} }}\n"
        "};\n"
    )
