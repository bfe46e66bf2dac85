"""A rank's torch module whose FP8 weights get their inputs as FP8 engines have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moecompiler.model import Experts, RankModule
from moecompiler.quantization.encodings import E4M3_MAX, widen
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.scales import positive
from moecompiler.quantization.schemes import Format


class RoundToE4M3(nn.Module):
    """To E4M3 by static scales and back: ONNX's ``QuantizeLinear`` and ``DequantizeLinear``. ``scales`` float32 ``[1]`` for any
    ``x``, or ``[experts]`` for ``[tokens, in]`` or ``[experts, tokens, in]`` → ``[experts, tokens, in]``."""

    def __init__(self, scales: torch.Tensor):
        super().__init__()
        self.scales = scales if len(scales) == 1 else scales[:, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = (x.float() / self.scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return (codes.float() * self.scales).to(x.dtype)


def round_inputs(module: RankModule, plan: QuantizationRecipe | None, dtype: str) -> None:
    """Has ``module`` round what meets weights that are FP8 by ``plan``, whose scales graphs hold in ``dtype``."""
    if plan is None:
        return
    for name, part in list(module.named_modules()):
        if isinstance(part, Experts):
            prefix = name.replace(".mlp.", ".block_sparse_moe.")
            experts = [f"{prefix}.{expert}" for expert in part.expert_ids.tolist()]
            if (scales := _scales([f"{each}.w1" for each in experts], plan, dtype)) is not None:
                part.before_gate_up = RoundToE4M3(scales)
            if (scales := _scales([f"{each}.w2" for each in experts], plan, dtype)) is not None:
                part.before_down = RoundToE4M3(scales)
        elif isinstance(part, nn.Linear) and (scales := _scales([name], plan, dtype)) is not None:
            part.register_forward_pre_hook(_before(RoundToE4M3(scales)))


def _before(rounding: RoundToE4M3) -> Any:
    def hook(_module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return rounding(inputs[0])

    return hook


def _scales(names: Sequence[str], plan: QuantizationRecipe, dtype: str) -> torch.Tensor | None:
    """The static scales of what weights called so get, rounded to ``dtype``; None where they are not FP8."""
    scheme = plan.scheme_of(names[0])
    if scheme is None or scheme.format is not Format.E4M3:
        return None
    scales = [plan.input_scale(name) for name in names]
    return torch.from_numpy(widen(positive(np.array(scales, np.float32), dtype)))
