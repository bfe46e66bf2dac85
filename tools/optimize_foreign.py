"""Passes over an ONNX file that somebody else wrote; its weights are moved by reference and streamed to the result."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from moecompiler.atomic import replace, temporary_path
from moecompiler.dumps import WEIGHTS
from moecompiler.errors import UserError
from moecompiler.foreign import OnnxReader, open_foreign
from moecompiler.graph import Program, point_weights_at
from moecompiler.packing import pack
from moecompiler.pipeline import Pass, PassResult, run_passes
from moecompiler.tools.flags import InstrumentFlags, SelectionFlags
from moecompiler.tools.instruments import Watcher, check_instruments, show
from moecompiler.tools.quantization import recipe_from_flags
from moecompiler.weights import TensorReader

_DUMP = re.compile(rf"\d\d-.+\.onnx|{re.escape(WEIGHTS)}")


def run_optimize_foreign(source: Path, output: Path, passes: SelectionFlags, instruments: InstrumentFlags) -> None:
    """Writes ``OUT.onnx``, for its weights ``OUT.safetensors`` beside it, and graphs between passes to ``OUT.passes/``. The
    graph comes last, so that it is never there without what it needs.

    Raises: UserError where the file cannot be taken, a pass that should have matched did not, or the result cannot be written.
    """
    if output.suffix != ".onnx":
        raise UserError(f"--output {output}: give a name that ends in .onnx")
    passes = dataclasses.replace(passes, recipe=recipe_from_flags(passes))
    check_instruments(instruments, passes.selection)
    steps = passes.selection.passes()
    given, reader = open_foreign(source)
    _refuse_to_overwrite(source, output, reader)
    if instruments.verify_each:
        from moecompiler.tools.passes.verify import require_verified

        require_verified(source, passes)
    watcher = Watcher(instruments, given, str(source))
    with watcher.printed_if_it_fails():
        program, results = run_passes(steps, given, allow_missed=passes.allow_missed, watch=watcher.watch)
    _require_matches(source, steps, results, passes)
    try:
        _write(program, reader, output, watcher)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    show(results, watcher.text, instruments, str(source))
    changes = sum(result.matches for result in results)
    print(f"optimized {source} to {output}: {changes} rewrites, {_nodes(given)} → {_nodes(program)} nodes")


def _refuse_to_overwrite(source: Path, output: Path, reader: OnnxReader) -> None:
    for path in (output, output.with_suffix(".safetensors")):
        if path.resolve() in {source.resolve(), *reader.files}:
            raise UserError(f"--output {output}: {path} is read by {source}, which stays as it is; give another name")


def _require_matches(
    source: Path, steps: Sequence[Pass], results: Sequence[PassResult], passes: SelectionFlags
) -> None:
    """A graph that names none of the modules in which passes expect to match is nothing they were made for: an error where such
    a pass was asked for by its name, and otherwise worth a note."""
    expecting = {step.name: done.matches for step, done in zip(steps, results, strict=True) if _expects_something(step)}
    for name in passes.only_pass or ():
        if not expecting.get(name, 1) and not passes.allow_missed:
            raise UserError(
                f"pass {name}: found nothing in {source}; `moecompiler passes explain {source} MODULE --only_pass {name}`"
                " says why, --allow_missed goes on without"
            )
    if expecting and not any(expecting.values()):
        names = ", ".join(expecting)
        print(
            f"note: {source}: has no norms, attention or experts that {names} know: is it another model?",
            file=sys.stderr,
        )


def _expects_something(step: Pass) -> bool:
    """Whether there are modules, under names that Hugging Face gives them, in which the pass has to match."""
    return hasattr(step, "missed") and bool(getattr(step, "op_names", True))


def _write(program: Program, reader: TensorReader, output: Path, watcher: Watcher) -> None:
    """Everything is written under temporary names first.

    Raises: OSError; UserError where a file of weights cannot be written.
    """
    weights, dumps = output.with_suffix(".safetensors"), output.with_suffix(".passes")
    staged = {path: temporary_path(path) for path in (weights, dumps, output)}
    try:
        model = point_weights_at(program, weights.name).model
        staged[output].write_bytes(model.SerializeToString(deterministic=True))
        if program.weights:
            pack([(staged[weights], program.weights)], reader)
        if watcher.dumps:
            staged[dumps].mkdir()
            watcher.write(lambda: reader, lambda name: staged[dumps] / name)
        output.unlink(missing_ok=True)  # an older graph does not go with these weights
        _remove_dumps(dumps)
        if watcher.dumps:
            dumps.mkdir(exist_ok=True)
            for path in sorted(staged[dumps].iterdir()):
                replace(path, dumps / path.name)
        for path in (weights, output):
            if staged[path].exists():
                replace(staged[path], path)
    finally:
        shutil.rmtree(staged[dumps], ignore_errors=True)
        for path in (weights, output):
            staged[path].unlink(missing_ok=True)


def _remove_dumps(folder: Path) -> None:
    """Removes what an earlier run put there, and the folder, if nothing else is in it."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if _DUMP.fullmatch(path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _nodes(program: Program) -> int:
    return len(program.model.graph.node)
