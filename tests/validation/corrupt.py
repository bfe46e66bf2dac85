"""Breaks engines on purpose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from moecompiler.atomic import sha256_file
from moecompiler.safetensors_file import numpy_dtype, read_header


def with_swapped_gate_and_up(engine: Path, copy: Path, rank: int, layer: int, local_expert: int) -> Path:
    """A copy of ``engine`` in which one expert's w1 and w3 have changed places; its manifest is made to agree."""
    shutil.copytree(engine, copy)
    file = copy / f"rank{rank}.safetensors"
    stored = read_header(file)[f"model.layers.{layer}.mlp.experts.gate_up_proj.T"]  # [experts, H, 2F]
    weights = np.memmap(file, numpy_dtype(stored.dtype), "r+", stored.offset, stored.shape)
    half = stored.shape[-1] // 2
    expert = weights[local_expert]
    gate = expert[:, :half].copy()
    expert[:, :half], expert[:, half:] = expert[:, half:], gate
    weights.flush()
    return with_hashes_of_now(copy, file.name)


def with_hashes_of_now(engine: Path, name: str) -> Path:
    manifest = json.loads((engine / "manifest.json").read_text())
    for record in manifest["ranks"].values():
        if name in record["files"]:
            record["files"][name]["sha256"] = sha256_file(engine / name)
    (engine / "manifest.json").write_text(json.dumps(manifest))
    return engine
