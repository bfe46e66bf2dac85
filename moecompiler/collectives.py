"""The collectives of the rank module: torch custom ops that export to ONNX nodes of domain ``moecompiler``.

``all_reduce`` → ``moecompiler::AllReduce(x) -> y`` and ``all_gather`` → ``moecompiler::AllGather(x) -> y``. Both nodes carry
``group``, the ranks that take part, in order. Run in torch they go through the current thread's communicator.
"""

from __future__ import annotations

import torch

from moecompiler.runtime.communicator import current_communicator

DOMAIN = "moecompiler"


@torch.library.custom_op("moecompiler::all_reduce", mutates_args=())
def _all_reduce(x: torch.Tensor, group: list[int]) -> torch.Tensor:
    total = current_communicator().all_reduce(x.float().contiguous().numpy(), tuple(group))
    return torch.from_numpy(total).to(x.dtype, copy=True)


@_all_reduce.register_fake
def _(x: torch.Tensor, group: list[int]) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("moecompiler::all_gather", mutates_args=())
def _all_gather(x: torch.Tensor, group: list[int]) -> torch.Tensor:
    whole = current_communicator().all_gather(x.float().contiguous().numpy(), tuple(group))
    return torch.from_numpy(whole).to(x.dtype, copy=True)


@_all_gather.register_fake
def _(x: torch.Tensor, group: list[int]) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] * len(group)))


def all_reduce(x: torch.Tensor, group: tuple[int, ...]) -> torch.Tensor:
    """The sum of ``x`` over the ranks of ``group``, in float32, rounded once to ``x.dtype``; ``x`` itself in a group of one."""
    return x if len(group) == 1 else _all_reduce(x, list(group))


def all_gather(x: torch.Tensor, group: tuple[int, ...]) -> torch.Tensor:
    """The ranks' ``x`` along the last axis: ``[..., n] -> [..., n * len(group)]``; ``x`` itself in a group of one."""
    return x if len(group) == 1 else _all_gather(x, list(group))
