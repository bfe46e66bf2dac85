"""Random weights of ``LinearInt8``, … as plugins get them, and the numbers they stand for: for benchmarks and GPU tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moecompiler.plugins.launch import Dims

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Format:
    """``block`` columns have a scale, a whole row's where it is 0."""

    op: str
    block: int = 0

    @property
    def halves(self) -> bool:
        """Whether there are two codes to a byte."""
        return "Int4" in self.op or "Nvfp4" in self.op

    @property
    def attributes(self) -> dict[str, Any]:
        return {"block_size": self.block} if self.block and "Nvfp4" not in self.op else {}

    def __str__(self) -> str:
        return self.op.removeprefix("Linear") + (f" {self.block}" if self.attributes else "")


FORMATS = (
    Format("LinearInt8"),
    Format("LinearInt4", 128),
    Format("LinearInt4", 64),
    Format("LinearInt4Asymmetric", 128),
    Format("LinearFp8"),
    Format("LinearNvfp4", 16),
)


class RandomWeight:
    """A weight ``[out, columns]`` of about ``columns ** -0.5`` in size: codes, scales, and what else the op takes."""

    def __init__(self, form: Format, out: int, columns: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)

        def random_bytes(*shape: int, low: int = -128, high: int = 128) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator, dtype=torch.int8, device=device)

        def random_scales(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator, device=device) + 0.5

        self.form, self.out, self.columns, self.dtype = form, out, columns, dtype
        self.codes = random_bytes(out, columns // 2 if form.halves else columns)
        shape = (out, columns // form.block) if form.block else (out,)
        self.more: tuple[torch.Tensor, ...] = ()
        if "Nvfp4" in form.op:
            self.scales = random_bytes(*shape, low=0x20, high=0x50)  # 2^-3 to 2^3
            self.more = ((random_scales(1) * 0.2 * columns**-0.5).expand(out).contiguous(),)
        else:
            size = {"Int8": 64, "Fp8": 100}.get(form.op.removeprefix("Linear"), 4)
            self.scales = (random_scales(*shape) * columns**-0.5 / size).to(dtype)
        if "Fp8" in form.op:
            self.codes[(self.codes & 0x7F) == 0x7F] = 0  # NaN
            self.more = (torch.tensor([1 / 128 + 1 / 512], dtype=dtype, device=device),)
        if "Asymmetric" in form.op:
            self.more = (random_bytes(*shape, low=-8, high=8),)

    @property
    def inputs(self) -> list[torch.Tensor]:
        """All but x."""
        return [self.codes, self.scales, *self.more]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(tensor.nbytes for tensor in self.inputs)

    def dims(self, *leading: int) -> Dims:
        """Of a node's inputs, codes as the graph has them."""
        columns = self.columns if "Int4" in self.form.op else self.codes.shape[1]
        others = (tuple(tensor.shape) for tensor in (self.scales, *self.more))
        return ((*leading, self.columns), (self.out, columns), *others)

    def numbers(self) -> torch.Tensor:
        """``[out, columns]``, float32."""
        if "Fp8" in self.form.op:
            values = self.codes.view(torch.float8_e4m3fn).float()
        elif self.form.halves:
            halves = self.codes.view(torch.uint8).int()
            codes = torch.stack((halves & 15, halves >> 4), -1).flatten(1)
            positive = torch.tensor(E2M1, device=codes.device)
            table = torch.cat((positive, -positive))
            values = table[codes] if "Nvfp4" in self.form.op else torch.where(codes > 7, codes - 16, codes).float()
        else:
            values = self.codes.float()
        blocks = values.view(self.out, -1, self.form.block or self.columns)
        if "Asymmetric" in self.form.op:
            blocks = blocks - self.more[0].view(self.out, -1, 1)
        scales = self.scales.view(torch.float8_e4m3fn).float() if "Nvfp4" in self.form.op else self.scales.float()
        if "Nvfp4" in self.form.op:
            scales = scales * self.more[0][:, None]
        return (blocks * scales.view(self.out, -1, 1)).flatten(1)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What the op makes of ``x [..., columns]``, in float32."""
        values = x.float()
        if "Fp8" in self.form.op:
            scale = self.more[0].float()
            values = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return values @ self.numbers().T
