"""The kernels of exchanges as an engine's file keeps them, and as ranks launch them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from moecompiler.errors import UserError
from moecompiler.plugins.collectives import launch
from moecompiler.plugins.collectives.launch import USUAL, Sizes
from moecompiler.plugins.driver import Function, load, load_now, run
from moecompiler.plugins.fields import CUBINS, PLAN, Baked, BakedTactic, fingerprint, pack, unpack
from moecompiler.plugins.launch import Launch
from moecompiler.runtime.collective_kernels import Region

_DAMAGED = "the engine's kernels for collectives are damaged: build it anew"


def compile_collectives(dtype: str, sm: int, sizes: Sizes = USUAL) -> bytes:
    """The kernels for messages of a type, compiled for a compute capability: a line of JSON, then the cubins."""
    from moecompiler.plugins.compile import compile_kernel

    kernels = launch.kernels(dtype, sizes)
    baked = tuple(
        BakedTactic(name, fingerprint((each,)), (compile_kernel(each, sm),)) for name, each in kernels.items()
    )
    fields = pack(Baked("Collectives", asdict(sizes), (), dtype, sm, baked))
    return fields[PLAN] + b"\n" + fields[CUBINS]


class Collectives:
    """See ``moecompiler.runtime.collective_kernels.CollectiveKernels``. Loads its kernels into the current CUDA context.
    ``most_once``: bytes of a message that takes one shot, to measure with; up to the ``one_shot`` they are compiled for.

    Raises: UserError where ``data`` is not what ``compile_collectives`` of this version makes.
    """

    most_ranks = launch.MOST_RANKS

    def __init__(self, data: bytes, most_once: int | None = None):
        self._most_once = most_once
        plan, _, cubins = data.partition(b"\n")
        try:
            baked = unpack({PLAN: plan, CUBINS: cubins})
            self._sizes = Sizes(**baked.attributes)
        except (TypeError, ValueError):
            raise UserError(_DAMAGED) from None
        self.dtype, self.region_bytes = baked.dtype, self._sizes.region
        kernels = launch.kernels(self.dtype, self._sizes)
        kept = {tactic.name: tactic for tactic in baked.tactics}
        if {name: fingerprint((kernel,)) for name, kernel in kernels.items()} != {
            name: tactic.kernels for name, tactic in kept.items()
        }:
            raise UserError(
                "the engine's kernels for collectives were made by another version of moecompiler: build it anew"
            )
        self._functions: dict[str, Function] = {
            name: load(kept[name].cubins[0], kernel) for name, kernel in kernels.items()
        }
        for function in self._functions.values():
            load_now(function)

    def head(self, rank: int, pointers: Sequence[int], patience_ns: int, told: int) -> bytes:
        return launch.head(rank, pointers, patience_ns, told)

    def all_reduce(self, x: int, y: int, elements: int, region: Region, stream: int) -> None:
        plan = launch.all_reduce(x, y, elements, self.dtype, region, self._sizes, self._most_once)
        self._run(plan, stream)

    def all_gather(self, x: int, y: int, rows: int, columns: int, region: Region, stream: int) -> None:
        self._run(launch.all_gather(x, y, rows, columns, self.dtype, region, self._sizes), stream)

    def norm_fits(self, rows: int, hidden: int, region: Region) -> bool:
        return launch.norm_fits(rows, hidden, self.dtype, region, self._sizes)

    def all_reduce_add_rms_norm(
        self,
        inputs: tuple[int, int, int],
        outputs: tuple[int, int],
        rows: int,
        hidden: int,
        epsilon: float,
        region: Region,
        stream: int,
    ) -> None:
        self._run([launch.one_shot_norm(inputs, outputs, rows, hidden, epsilon, region, self._sizes)], stream)

    def _run(self, launches: Iterable[tuple[str, Launch]], stream: int) -> None:
        for name, each in launches:
            run((self._functions[name],), (each,), (), (), 0, 0, stream)
