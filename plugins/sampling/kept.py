"""The kernels of sampling as an engine's file keeps them, and as a session launches them."""

from __future__ import annotations

from moecompiler.backends.sampling_kernels import SamplingBuffers
from moecompiler.errors import UserError
from moecompiler.plugins.driver import load, run
from moecompiler.plugins.fields import CUBINS, PLAN, Baked, BakedTactic, fingerprint, pack, unpack
from moecompiler.plugins.launch import Dims, scratch_bytes
from moecompiler.plugins.sampling.launch import SamplingTactic

_WAYS = ("greedy", "drawn")


def compile_sampling(vocab: int, dtype: str, sm: int) -> bytes:
    """The kernels for logits ``[rows, vocab]`` of a type, compiled for a compute capability: a line of JSON, then the cubins."""
    from moecompiler.plugins.compile import compile_kernel

    ways = [SamplingTactic(name, vocab, dtype) for name in _WAYS]
    baked = tuple(
        BakedTactic(way.name, fingerprint(way.kernels), tuple(compile_kernel(kernel, sm) for kernel in way.kernels))
        for way in ways
    )
    fields = pack(Baked("Sampling", {}, ((-1, vocab),), dtype, sm, baked))
    return fields[PLAN] + b"\n" + fields[CUBINS]


class Sampling:
    """See ``moecompiler.backends.sampling_kernels.SamplingKernels``. Loads its kernels into the current CUDA context.

    Raises: UserError where ``data`` is not what ``compile_sampling`` of this version makes.
    """

    def __init__(self, data: bytes):
        plan, _, cubins = data.partition(b"\n")
        try:
            baked = unpack({PLAN: plan, CUBINS: cubins})
        except ValueError:
            raise UserError("the engine's kernels for sampling are damaged: build it anew") from None
        ((_, vocab),) = baked.dims
        self._ways = {name: SamplingTactic(name, vocab, baked.dtype) for name in _WAYS}
        kept = {tactic.name: tactic for tactic in baked.tactics}
        if {name: fingerprint(way.kernels) for name, way in self._ways.items()} != {
            name: tactic.kernels for name, tactic in kept.items()
        }:
            raise UserError(
                "the engine's kernels for sampling were made by another version of moecompiler: build it anew"
            )
        self._cubins = {name: kept[name].cubins for name in _WAYS}
        self._functions = {
            name: tuple(load(cubin, kernel) for cubin, kernel in zip(self._cubins[name], way.kernels, strict=True))
            for name, way in self._ways.items()
        }

    def workspace(self, rows: int) -> int:
        """Of either way."""
        dims = _dims(rows, 1, 1)
        return max(
            way.workspace(dims) + scratch_bytes(way.launches(dims), self._cubins[name])
            for name, way in self._ways.items()
        )

    def enqueue(self, greedy: bool, buffers: SamplingBuffers, stream: int) -> None:
        name = "greedy" if greedy else "drawn"
        way, dims = self._ways[name], _dims(buffers.rows, buffers.slots, buffers.stride)
        read = (buffers.logits, buffers.options, buffers.uniforms, buffers.drawn, buffers.positions, buffers.seen)
        written = (buffers.chosen, buffers.fed)
        scratch = buffers.workspace + way.workspace(dims)
        run(self._functions[name], way.launches(dims), read, written, buffers.workspace, scratch, stream)


def _dims(rows: int, slots: int, stride: int) -> Dims:
    """The shapes that launches depend on: of the logits and the numbers."""
    return (rows, -1), (4,), (slots, stride)
