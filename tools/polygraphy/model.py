"""A rank's graph and weights as files for Polygraphy's other tools: ``convert``, ``debug``, ``surgeon``, ``inspect``.

    python -m moecompiler.tools.polygraphy.model OPTIMIZED --output_dir OUT [--rank N] [--plugins on] [--compute_capability 9.0]

``OPTIMIZED``: what ``optimize`` wrote, or the ``optimize`` in what ``compile`` wrote. Writes ``rankN.onnx`` and
``rankN.safetensors``, whose place in the ONNX file is all that is needed to read it.

Without ``--plugins`` bodies are inlined and the graph is as backend onnxruntime runs it: any tool takes it. With it (``on`` or
whatever ``compile --plugins`` takes) the graph is what TensorRT's parser gets on a GPU of that compute capability, weights that
would be bound later baked in: its plugins are found by ``python -m moecompiler.tools.polygraphy``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from moecompiler.artifact import Artifact
from moecompiler.atomic import temporary_path
from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.errors import UserError
from moecompiler.graph import Program, floating_type, load_program, point_weights_at
from moecompiler.packing import pack
from moecompiler.plugin_switches import parse_plugins
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.tools.backend import tidy
from moecompiler.tools.job import Job, ranks_asked_for
from moecompiler.tools.printing import USER_ERROR, complaint

_LIMITS = EngineLimits(1, 1, 2, 1)  # the graph does not depend on them


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes both files, or none; 2 where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--plugins", default="")
    parser.add_argument("--compute_capability", default="9.0")
    options = parser.parse_args(arguments)
    try:
        write(options.directory, options.output_dir, options.rank, options.plugins, options.compute_capability)
    except UserError as error:
        print(complaint(str(error)), file=sys.stderr)
        return USER_ERROR
    return 0


def write(directory: Path, output_dir: Path, rank: int, plugins: str, compute_capability: str) -> None:
    """Raises: UserError where the rank is missing, a plugin cannot be, or a file cannot be written."""
    from moecompiler.packed import open_rank_source

    artifact = Artifact.open(directory, ("optimize",))
    ranks_asked_for(artifact.world_size, rank)
    artifact.check([rank])
    job, name = Job.of(artifact), f"rank{rank}"
    given = load_program(artifact.path(f"{name}.onnx"))
    program, data = for_tensorrt(given, plugins, compute_capability, name) if plugins else for_any(given, name)
    reader = open_rank_source(artifact.directory, artifact.rank_info(rank), job.source, job.model)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        staged = {
            f"{name}.{ending}": temporary_path(output_dir / f"{name}.{ending}") for ending in ("safetensors", "onnx")
        }
        pack([(staged[f"{name}.safetensors"], program.weights)], reader)
        staged[f"{name}.onnx"].write_bytes(data)
        for file, temporary in staged.items():
            temporary.replace(output_dir / file)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written: {error.strerror or error}") from None
    nodes = program.model.graph.node
    print(
        f"{output_dir / name}.onnx: {len(nodes)} nodes, {sum(each.op_type.endswith('Plugin') for each in nodes)} plugins"
    )


def for_any(program: Program, name: str) -> tuple[Program, bytes]:
    """Without functions, as backend onnxruntime lowers it."""
    import onnx

    from moecompiler.backends.onnxruntime_lowering import lower
    from moecompiler.backends.tensorrt_program import mark_plugins

    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    lowered = lower(tidy(Program(mark_plugins(model, {}), program.weights)))
    return lowered, point_weights_at(lowered, f"{name}.safetensors").model.SerializeToString(deterministic=True)


def for_tensorrt(program: Program, plugins: str, compute_capability: str, name: str) -> tuple[Program, bytes]:
    """As TensorRT's parser gets it. Raises: UserError where a plugin is insisted on and there is none that fits."""
    from moecompiler.backends.tensorrt_program import prepare, serialized

    if not re.fullmatch(r"\d+\.\d", compute_capability):
        raise UserError(f"--compute_capability {compute_capability}: give one as in 8.9")
    settings = BuildSettings(_LIMITS, parse_plugins(plugins), moe_weights="engine")
    sm = int(compute_capability.replace(".", ""))
    prepared = prepare(program, settings, floating_type(program), sm, TensorRTPlugins(), tidy)
    for note in prepared.notes:
        print(f"note: {note}", file=sys.stderr)
    return prepared.program, serialized(prepared, f"{name}.safetensors")


if __name__ == "__main__":
    sys.exit(main())
