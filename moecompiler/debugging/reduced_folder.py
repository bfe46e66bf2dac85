"""A reduced rewrite as a folder that stands by itself: graphs, weights, inputs, results, and a script that shows the error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from moecompiler.backends.onnxruntime_program import WeightCache
from moecompiler.debugging.reduce import Reduced, errors, run_alone, with_weights
from moecompiler.debugging.seeded import SeededReader
from moecompiler.dumps import WEIGHTS, distinct_weights, write_dumps
from moecompiler.errors import UserError
from moecompiler.graph import Program, load_program
from moecompiler.pipeline import Pass, apply
from moecompiler.quantization.packing import signed, unpack_bytes
from moecompiler.safetensors_file import map_tensor, read_header
from moecompiler.validation.place import Arrays
from moecompiler.weights import Recipe, Shape, TensorReader, whole

_SCRIPT = '''"""Shows that after.onnx does not compute what before.onnx does. Needs moecompiler and onnxruntime, no more.

python repro.py           runs both graphs on inputs.npz and compares; exit status 1 where they differ, as they did
python repro.py --rerun   makes the rewrite anew, with the pass as it is installed now: is it mended?
"""

import sys
from pathlib import Path

from moecompiler.debugging.reduced_folder import reproduce
from moecompiler.errors import UserError
from moecompiler.passes.selection import Selection

FOLDER = Path(__file__).resolve().parent
STEP = {step!r}  # the pass

try:
    passes = Selection(STEP).passes() if "--rerun" in sys.argv[1:] else ()
    sys.exit(reproduce(FOLDER, passes))
except UserError as error:
    sys.exit(f"repro.py: {{error}}")
'''


@dataclass(frozen=True)
class PackedReader:
    """The tensors of a safetensors file; see ``weights.TensorReader``."""

    path: Path

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        tensor = map_tensor(read_header(self.path)[name])
        if tensor.dtype == np.uint8:  # int4, see packing.stored: whole ones alone are read
            return signed(unpack_bytes(tensor))[: prod(shape)].reshape(shape)
        return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def write_folder(reduced: Reduced, reader: TensorReader, folder: Path, facts: Mapping[str, Any], readme: str) -> None:
    """Writes all into ``folder``, which is there and empty. ``facts`` go into ``rewrite.json``; its ``pass`` is what the script
    makes anew."""
    programs = {"before.onnx": reduced.before, "after.onnx": reduced.after}
    write_programs(programs, None if reduced.seeded else reader, folder)
    for name, arrays in (("inputs", reduced.inputs), ("expected", reduced.expected), ("actual", reduced.actual)):
        write_arrays(folder / f"{name}.npz", arrays)
    found = errors(reduced.actual, reduced.expected)
    told = {**facts, "seeded_weights": reduced.seeded, "relative_errors": {k: _number(v) for k, v in found.items()}}
    (folder / "rewrite.json").write_text(json.dumps(told, indent=2) + "\n")
    (folder / "repro.py").write_text(_SCRIPT.format(step=facts["pass"]))
    (folder / "README.md").write_text(readme)


def write_programs(programs: Mapping[str, Program], reader: TensorReader | None, folder: Path) -> None:
    """Each program by its file's name, with the recipes of its weights, and these in one file; without a reader, recipes are as
    they were and there is no such file."""
    write_dumps(programs, reader, lambda name: folder / name)
    _, stored = distinct_weights(programs)
    for file, program in programs.items():
        recipes = {
            name: (recipe if reader is None else _stored(stored[name, recipe], recipe)).to_json()
            for name, recipe in sorted(program.weights.items())
        }
        (folder / file).with_suffix(".weights.json").write_text(json.dumps(recipes))


def write_arrays(path: Path, arrays: Arrays) -> None:
    """An ``.npz`` file; slashes in names are ``%2F``."""
    keyed: dict[str, Any] = {_key(each): array for each, array in arrays.items()}
    np.savez_compressed(path, **keyed)


def read_arrays(path: Path) -> Arrays:
    """What ``write_arrays`` wrote. Raises: OSError, ValueError where it cannot be read."""
    with np.load(path, allow_pickle=False) as held:
        return {_name(key): held[key] for key in held.files}


def read_folder(folder: Path) -> tuple[Program, Program, Arrays, WeightCache]:
    """The graphs before and after, their inputs and weights. Raises: UserError where a file is missing or broken."""
    before, after = (load_program(folder / name) for name in ("before.onnx", "after.onnx"))
    try:
        facts = json.loads((folder / "rewrite.json").read_text())
        inputs = read_arrays(folder / "inputs.npz")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is no folder of `passes reduce`: {error}") from None
    reader: TensorReader = SeededReader() if facts["seeded_weights"] else PackedReader(folder / WEIGHTS)
    return before, after, inputs, WeightCache(reader)


def reproduce(folder: Path, anew: tuple[Pass, ...] = ()) -> int:
    """Compares what both graphs compute, or, with a pass, what it makes now of the one before; prints the errors. Returns 1
    where an output is off by more than a thousandth, else 0. Raises: UserError where a pass has parameters, which the folder does
    not hold."""
    before, after, inputs, weights = read_folder(folder)
    for step in anew:
        if hasattr(step, "parameters"):
            raise UserError(f"--rerun: pass {step.name} takes parameters; run `moecompiler passes reduce` anew instead")
        after, result = apply(step, before)
        print(f"pass {step.name} made {result.matches} rewrite(s)")
    if anew:
        found = errors(run_alone(after, inputs, weights), run_alone(before, inputs, weights))
    else:
        reduced = with_weights((before, after), inputs, weights)
        found = errors(reduced.actual, reduced.expected)
    for name, error in found.items():
        print(f"{name}: relative error {error:.2e}")
    wrong = max(found.values()) > 1e-3
    print("the graphs differ" if wrong else "the graphs agree")
    return int(wrong)


def _stored(name: str, recipe: Recipe) -> Recipe:
    """The recipe of a tensor that is stored whole under ``name``."""
    return recipe if recipe.values is not None else whole(name, recipe.dtype, recipe.shape)


def _key(name: str) -> str:
    """A tensor's name as a name in a zip file, where a slash makes a folder."""
    return name.replace("%", "%25").replace("/", "%2F")


def _name(key: str) -> str:
    return key.replace("%2F", "/").replace("%25", "%")


def _number(value: float) -> float | str:
    return value if np.isfinite(value) else "infinite"
