"""How what lies on a rank's GPU goes to one other rank: between the stages of a pipeline."""

from __future__ import annotations

from typing import Protocol


class DeviceLink(Protocol):
    """Calls are put on ``stream`` (the driver's handle) and do not wait; pointers are the device's. What one rank sends to
    another is received in the order in which it was sent. ``name``: ``nccl``."""

    name: str

    def send(self, pointer: int, nbytes: int, to: int, stream: int) -> None:
        """Rank ``to`` receives the same number of bytes. The memory may change behind what ``stream`` has been given so far."""
        ...

    def receive(self, pointer: int, nbytes: int, source: int, stream: int) -> None:
        """Fills the memory with what rank ``source`` sends."""
        ...
