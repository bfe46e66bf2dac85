"""The files of a Hugging Face directory, and how what is wrong with them is said."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moecompiler.errors import UserError

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
LISTED = 8  # how many names a message gives


def find_files(model_dir: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the directory's safetensors files, and its index (tensor → file; empty where there is none).

    Like transformers, takes ``model.safetensors`` first, then the index; failing these, a single file of any name.
    Raises: UserError where there is no such thing, or only pickles.
    """
    give = "give the folder of a Hugging Face checkpoint"
    try:
        entries = sorted(path.name for path in model_dir.iterdir())
    except OSError as error:
        raise UserError(f"{model_dir}: {error.strerror}; {give}") from None
    if "model.safetensors" in entries:
        return ["model.safetensors"], {}
    if INDEX in entries:
        weight_map = _read_index(model_dir / INDEX)
        names = sorted(set(weight_map.values()))
        raise_problems(model_dir, {"files missing that the index names": [n for n in names if n not in entries]})
        return names, weight_map
    found = fnmatch.filter(entries, "*.safetensors")
    if len(found) > 1:
        raise UserError(f"{model_dir}: several safetensors files ({listed(found)}) without {INDEX}; download that too")
    pickles = [name for name in entries if Path(name).suffix in PICKLES]
    if pickles and not found:
        raise UserError(
            f"{model_dir}: holds only pickles ({listed(pickles)}), and unpickling runs whatever code they carry; download"
            " the safetensors revision, or, if you trust them, load them with transformers and call"
            " save_pretrained(directory, safe_serialization=True)"
        )
    if not found:
        raise UserError(f"{model_dir}: {'holds no *.safetensors file' if entries else 'is empty'}; {give}")
    return found, {}


def _read_index(path: Path) -> dict[str, str]:
    """The index's ``weight_map``. Raises: UserError where it has none, or names files outside the directory."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map from tensors to files; download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: names the file {file!r}; shards must lie beside the index")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {type(data).__name__}, not a JSON object")
    return data


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def raise_problems(
    model_dir: Path,
    problems: Mapping[str, Sequence[str]],
    advice: str = "download it again, or check that config.json belongs to it",
) -> None:
    """Raises one UserError that lists every kind of problem with names under it."""
    kinds = [f"{kind} ({len(names)}): {listed(names)}" for kind, names in problems.items() if names]
    if kinds:
        raise UserError(f"{model_dir}: {'; '.join(kinds)}; {advice}")
