"""A plugin by itself as a folder that stands alone: its node, weights, inputs, results, and a script that shows the error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from moecompiler.comparison.nodes import OpNode, op_node
from moecompiler.comparison.reduce_node import Tried
from moecompiler.comparison.result import OpCase
from moecompiler.debugging.reduced_folder import PackedReader, read_arrays, write_arrays, write_programs
from moecompiler.debugging.seeded import SeededReader
from moecompiler.dumps import WEIGHTS
from moecompiler.errors import UserError
from moecompiler.graph import load_program
from moecompiler.validation.place import Arrays
from moecompiler.weights import TensorReader

NODE, FACTS, INPUTS = "node.onnx", "plugin.json", "inputs.npz"

_SCRIPT = '''"""Shows that a plugin is further from the truth than its op's body. Needs moecompiler, and what its backend needs.

python repro.py                       as it was found; exit status 1 where the plugin is further off
python repro.py --backend tensorrt    by another backend: onnxruntime (kernels are interpreted) or tensorrt (a GPU)
"""

import sys
from pathlib import Path

from moecompiler.tools.comparison.reduced import main

if __name__ == "__main__":  # the process that interprets kernels imports this too
    sys.exit(main(Path(__file__).resolve().parent, sys.argv[1:]))
'''


def write_node_folder(tried: Tried, reader: TensorReader | None, facts: Mapping[str, Any], folder: Path) -> None:
    """Writes all into ``folder``, which is there and empty. ``reader``: of the node's weights; without one they are random ones
    of a seed (``seeded.SeededReader``)."""
    write_programs({NODE: tried.node.program}, reader, folder)
    write_arrays(folder / INPUTS, tried.feeds)
    write_arrays(folder / "exact.npz", tried.exact)
    for name, arrays in tried.got.items():
        write_arrays(folder / f"{name}.npz", arrays)
    told = {
        "node": tried.node.name,
        "op": tried.node.op,
        "module": tried.node.module,
        "inputs": tried.what,
        "wrong": tried.wrong,
        "seeded_weights": reader is None,
        "outputs": [_numbers(case) for case in tried.cases],
        **facts,
    }
    (folder / FACTS).write_text(json.dumps(told, indent=2) + "\n")
    (folder / "repro.py").write_text(_SCRIPT)
    (folder / "README.md").write_text(_readme(tried, told))


def read_node_folder(folder: Path) -> tuple[OpNode, Arrays, TensorReader, dict[str, Any]]:
    """The node, its inputs by the op's names, what reads its weights, and the facts. Raises: UserError where a file is missing or
    broken."""
    program = load_program(folder / NODE)
    try:
        facts = json.loads((folder / FACTS).read_text())
        inputs = read_arrays(folder / INPUTS)
        seeded = bool(facts["seeded_weights"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: is no folder of a reduced plugin: {error}") from None
    (node,) = program.model.graph.node
    reader: TensorReader = SeededReader() if seeded else PackedReader(folder / WEIGHTS)
    return op_node(program, node), inputs, reader, facts


def figures(tried: Tried) -> list[str]:
    """A line for each output and program: its errors in units in the last place."""
    lines = []
    for case in tried.cases:
        verdict = "no further from the truth" if case.no_further else "FURTHER FROM THE TRUTH"
        for name, error in case.errors.items():
            numbers = f"largest {error.max:.3g}, mean {error.mean:.3g}, 99% below {error.p99:.3g}"
            lines.append(f"{case.output}: {name}: {numbers} units in the last place of {case.dtype}")
        lines.append(f"{case.output}: {next(iter(case.errors))} is {verdict} than {[*case.errors][1]}")
    return lines


def _numbers(case: OpCase) -> dict[str, Any]:
    """Errors in units in the last place; what is no number is text."""
    errors = {
        name: {key: value if isfinite(value) else str(value) for key, value in asdict(error).items()}
        for name, error in case.errors.items()
    }
    return {"output": case.output, "dtype": case.dtype, "errors": errors, "no_further": case.no_further}


def _readme(tried: Tried, facts: Mapping[str, Any]) -> str:
    weights = "random weights of a seed, for the true ones are large" if facts["seeded_weights"] else "the true weights"
    shapes = ", ".join(f"`{name}` {list(array.shape)}" for name, array in tried.feeds.items())
    found = "\n".join(f"- {line}" for line in figures(tried))
    wrong = "" if tried.wrong else "\nBy itself the node is within bounds: the error builds up with other nodes'.\n"
    return f"""# A plugin by itself

`{tried.node.name}`, op {tried.node.op}, on {tried.what}: {shapes}, with {weights}.

{found}
{wrong}
    python repro.py    # the plugin and the op's body, both against float64; exit status 1 where the plugin is further off

| file | |
|---|---|
| `{NODE}` | the node with its body as a function: without the function it is the plugin |
| `{Path(NODE).stem}.weights.json`, `weights.safetensors` | its weights (the latter is not there where they are random) |
| `{INPUTS}` | its inputs, by the op's names |
| `exact.npz`, {", ".join(f"`{name}.npz`" for name in tried.got)} | what the body gives in float64, and each program |
| `{FACTS}` | what is said here, in numbers |
"""
