"""Layers of quantized experts of random codes, what a node takes of them and what it stands for: for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moecompiler.plugins.launch import Dims
from moecompiler.quantization.encodings import decode_e2m1
from moecompiler.routing import route

E4M3_LARGEST = 448.0
FORMATS = {"int8": "Int8", "fp8": "Fp8", "int4": "Int4", "int4_asymmetric": "Int4Asymmetric", "nvfp4": "Nvfp4"}
"""By how options name them: how their ops' names end, where scales are of blocks if the format may have such."""


@dataclass(frozen=True)
class CodedMatrix:
    """``rows`` of ``columns`` codes as a kernel gets them, int8 bytes, and the ``parts`` that follow: scales, and zero points or
    global scales. ``shape``: of the codes as the graph has it."""

    codes: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    shape: tuple[int, int]
    kind: str
    block: int

    @property
    def nbytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in (self.codes, *self.parts))

    def numbers(self, first: int, count: int) -> torch.Tensor:
        """What rows stand for, ``[count, columns]``, float32, not rounded."""
        rows = slice(first, first + count)
        codes, scales = self.codes[rows], self.parts[0][rows]
        if self.kind == "Int8":
            return codes.float() * scales.float()[:, None]
        if self.kind == "Fp8":
            return codes.view(torch.float8_e4m3fn).float() * scales.float()[:, None]
        nibbles = torch.stack((codes & 15, (codes >> 4) & 15), -1).reshape(count, -1).long()
        if self.kind == "Nvfp4":
            table = torch.from_numpy(decode_e2m1(torch.arange(16, dtype=torch.uint8).numpy())).float()
            steps = scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
            return table.to(codes.device)[nibbles] * steps * self.parts[1][rows, None]
        signed = ((nibbles ^ 8) - 8).float()
        per_row = scales.reshape(count, -1).float()
        repeats = signed.shape[1] // per_row.shape[1]
        if "Asymmetric" in self.kind:
            signed -= self.parts[1][rows].reshape(count, -1).float().repeat_interleave(repeats, 1)
        return signed * per_row.repeat_interleave(repeats, 1)


def coded_matrix(
    kind: str, rows: int, columns: int, block: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> CodedMatrix:
    """Random, of the scale that keeps activations near 1. ``kind``: the end of an op's name; ``block``: columns with a scale in
    common, if not all of a row."""

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.int8, device=device, generator=generator)

    def scales(size: float, *shape: int) -> torch.Tensor:
        spread = torch.rand(*shape, device=device, generator=generator) + 0.5
        return (spread * size * columns**-0.5).to(dtype)

    def result(codes: torch.Tensor, *parts: torch.Tensor) -> CodedMatrix:
        shape = (rows, columns // 2 if kind == "Nvfp4" else columns)
        return CodedMatrix(codes, parts, shape, kind, block)

    if kind == "Int8":
        return result(integers(-127, 128, rows, columns), scales(1 / 74, rows))
    if kind == "Fp8":
        codes = integers(-128, 128, rows, columns)
        codes = torch.where((codes & 127) > 120, codes & -8, codes)  # NaN, and what would outweigh all the rest
        return result(codes, scales(1 / 100, rows))
    packed = integers(-128, 128, rows, columns // 2)
    if kind == "Nvfp4":
        steps = integers(40, 72, rows, columns // 16)
        return result(packed, steps, (scales(1 / 12, rows)).float())
    grid = (rows, columns // block) if block else (rows,)
    found = scales(1 / 4.6, *grid)
    return result(packed, found, *((integers(-8, 8, *grid),) if "Asymmetric" in kind else ()))


class QuantizedLayer:
    """A rank's MoE layer: ``kind`` is how its op's name ends; experts ``expert_ids`` of ``experts``."""

    def __init__(
        self,
        kind: str,
        hidden: int,
        intermediate: int,
        block: int = 0,
        expert_ids: tuple[int, ...] = tuple(range(8)),
        experts: int = 8,
        top_k: int = 2,
        mode: int = 1,
        dtype: torch.dtype = torch.float16,
        device: str = "cuda",
    ):
        generator = torch.Generator(device).manual_seed(0)
        local = len(expert_ids)
        self.kind, self.hidden, self.intermediate, self.dtype = kind, hidden, intermediate, dtype
        self.op = f"MoE{kind}"
        self.attributes: Mapping[str, Any] = {"top_k": top_k, "normalization_mode": mode}
        if block and kind != "Nvfp4":
            self.attributes = {**self.attributes, "block_size": block}
        self.gate_up = coded_matrix(kind, local * 2 * intermediate, hidden, block, dtype, device, generator)
        self.down = coded_matrix(kind, local * hidden, intermediate, block, dtype, device, generator)
        router = torch.randn(experts, hidden, device=device, generator=generator)
        self.router = (router * hidden**-0.5).to(dtype)
        self.expert_ids = torch.tensor(expert_ids, device=device)
        spread = 1 + torch.arange(local, device=device) / local  # an expert's inputs saturate here and there
        self.input_scales = [(spread * size).to(dtype) for size in (3.5 / E4M3_LARGEST, 2.0 / E4M3_LARGEST)]

    def inputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """All of the node's inputs, codes as bytes."""
        weights = [part for each in (self.gate_up, self.down) for part in (each.codes, *each.parts)]
        return [x, self.router, *weights, *(self.input_scales if self.kind == "Fp8" else ()), self.expert_ids]

    def dims(self, tokens: int) -> Dims:
        """Of the node's inputs, as the graph has them."""
        shapes = [tuple(each.shape) for each in self.inputs(self.router[:1])]
        shapes[0] = (tokens, self.hidden)
        codes = {id(each.codes): each.shape for each in (self.gate_up, self.down)}
        found = [codes.get(id(each)) for each in self.inputs(self.router[:1])]
        return tuple(graph or shape for graph, shape in zip(found, shapes, strict=True))

    @property
    def expert_nbytes(self) -> float:
        """Of an expert's codes and what belongs to them."""
        return (self.gate_up.nbytes + self.down.nbytes) / len(self.expert_ids)

    def routed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token's weights, float32, and experts."""
        from moecompiler.config import NormalizationMode

        mode = NormalizationMode(self.attributes["normalization_mode"])
        return route((x @ self.router.T).float(), self.attributes["top_k"], mode)

    def experts_hit(self, x: torch.Tensor) -> int:
        return int(torch.isin(self.routed(x)[1].unique(), self.expert_ids).sum())

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """The layer in float32, on the numbers that codes stand for; FP8: inputs are rounded as the body does it."""
        weights, experts = self.routed(x)
        total = torch.zeros(x.shape, device=x.device)
        for local, expert in enumerate(self.expert_ids.tolist()):
            token, k = (experts == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            rows = self._met(x[token], 0, local)
            first = local * 2 * self.intermediate
            gate = rows @ self.gate_up.numbers(first, self.intermediate).T
            up = rows @ self.gate_up.numbers(first + self.intermediate, self.intermediate).T
            inner = self._met(torch.nn.functional.silu(gate) * up, 1, local)
            result = inner @ self.down.numbers(local * self.hidden, self.hidden).T
            total.index_add_(0, token, result * weights[token, k, None])
        return total

    def _met(self, values: torch.Tensor, which: int, local: int) -> torch.Tensor:
        """What a weight meets, float32."""
        if self.kind != "Fp8":
            return values.float()
        scale = self.input_scales[which][local].float()
        quotients = (values.to(self.dtype).float() / scale).clamp(-E4M3_LARGEST, E4M3_LARGEST)
        return quotients.to(torch.float8_e4m3fn).float() * scale
