"""What an engine keeps of a plugin: how it was made, and the kernels of its tactics, as the bytes of two fields."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecompiler.plugins.launch import AnyKernel, Cubin, Dims

PLAN, CUBINS = "plan", "cubins"


@dataclass(frozen=True)
class BakedTactic:
    """A tactic's name, the fingerprint of its kernels' sources of arguments, and what they were compiled to."""

    name: str
    kernels: str
    cubins: tuple[Cubin, ...]


@dataclass(frozen=True)
class Baked:
    """A node as an engine keeps it. ``dims``: the shapes of its inputs, -1 for what the build does not know; ``dtype``: of its
    floating-point values; ``sm``: 90 for compute capability 9.0; ``selected``: the number of the tactic that was set last, from
    1 on; 0 if none was."""

    op: str
    attributes: Mapping[str, Any]
    dims: Dims
    dtype: str
    sm: int
    tactics: tuple[BakedTactic, ...]
    selected: int = 0


def fingerprint(kernels: tuple[AnyKernel, ...]) -> str:
    """Kernels with the same fingerprint take the same arguments, in the same order."""
    return hashlib.sha256(repr(kernels).encode()).hexdigest()[:16]


def pack(baked: Baked) -> dict[str, bytes]:
    """The fields by name. Kernels that several tactics share are kept once."""
    images: dict[bytes, int] = {}
    tactics = [
        {
            "name": tactic.name,
            "kernels": tactic.kernels,
            "cubins": [images.setdefault(cubin.to_bytes(), len(images)) for cubin in tactic.cubins],
        }
        for tactic in baked.tactics
    ]
    plan = {
        "op": baked.op,
        "attributes": dict(baked.attributes),
        "dims": baked.dims,
        "dtype": baked.dtype,
        "sm": baked.sm,
        "tactics": tactics,
        "selected": baked.selected,
        "sizes": [len(image) for image in images],
    }
    return {PLAN: json.dumps(plan).encode(), CUBINS: zlib.compress(b"".join(images))}


def unpack(fields: Mapping[str, bytes]) -> Baked:
    """Raises: ValueError where the fields are not ``pack``'s."""
    try:
        plan = json.loads(fields[PLAN])
        joined = zlib.decompress(fields[CUBINS])
        images, at = [], 0
        for size in plan["sizes"]:
            images.append(Cubin.from_bytes(joined[at : at + size]))
            at += size
        tactics = tuple(
            BakedTactic(each["name"], each["kernels"], tuple(images[index] for index in each["cubins"]))
            for each in plan["tactics"]
        )
        dims = tuple(tuple(shape) for shape in plan["dims"])
        return Baked(plan["op"], plan["attributes"], dims, plan["dtype"], plan["sm"], tactics, plan["selected"])
    except (IndexError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"the engine's plugin fields are damaged: {error}") from None
