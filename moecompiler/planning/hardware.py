"""GPUs and what connects them, as plans see them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moecompiler.errors import UserError

_UNMEASURED_SHARE = 0.93  # of the data sheet's bandwidth that reading reaches: measured on an H100, 3.13 of 3.35 TB/s


@dataclass(frozen=True)
class Gpu:
    """``memory`` in bytes. Bytes a second: ``bandwidth``, what reading memory reaches; ``link``, to another GPU of its node, one
    way. ``flops``: dense float16 products a second, of the data sheet. ``measured``: whether ``bandwidth`` was."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    measured: bool = False


@dataclass(frozen=True)
class Cluster:
    """``gpus`` of a kind in nodes of ``gpus_per_node``. ``network``: bytes a second from a GPU to one of another node, one way.
    ``link_latency``, ``network_latency``: seconds of an exchange of a few bytes among a stage's ranks, within a node and across;
    assumed, not measured."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int = 8
    network: float = 50e9  # 400 Gb/s for each GPU
    link_latency: float = 8e-6
    network_latency: float = 30e-6

    def reach(self, first: int, last: int) -> tuple[float, float]:
        """(latency in seconds, bytes a second) among ranks ``first`` to ``last``, which fill nodes in order."""
        if first // self.gpus_per_node == last // self.gpus_per_node:
            return self.link_latency, self.gpu.link
        return self.network_latency, self.network


# memory and speeds: NVIDIA's data sheets of the SXM (L40S: PCIe) cards; bandwidth of H100 and H200 as measured here
_SHEETS = {
    "a100": Gpu("a100", 80e9, _UNMEASURED_SHARE * 2.039e12, 312e12, 300e9),
    "l40s": Gpu("l40s", 48e9, _UNMEASURED_SHARE * 0.864e12, 362e12, 32e9),
    "h100": Gpu("h100", 80e9, 3.13e12, 989e12, 450e9, measured=True),
    "h200": Gpu("h200", 141e9, 4.59e12, 989e12, 450e9, measured=True),
    "b200": Gpu("b200", 180e9, _UNMEASURED_SHARE * 7.7e12, 2250e12, 900e9),
}
_UNITS = {"GB": 1e9, "GIB": float(1 << 30), "TB": 1e12, "MB": 1e6, "MIB": float(1 << 20)}


def gpu_named(name: str) -> Gpu:
    """Raises: UserError where there is no such GPU in the table."""
    if name.lower() not in _SHEETS:
        raise UserError(f"--gpu {name}: unknown; known are {', '.join(_SHEETS)}")
    return _SHEETS[name.lower()]


def parse_bytes(text: str, option: str) -> float:
    """``80GB``, ``80GiB``, ``80`` (GB). Raises: UserError that names ``option``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = found and _UNITS.get((found[2] or "GB").upper())
    if not found or not unit or float(found[1]) <= 0:
        raise UserError(f"{option} {text}: give a size as in 80GB or 79.6GiB")
    return float(found[1]) * unit
