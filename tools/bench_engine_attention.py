"""Attention inside TensorRT engines, rotary embedding and cache update included:
``python -m moecompiler.tools.bench_engine_attention out.json``.

As a plugin, which writes the cache in place (``--plugins on``), or as the op's body, TensorRT's own kernels (``off``). Every run
of a CUDA graph has another cache, so that none is found in the GPU's own. A row and its floor are as in ``bench_attention``,
which measures the same kernels without an engine. Ends with status 1 where a result is wrong.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from moecompiler.plugins.attention.op import ATTENTION
from moecompiler.tools.bench_attention import Case, Row, copies, expected, random_inputs, row_of, table_line
from moecompiler.tools.kernel_machine import benchmark_parser, parse_for_gpu, write_rows
from moecompiler.tools.kernel_timing import matmul_peak, microseconds, read_bandwidth, relative_error
from moecompiler.tools.one_node_program import one_node, profile

CASES = (
    Case(1, 1, 127, 256),
    Case(4, 1, 2047, 2048),
    Case(32, 1, 4095, 4096),
    Case(1, 4096, 0, 4096),
)
LARGEST_ERROR = {"float16": 2e-3, "bfloat16": 1.5e-2}


def sizes_of(case: Case) -> dict[str, int]:
    """The op's dims by name, all but the sequences and their tokens."""
    return {
        "query_size": case.heads * case.head_dim,
        "key_size": case.kv_heads * case.head_dim,
        "head_dim": case.head_dim,
        "kv_heads": case.kv_heads,
        "slots": case.slots,
    }


def measure(case: Case, dtype: str, plugins: str, read: float) -> Row:
    """One row."""
    from moecompiler.tools.gpu_engine import TorchEngine
    from moecompiler.tools.one_node import build

    sizes = sizes_of(case)
    program = one_node(ATTENTION, case.attributes, sizes, dtype)
    profiles = [profile(ATTENTION, sizes, ({"batch": case.batch, "sequence": case.new},) * 3)]
    with tempfile.TemporaryDirectory() as folder:
        engine = TorchEngine(build(program, profiles, plugins, dtype, Path(folder)))
    kind = getattr(torch, dtype)
    names = [value.name for value in ATTENTION.inputs]
    sets = [random_inputs(case, kind) for _ in range(copies(case))]
    output = torch.full_like(sets[0][0], float("nan"))
    in_place = {"present_key": "past_key", "present_value": "past_value"}
    # what the body writes goes to one place: it is never read again
    written = {name: torch.empty_like(sets[0][6]) for name in in_place if name not in engine.aliases}
    bindings = []
    for inputs in sets:
        given = dict(zip(names, inputs, strict=True))
        given |= {name: written.get(name, given[source]) for name, source in in_place.items()}
        bindings.append(given | {"output": output})
    want = expected(case, sets[0])
    engine.run(0, bindings[0])
    error = relative_error(output, want)
    time = microseconds([partial(engine.run, 0, each) for each in bindings])
    engine.close()
    return row_of(case, kind, f"engine, {plugins}", time, error, read)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--plugins", nargs="+", choices=("on", "off"), default=["on", "off"])
    options = parse_for_gpu(parser, arguments)
    rows, read = [], read_bandwidth()
    for dtype in options.dtypes:
        rate = matmul_peak(getattr(torch, dtype))
        print(f"{dtype}: reading {read / 1e12:.2f} TB/s, matrix product {rate / 1e12:.0f} TFLOP/s", flush=True)
        for case in CASES:
            for plugins in options.plugins:
                rows.append(measure(case, dtype, plugins, read))
                print(table_line(rows[-1]), flush=True)
                write_rows(options.output, rows)
    wrong = [row for row in rows if row.error is None or not row.error < LARGEST_ERROR[row.dtype]]
    print(f"{len(rows)} rows, {len(wrong)} of them wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
