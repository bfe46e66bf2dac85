"""Some of the tokens that meet a layer's weights, for searches that try out what quantizing does to a product."""

from __future__ import annotations

import torch

MOST = 512  # tokens, as in AutoAWQ's search


class KeptInputs:
    """Of tokens at equal distances: ``normed`` ``[kept, hidden]``, the input of queries, keys and values, and ``merged``
    ``[kept, heads * head_dim]``, that of the output projection, both float32 on the CPU."""

    def __init__(self, tokens: int, hidden: int, merged: int):
        self.rows = spread(tokens)
        self.normed, self.merged = torch.empty(len(self.rows), hidden), torch.empty(len(self.rows), merged)

    def keep(self, span: slice, normed: torch.Tensor, merged: torch.Tensor) -> None:
        """What is to be kept of the tokens ``span``; spans of several threads are distinct."""
        (mine,) = ((self.rows >= span.start) & (self.rows < span.stop)).nonzero(as_tuple=True)
        local = self.rows[mine] - span.start
        self.normed[mine], self.merged[mine] = (
            normed[local.to(normed.device)].cpu(),
            merged[local.to(merged.device)].cpu(),
        )


def spread(tokens: int) -> torch.Tensor:
    """At most ``MOST`` of as many indices, at equal distances, in ascending order."""
    count = min(tokens, MOST)
    return torch.arange(count) * tokens // max(count, 1)
