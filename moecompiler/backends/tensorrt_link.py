"""A stage's hidden states on their way from and to other ranks' GPUs, on the engine's stream."""

from __future__ import annotations

from dataclasses import dataclass

from moecompiler.backends.tensorrt_engine import Engine
from moecompiler.backends.tensorrt_feeds import Feeds
from moecompiler.runtime.device_link import DeviceLink

Tokens = tuple[int, int]  # sequences of a step, and tokens of each


@dataclass(frozen=True)
class Neighbours:
    """See ``runtime.session.LinkedSession.link``. Without a link hidden states go by way of the host, which is not seen here."""

    link: DeviceLink | None = None
    source: int | None = None
    to: int | None = None

    def receive(self, engine: Engine, feeds: Feeds, tokens: Tokens) -> None:
        """Enqueues the reception of a step's input, where it comes from another GPU."""
        if self.link is not None and self.source is not None:
            pointer, nbytes = feeds.buffers[engine.main].pointer, feeds.nbytes(engine.main, tokens)
            self.link.receive(pointer, nbytes, self.source, engine.stream.handle)

    def send(self, engine: Engine, feeds: Feeds, tokens: Tokens) -> None:
        """Enqueues the sending of a step's output, where it goes to another GPU."""
        if self.link is not None and self.to is not None:
            pointer, nbytes = feeds.buffers[engine.output].pointer, feeds.nbytes(engine.output, tokens)
            self.link.send(pointer, nbytes, self.to, engine.stream.handle)
