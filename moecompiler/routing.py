"""Top-k routing in the three normalization modes of ``--moe_normalization_mode``, in torch.

With logits ``z [tokens, experts]``, ``k`` experts a token, and ``softmax`` over the experts axis in float32:

- 0 ``NONE``: ``w = topk(softmax(z))``, not normalized; they sum to less than 1.
- 1 ``RENORMALIZE``: ``w = softmax(topk(z))``; equal to normalizing the top-k of ``softmax(z)``, which is how
  ``transformers.MixtralTopKRouter`` writes it. Mixtral's, and the default.
- 2 ``SPARSE_MIXER``: for each choice ``i = argmax(z)`` among the experts not chosen yet, with ``m = max(z)`` over these,
  ``w = softmax(z where (m - z) / max(|z|, m) <= 2 ε, else -inf)[i]`` with ``ε = 0.01`` (SparseMixer-v2, Liu et al. 2023,
  arXiv:2310.00811, as ``transformers.models.phimoe.modeling_phimoe.sparsemixer`` and TensorRT-LLM's
  ``MoeNormalizationMode.SPARSE_MIXER`` evaluate it); the weights of a token do not sum to 1.
"""

from __future__ import annotations

import torch

from moecompiler.config import SPARSE_MIXER_EPSILON, NormalizationMode


def route(logits: torch.Tensor, top_k: int, mode: NormalizationMode) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses experts: logits ``[tokens, experts]`` → weights ``[tokens, top_k]`` float32, experts ``[tokens, top_k]`` int64."""
    logits = logits.float()
    if mode is NormalizationMode.NONE:
        weights, experts = torch.topk(torch.softmax(logits, dim=-1), top_k, dim=-1)
    elif mode is NormalizationMode.RENORMALIZE:
        values, experts = torch.topk(logits, top_k, dim=-1)
        weights = torch.softmax(values, dim=-1)
    else:
        weights, experts = _sparse_mixer(logits, top_k)
    return weights, experts


def _sparse_mixer(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    lowest = torch.finfo(logits.dtype).min
    magnitude, remaining = logits.abs(), logits
    weights, experts = [], []
    for _ in range(top_k):
        largest, chosen = remaining.max(dim=-1, keepdim=True)
        far = (largest - logits) / torch.maximum(magnitude, largest) > 2 * SPARSE_MIXER_EPSILON
        # finite stand-ins for -inf: 0 · inf in a fused softmax would be NaN, and exp(lowest - max) is 0 all the same
        share = torch.softmax(torch.where(far, lowest, remaining), dim=-1)
        weights.append(share.gather(-1, chosen))
        experts.append(chosen)
        remaining = remaining.scatter(-1, chosen, lowest)
    return torch.cat(weights, dim=-1), torch.cat(experts, dim=-1)
