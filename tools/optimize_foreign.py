"""Passes over an ONNX file that somebody else wrote; its weights are moved by reference and streamed to the result."""

from __future__ import annotations

import os
from pathlib import Path

from moecompiler.atomic import replace, temporary_path
from moecompiler.errors import UserError
from moecompiler.foreign import open_foreign
from moecompiler.graph import Program, packed_tensors, point_weights_at
from moecompiler.pipeline import run_passes
from moecompiler.safetensors_file import write
from moecompiler.tools.flags import InstrumentFlags, SelectionFlags
from moecompiler.tools.instruments import Watcher, show
from moecompiler.weights import TensorReader, materialize


def run_optimize_foreign(source: Path, output: Path, passes: SelectionFlags, instruments: InstrumentFlags) -> None:
    """Writes ``OUT.onnx`` and, for its weights, ``OUT.safetensors`` beside it.

    Raises: UserError where the file cannot be taken, a pass that should have matched did not, or the result cannot be written.
    """
    if output.suffix != ".onnx":
        raise UserError(f"--output {output}: give a name that ends in .onnx")
    steps = passes.selection.passes()
    given, reader = open_foreign(source)
    if instruments.verify_each:
        from moecompiler.tools.passes.verify import require_verified

        require_verified(source, passes)
    watcher = Watcher(instruments, given)
    program, results = run_passes(steps, given, allow_missed=passes.allow_missed, watch=watcher.watch)
    dumps = output.with_suffix(".passes")
    try:
        save_with_weights(program, reader, output)
        if watcher.dumps:
            dumps.mkdir(exist_ok=True)
        staged: dict[Path, Path] = {}

        def path_of(name: str) -> Path:
            staged[dumps / name] = temporary_path(dumps / name)
            return staged[dumps / name]

        watcher.write(lambda: reader, path_of)
        for path, temporary in staged.items():
            replace(temporary, path)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    show(results, watcher.text, instruments, str(source))
    changes = sum(result.matches for result in results)
    print(f"optimized {source} to {output}: {changes} rewrites, {_nodes(given)} → {_nodes(program)} nodes")


def save_with_weights(program: Program, reader: TensorReader, output: Path) -> None:
    """Writes the graph and its weights, one at a time, and gives both files their names when they are whole.

    Raises: OSError; UserError where the weights' file cannot be written.
    """
    weights = output.with_suffix(".safetensors")
    staged = {weights: temporary_path(weights), output: temporary_path(output)}
    try:
        recipes = program.weights
        if recipes:
            write(staged[weights], packed_tensors(program), lambda name: materialize(recipes[name], reader))
        else:
            del staged[weights]
        model = point_weights_at(program, weights.name).model
        staged[output].write_bytes(model.SerializeToString(deterministic=True))
        for path, temporary in staged.items():
            replace(temporary, path)
    finally:
        for temporary in staged.values():
            if temporary.exists():
                os.unlink(temporary)


def _nodes(program: Program) -> int:
    return len(program.model.graph.node)
