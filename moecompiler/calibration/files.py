"""Calibrations as files.

``calibration.safetensors`` has all, in these tensors: of linear layers ``NAME.input_amax`` float32 ``[]`` and ``NAME.input_mean``
float32 ``[in]``; of attentions ``NAME.keys_amax`` and ``NAME.values_amax`` float32 ``[]``; of experts ``NAME.tokens`` int64
``[]`` and ``NAME.fed`` bool ``[]``. Its metadata are the header. ``scales.json`` has the same without the means, to be read and
edited. Equal calibrations give equal bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moecompiler.atomic import json_text, replace, temporary_beside, write_json_atomic
from moecompiler.calibration.result import Calibration, ExpertTokens
from moecompiler.errors import UserError

FILE, JSON_FILE = "calibration.safetensors", "scales.json"
FORMAT, VERSION = "moecompiler.calibration", 1
_REMEDY = "make it anew with `moecompiler calibrate`"


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Writes both files, each whole or not at all, ``calibration.safetensors`` last.

    Raises: UserError where they cannot be written.
    """
    from safetensors.numpy import save

    data = to_json(calibration)
    arrays = {f"{name}.input_mean": np.ascontiguousarray(mean) for name, mean in calibration.input_mean.items()}
    for kind in ("input_amax", "keys_amax", "values_amax"):
        arrays |= {f"{name}.{kind}": np.array(amax, np.float32) for name, amax in data[kind].items()}
    for name, each in calibration.experts.items():
        arrays |= {f"{name}.tokens": np.array(each.tokens, np.int64), f"{name}.fed": np.array(each.fed)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / JSON_FILE, data)
        with temporary_beside(folder / FILE) as temporary:
            temporary.write_bytes(save(arrays, {"header": json_text(data["header"])}))
            replace(temporary, folder / FILE)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None


def read_calibration(path: Path) -> Calibration:
    """Reads either file, or a folder with one.

    Raises: UserError where there is none, or it is not what ``write_calibration`` wrote.
    """
    if path.is_dir():
        found = [path / name for name in (FILE, JSON_FILE) if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: holds neither {FILE} nor {JSON_FILE}; make them with `moecompiler calibrate`")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: not found; make it with `moecompiler calibrate`")
    data, means = (_read_json(path), {}) if path.suffix == ".json" else _read_tensors(path)
    header = data.get("header")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{path}: is no calibration; make one with `moecompiler calibrate`")
    if header.get("version") != VERSION:
        raise UserError(f"{path}: is of version {header.get('version')!r}, here it is {VERSION}; {_REMEDY}")
    try:
        amaxes = [
            {name: float(amax) for name, amax in data[f"{kind}_amax"].items()} for kind in ("input", "keys", "values")
        ]
        experts = {name: ExpertTokens(int(each["tokens"]), bool(each["fed"])) for name, each in data["experts"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({type(error).__name__}: {error}); {_REMEDY}") from None
    return Calibration(amaxes[0], means, amaxes[1], amaxes[2], experts, header, str(path))


def to_json(calibration: Calibration) -> dict[str, Any]:
    """All but the means by channel."""
    return {
        "header": dict(calibration.header) | {"format": FORMAT, "version": VERSION},
        "input_amax": dict(calibration.input_amax),
        "keys_amax": dict(calibration.keys),
        "values_amax": dict(calibration.values),
        "experts": {name: {"tokens": each.tokens, "fed": each.fed} for name, each in calibration.experts.items()},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    return data if isinstance(data, dict) else {}


def _read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What ``to_json`` gave, and the means by channel."""
    from safetensors import SafetensorError, safe_open

    parts: dict[str, dict[str, Any]] = {
        kind: {} for kind in ("input_amax", "keys_amax", "values_amax", "input_mean", "tokens", "fed")
    }
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("header", "null"))
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                module, _, kind = name.rpartition(".")
                parts.setdefault(kind, {})[module] = file.get_tensor(name)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    means, tokens, fed = (parts.pop(kind) for kind in ("input_mean", "tokens", "fed"))
    experts = {name: {"tokens": count, "fed": fed.get(name, False)} for name, count in tokens.items()}
    return parts | {"header": header, "experts": experts}, means
