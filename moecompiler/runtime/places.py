"""Where ranks run: on which host, as which of its ranks."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from moecompiler.runtime.communicator import Communicator


@dataclass(frozen=True)
class Place:
    """``local_rank``: how many ranks with lower numbers run on the same host."""

    rank: int
    host: str
    local_rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def gather_places(communicator: Communicator) -> list[Place]:
    """Every rank's place, in rank order; called by all ranks together. Hosts are told apart by their names."""
    return places_of(communicator.gather_objects(platform.node()))


def places_of(hosts: list[str]) -> list[Place]:
    """The places of ranks on ``hosts``, which are in rank order."""
    return [Place(rank, host, hosts[:rank].count(host)) for rank, host in enumerate(hosts)]
