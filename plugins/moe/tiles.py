"""A MoE node's sizes, and how its work is cut up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """A node's sizes; ``mode`` is its ``normalization_mode``."""

    hidden: int
    intermediate: int
    experts: int
    local: int
    top_k: int
    mode: int


@dataclass(frozen=True)
class One:
    """Tiles for one token: rows of weights and columns at a time, of the up and of the down product."""

    up_rows: int = 2
    up_block: int = 4096
    down_rows: int = 1
    down_block: int = 2048
    warps: int = 4


@dataclass(frozen=True)
class Few:
    """Tiles for up to ``tokens`` tokens: rows and columns of weights; ``parts``: programs that share the sum over F."""

    tokens: int
    rows: int = 64
    columns: int = 128
    stages: int = 3
    warps: int = 4
    parts: int = 1


@dataclass(frozen=True)
class Tile:
    """Outputs and columns of a tile; ``programs`` per multiprocessor. The up product's is as wide for gate and for up each."""

    outputs: int
    columns: int = 64
    stages: int = 4
    warps: int = 8
    programs: int = 1


@dataclass(frozen=True)
class Many:
    """Tiles of ``rows`` for up to ``tokens`` tokens (0: any number); with ``tails`` an expert's last up tile may be smaller."""

    tokens: int = 0
    rows: int = 128
    up: Tile = Tile(128)
    down: Tile = Tile(256)
    tails: bool = False


@dataclass(frozen=True)
class Grouped:
    """For up to ``tokens`` tokens (0: any number) on SM 9.0; how the work is cut up, its kernels say themselves."""

    tokens: int = 0
