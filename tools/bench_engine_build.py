"""Building one rank's TensorRT engine, seconds and memory of the host: a full-size model, experts bound at run time.

    python -m moecompiler.tools.bench_engine_build out.json [--num_layers 32] [--packed_layers 2]

What ``moecompiler compile`` does, in one process: export, passes, writing the baked weights, TensorRT's builder; all layers are
in the plan. The file of the bound expert weights, 90 GB for 8x7B, is written for the first ``--packed_layers`` layers only, as
few disks have room for more; the row says what that gives for all of them at the same speed (``projected``). ``peak``: the most
memory that the process ever had, files that it has mapped included.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from moecompiler.artifact import Artifact
from moecompiler.atomic import Staged
from moecompiler.backends.tensorrt_profiles import profiles
from moecompiler.backends.tensorrt_program import Prepared, prepare, serialized
from moecompiler.dummy import open_source
from moecompiler.errors import UserError
from moecompiler.graph import load_program
from moecompiler.packing import pack
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.tools.build import resolve_settings
from moecompiler.tools.engine_options import MoeWeights
from moecompiler.tools.export import run_export
from moecompiler.tools.flags import (
    EngineFlags,
    GraphFlags,
    InstrumentFlags,
    MappingFlags,
    SelectionFlags,
    SourceFlags,
    WorkFlags,
)
from moecompiler.tools.job import Job, make_job
from moecompiler.tools.kernel_machine import parse_for_gpu, write_rows
from moecompiler.tools.optimize import run_optimize
from moecompiler.tools.options import DType
from moecompiler.weights import Recipe, TensorReader

RANK = 0


@dataclass(frozen=True)
class Row:
    """``seconds`` of each part; ``total`` of all that was done, ``projected`` with the whole file of bound weights; sizes and
    ``peak`` in bytes."""

    model: str
    layers: int
    dtype: str
    nodes: int
    plugins: int
    seconds: dict[str, float]
    total: float
    projected: float
    plan: int
    baked: int
    bound: int
    packed: int
    peak: int


@dataclass
class Clock:
    """Seconds of named parts."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = perf_counter()
        yield
        self.seconds[name] = perf_counter() - begin
        print(f"{name}: {self.seconds[name]:.1f} s, at most {peak_bytes() / 1e9:.1f} GB of memory so far", flush=True)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def first_layers(bound: Mapping[str, Recipe], layers: int) -> dict[str, Recipe]:
    """Of the bound weights those of the model's first layers; their names say which layer they are of."""
    wanted = {f"model.layers.{layer}" for layer in range(layers)}
    return {name: recipe for name, recipe in bound.items() if ".".join(name.split(".")[:3]) in wanted}


def optimized(job: Job, directory: Path, clock: Clock) -> Artifact:
    """The rank's graph after all passes."""
    with clock("export"):
        run_export(job, directory / "export", WorkFlags(rank=RANK))
    with clock("passes"):
        exported = Artifact.open(directory / "export", ("export",))
        passes = SelectionFlags().for_backend("tensorrt")
        run_optimize(exported, directory / "optimize", passes, InstrumentFlags(), WorkFlags(rank=RANK))
    return Artifact.open(directory / "optimize", ("optimize",))


def build(label: str, job: Job, engine: EngineFlags, packed_layers: int, directory: Path) -> Row:
    """Builds a plan, writes some of the bound weights, and says what all of it took."""
    from moecompiler.backends.tensorrt_build import build_plan
    from moecompiler.runtime.device import Device

    clock = Clock()
    source = optimized(job, directory, clock)
    settings, library = resolve_settings(job, engine), TensorRTPlugins()
    library.register()
    with clock("plugins chosen"):
        program = load_program(source.directory / f"rank{RANK}.onnx")
        prepared = prepare(program, settings, job.export.dtype, Device().info().sm, library)
    model, reader = prepared.program.model, open_source(job.source, job.model)
    plan_file, bound_file = directory / "rank.plan", directory / "rank.safetensors"
    with clock("baked weights"):
        baked = directory / "rank.baked"
        pack([(baked, prepared.program.weights)], reader)
        (directory / "rank.onnx").write_bytes(serialized(prepared, baked.name))
    with clock("plan"):
        names = [node.name for node in model.graph.node]
        shapes = profiles(model.graph.input, settings.limits)
        plan = build_plan(directory / "rank.onnx", shapes, names, [], bool(prepared.aliases), lambda fraction: None)
        plan_file.write_bytes(plan.data)
        Staged.of(plan_file)  # put on the disk and hashed, as for the manifest
    baked_bytes = baked.stat().st_size
    baked.unlink()
    some = first_layers(prepared.bound, packed_layers)
    _pack_bound(some, reader, bound_file, clock)
    return _row(label, job, prepared, clock, plan_file.stat().st_size, baked_bytes, some)


def _pack_bound(some: Mapping[str, Recipe], reader: TensorReader, path: Path, clock: Clock) -> None:
    with clock("bound weights"):
        pack([(path, some)], reader)
        Staged.of(path)


def _row(
    label: str, job: Job, prepared: Prepared, clock: Clock, plan: int, baked: int, some: Mapping[str, Recipe]
) -> Row:
    bound, packed = (sum(recipe.nbytes for recipe in each.values()) for each in (prepared.bound, some))
    total, pack_seconds = sum(clock.seconds.values()), clock.seconds["bound weights"]
    projected = total + (pack_seconds * (bound / packed - 1) if packed else float("nan"))
    return Row(
        label,
        job.model.num_hidden_layers,
        job.export.dtype,
        len(prepared.program.model.graph.node),
        len(prepared.plugins),
        clock.seconds,
        total,
        projected,
        plan,
        baked,
        bound,
        packed,
        peak_bytes(),
    )


def table_line(row: Row) -> str:
    return (
        f"{row.layers} layers, {row.dtype}: {row.total:.0f} s, of which the plan {row.seconds['plan']:.0f} s; with all of"
        f" {row.bound / 1e9:.1f} GB of bound weights ({row.packed / 1e9:.1f} written) {row.projected:.0f} s;"
        f" plan {row.plan / 1e9:.2f} GB, peak memory {row.peak / 2**30:.1f} GiB"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of the row")
    parser.add_argument("--model", default="8x7b")
    parser.add_argument("--num_layers", type=int, default=32)
    parser.add_argument("--packed_layers", type=int, default=2, help="whose expert weights are written (%(default)s)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--plugins", default="on")
    parser.add_argument("--max_seq_len", type=int, default=2048)
    parser.add_argument("--max_batch_size", type=int, default=8)
    parser.add_argument("--work_dir", type=Path, help="where a temporary directory for it is made")
    options = parse_for_gpu(parser, arguments)
    if not 1 <= options.packed_layers <= options.num_layers:
        parser.error(f"--packed_layers {options.packed_layers}: give 1 to {options.num_layers}, the layers there are")
    graph = GraphFlags(DType(options.dtype), max_seq_len=options.max_seq_len)
    engine = EngineFlags("tensorrt", options.max_batch_size, plugins=options.plugins, moe_weights=MoeWeights.external)
    try:
        job = make_job(SourceFlags(model=options.model, num_layers=options.num_layers), MappingFlags(), graph)
        if options.work_dir is not None:
            options.work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
            row = build(options.model, job, engine, options.packed_layers, Path(folder))
    except UserError as error:
        parser.error(str(error))
    write_rows(options.output, [row])
    print(f"{os.cpu_count()} cores; {table_line(row)}")


if __name__ == "__main__":
    main()
