"""Collectives of a rank by device pointers, put on a stream: what is common to CUDA IPC, NCCL and the way through the host.

A rank's communicator holds its ways as ``Communicator.device`` (``Ways``), which a backend sets when it loads an engine; plugins
find it through ``current_communicator()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from moecompiler.runtime.device_link import DeviceLink


class DeviceCommunicator(Protocol):
    """One way to exchange what lies on GPUs. Calls are put on ``stream`` (the driver's handle), and every rank of the group makes
    them in the same order; ``x`` and ``y`` are device pointers, which may be equal in ``all_reduce`` alone; ``dtype`` is
    ``float16``, ``bfloat16`` or ``float32``; ``group`` are the ranks that take part, ascending, this one among them.

    ``name``: ``ipc``, ``nccl`` or ``host``. ``capturable``: calls neither wait nor depend on the host, so that a CUDA graph can
    hold them, and be launched any number of times as long as all ranks of a group launch theirs in the same order.
    """

    name: str
    capturable: bool

    def takes(self, nbytes: int, group: tuple[int, ...]) -> bool:
        """Whether this way serves messages of ``nbytes`` (of ``x``) over ``group``; the same on all ranks of the group."""
        ...

    def all_reduce(self, x: int, y: int, elements: int, dtype: str, group: tuple[int, ...], stream: int) -> None:
        """``y = Σ x`` over the group, ``elements`` of them; every rank gets the same bits."""
        ...

    def all_gather(
        self, x: int, y: int, rows: int, columns: int, dtype: str, group: tuple[int, ...], stream: int
    ) -> None:
        """``y [rows, ranks * columns]``: the group's ``x [rows, columns]`` side by side, in rank order."""
        ...

    def check(self) -> None:
        """Called by whoever has waited for the stream. Raises: RuntimeError where what lies there is not to be used, since a peer
        did not come."""
        ...

    def leave(self) -> None:
        """All ranks together, when none has work on its stream: lets go of what is the peers'. Before ``close``, save where a
        rank has failed."""
        ...

    def close(self) -> None:
        """Gives all back, without a word to the peers."""
        ...


@runtime_checkable
class NormingCommunicator(DeviceCommunicator, Protocol):
    """A way that also does what follows an all-reduce in a decoder layer, in the same launch."""

    def norm_fits(self, rows: int, hidden: int, dtype: str, group: tuple[int, ...]) -> bool:
        """Whether it does, for rows of ``hidden`` elements; the same on all ranks of the group."""
        ...

    def all_reduce_add_rms_norm(
        self,
        inputs: tuple[int, int, int],
        outputs: tuple[int, int],
        rows: int,
        hidden: int,
        epsilon: float,
        dtype: str,
        group: tuple[int, ...],
        stream: int,
    ) -> None:
        """``inputs``: residual, branch ``[rows, hidden]``, weight ``[hidden]``; ``outputs``: y, x ``[rows, hidden]``. ``x`` is
        residual + Σ branch, ``y`` its RMS norm."""
        ...


class Ways:
    """The ways a rank has, the best first: each message takes the first that serves it. The last one serves all.

    ``waits``: how many calls so far were not ``capturable``. ``link``: how hidden states go from stage to stage; None: by way of
    the host.
    """

    name, capturable = "ways", False

    def __init__(self, ways: Sequence[DeviceCommunicator], link: DeviceLink | None = None):
        self.ways, self.waits, self.link = tuple(ways), 0, link

    def way(self, nbytes: int, group: tuple[int, ...]) -> DeviceCommunicator:
        """The one for messages of ``nbytes`` over ``group``. Raises: LookupError where there is none."""
        for each in self.ways:
            if each.takes(nbytes, group):
                return each
        raise LookupError(f"no way to exchange {nbytes} bytes over ranks {group}")

    def chosen(self, nbytes: int, group: tuple[int, ...]) -> DeviceCommunicator:
        """``way``, for a call that is about to be made."""
        way = self.way(nbytes, group)
        self.waits += not way.capturable
        return way

    def norming(self, rows: int, hidden: int, dtype: str, group: tuple[int, ...]) -> NormingCommunicator | None:
        """The way for an all-reduce of these rows that is about to be made, where it adds and norms them as well."""
        way = self.way(rows * hidden * BYTES[dtype], group)
        if not isinstance(way, NormingCommunicator) or not way.norm_fits(rows, hidden, dtype, group):
            return None
        self.waits += not way.capturable
        return way

    def takes(self, nbytes: int, group: tuple[int, ...]) -> bool:
        return any(each.takes(nbytes, group) for each in self.ways)

    def all_reduce(self, x: int, y: int, elements: int, dtype: str, group: tuple[int, ...], stream: int) -> None:
        self.chosen(elements * BYTES[dtype], group).all_reduce(x, y, elements, dtype, group, stream)

    def all_gather(
        self, x: int, y: int, rows: int, columns: int, dtype: str, group: tuple[int, ...], stream: int
    ) -> None:
        self.chosen(rows * columns * BYTES[dtype], group).all_gather(x, y, rows, columns, dtype, group, stream)

    def check(self) -> None:
        for each in self.ways:
            each.check()

    def leave(self) -> None:
        for each in self.ways:
            each.leave()

    def close(self) -> None:
        for each in self.ways:
            each.close()


BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Of an element of each dtype that is exchanged."""
