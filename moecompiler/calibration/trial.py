"""What quantizing in groups does to a weight, tried out: as ``quantization.arithmetic`` does it, in torch.

*AWQ: Activation-aware Weight Quantization* (Lin et al., 2023, arXiv 2306.00978): input features that get large activations matter
most, so a weight's columns are multiplied by scales, and its input divided by them, before the weight is quantized; and
groups are clipped where that makes the output's error less.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moecompiler.quantization.schemes import WeightScheme

GRID = 20  # exponents that are tried: 0, 1/20, …, 19/20
LEAST_MEAN = 1e-4  # of an input feature's magnitude, as in AutoAWQ
CLIPS = tuple(range(100, 50, -5))  # hundredths of the largest magnitude


def rounded(weight: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype, ratio: float = 1.0) -> torch.Tensor:
    """The numbers that codes of ``weight`` ``[out, in]`` float32 stand for, float32; scales in ``dtype``, of ``ratio`` of
    each group's largest magnitude. ``scheme`` is of integers in groups."""
    assert scheme.block_size is not None
    groups = weight.reshape(len(weight), -1, scheme.block_size)
    low_code, high_code = scheme.format.range
    if scheme.symmetric:
        scales = _positive(groups.abs().amax(-1, keepdim=True) / high_code, dtype)
        zeros = torch.zeros_like(scales)
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scales = _positive((high - low) / high_code, dtype)
        zeros = (-low / scales).round().clamp(low_code, high_code)
    scales = _positive(scales * ratio, dtype) if ratio != 1 else scales
    codes = ((groups / scales).round() + zeros).clamp(low_code, high_code)
    return ((codes - zeros) * scales).to(dtype).float().reshape(weight.shape)


def _positive(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    ones = torch.where(scales == 0, torch.ones_like(scales), scales).to(dtype).float()
    return torch.where(ones == 0, torch.full_like(ones, torch.finfo(dtype).smallest_normal), ones)


def scales_of(mean: torch.Tensor, step: int) -> torch.Tensor:
    """The scales ``[in]`` of the exponent ``step`` / 20: mean magnitudes to that power, around 1."""
    powers = mean.clamp(min=LEAST_MEAN) ** (step / GRID)
    return powers / (powers.amax() * powers.amin()).sqrt()


def error(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype
) -> float:
    """The sum of squares of what quantizing ``weight`` ``[out, in]``, its columns times ``scales``, does to the product with
    ``x`` ``[tokens, in]``."""
    scaled = (weight * scales).to(dtype).float()
    difference = rounded(scaled, scheme, dtype) / scales - weight
    return float(F.linear(x, difference).double().square().sum())


def clips(x: torch.Tensor, weight: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype) -> torch.Tensor:
    """The clip of each group that makes the error of its product with ``x`` ``[tokens, in]`` least, in hundredths, uint8
    ``[out, groups]``."""
    size = scheme.block_size
    assert size is not None
    parts = x.reshape(len(x), -1, size).permute(1, 0, 2)
    products = parts.transpose(1, 2) @ parts  # [groups, size, size]
    best, least = None, None
    for clip in CLIPS:
        difference = (
            (rounded(weight, scheme, dtype, clip / 100) - weight).reshape(len(weight), -1, size).transpose(0, 1)
        )
        found = ((difference @ products) * difference).sum(-1).T  # [out, groups]
        if best is None or least is None:
            best, least = torch.full(found.shape, clip, dtype=torch.uint8), found
        else:
            better = found < least
            best, least = (
                torch.where(better, torch.tensor(clip, dtype=torch.uint8), best),
                torch.where(better, found, least),
            )
    assert best is not None
    return best
