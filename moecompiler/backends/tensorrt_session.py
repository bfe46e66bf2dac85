"""One rank's TensorRT engine, running: KV cache on the GPU, prefill by slices of the batch, decode as one CUDA graph.

A decode step of one batch bucket and one turn of the caches, with the choice of tokens or without, is one graph, captured when
it runs for the second time (the first loads what it needs, and shows whether ranks exchange anything by way of the host, which
no graph can hold). Where this stage is all there is, such a step hands its tokens and positions to the next one on the GPU, and
the host, which only looks at the tokens, is a step behind.

A batch may come in parts, each of the same sequences from ``start`` on. A part decodes in exactly its rows, since the rows that
would fill up a bucket are the next part's; it has feeds, contexts and graphs of its own. Linked, hidden states come from and go
to other ranks' GPUs on the stream itself, before and after the graph: both sides would have to capture a message, or neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.sampling_kernels import SamplingKernels
from moecompiler.backends.tensorrt_cache import Caches
from moecompiler.backends.tensorrt_engine import Engine
from moecompiler.backends.tensorrt_feeds import Feeds
from moecompiler.backends.tensorrt_link import Neighbours
from moecompiler.backends.tensorrt_profiles import DECODE, PREFILL, bucket_of
from moecompiler.backends.tensorrt_record import Record
from moecompiler.backends.tensorrt_sampling import DeviceSampling
from moecompiler.graph import exchanges
from moecompiler.runtime.collective_kernels import CollectiveKernels
from moecompiler.runtime.communicator import current_ways
from moecompiler.runtime.device import Buffer, Device, at_the_end
from moecompiler.runtime.device_link import DeviceLink
from moecompiler.runtime.sampling import Sampler
from moecompiler.runtime.session import Sampled

_PREFILL = "prefill"
_NOTHING = np.empty(0, np.float32)
_MOST_CONTEXTS = (
    64  # of decode steps, each with a graph or two: batches of every size, in parts of every size, would be more
)


class TensorRTSession:
    """See ``runtime.session.SamplingSession``. ``device`` is current for the thread that uses the session; ``sampling``: the
    kernels of an engine whose output are logits; ``collectives``: those of an engine that exchanges something with other ranks.

    Raises: UserError where the plan cannot be loaded, or the GPU has no room.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        record: Record,
        limits: EngineLimits,
        device: Device,
        sampling: SamplingKernels | None = None,
        collectives: CollectiveKernels | None = None,
    ):
        self.max_batch_size, self.max_input_len = limits.max_batch_size, limits.max_input_len
        self.max_seq_len, self.vocab_size = limits.max_seq_len, limits.vocab_size
        self._prefill_rows, self._device = record.prefill_rows, device
        self._engine = Engine(directory, stem, record)
        # when the interpreter ends, what was made last goes first: this before the stream that TensorRT's objects use
        self._release = at_the_end(self, Engine.release, self._engine)
        self._caches = Caches(self._engine, self.max_batch_size, record.aliases)
        self._prefill_feeds = Feeds(self._engine, (self._prefill_rows, self.max_input_len))
        self._feeds = Feeds(self._engine, (self.max_batch_size, 1))
        self._part_feeds: dict[tuple[int, int], Feeds] = {}
        self._engine.make_context(_PREFILL, PREFILL)
        self._sampling = self._make_sampling(sampling, limits) if sampling is not None else None
        self._ran: set[Any] = set()
        self._batch, self._steps, self._keep_logits = 0, 0, False
        self._neighbours = Neighbours()
        self._exchanges = any(map(exchanges, record.plugins.values()))
        self.collective_kernels = collectives

    def close(self) -> None:
        """Gives all back; nothing else may be called then."""
        self._release()
        for name in ("_sampling", "_unread", "_caches", "_prefill_feeds", "_feeds", "_part_feeds", "_engine"):
            self.__dict__.pop(name, None)

    @property
    def can_sample(self) -> bool:
        return self._sampling is not None

    @property
    def input_types(self) -> dict[str, np.dtype]:
        """The dtype of every input that is not a weight."""
        return {name: self._engine.dtype(name) for name in (*self._engine.inputs, *self._engine.caches)}

    def link(self, link: DeviceLink, source: int | None, to: int | None) -> None:
        """See ``runtime.session.LinkedSession``."""
        self._neighbours = Neighbours(link, source, to)

    def start(self, batch: int) -> None:
        """Begins a batch with an empty KV cache."""
        if len(self._engine.contexts) > _MOST_CONTEXTS:
            self._forget_steps()
        self._batch = batch
        self._caches.start(self._rows(batch))

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> np.ndarray:
        """See ``StageSession.step``."""
        result = self.run(x, position_ids, last_token_ids, first)
        if self._neighbours.to is not None:
            return result
        if self._engine.output == "logits" and result.ndim == 3:
            result = result[np.arange(len(result)), last_token_ids]
        return result.astype(np.float32)

    def run(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> np.ndarray:
        """The engine's first output as it is, for all rows; nothing where it goes to another GPU."""
        arrays, batch = self._named(x, position_ids, last_token_ids), len(position_ids)
        sends = self._neighbours.to is not None
        if position_ids.shape[1] == 1:
            feeds = self._decode_feeds(batch, first)
            feeds.upload(arrays, self._rows(batch))
            context = self._decode(None, batch, first)
            result = _NOTHING if sends else feeds.download(context)[:batch]
        else:
            context = self._engine.contexts[_PREFILL]
            parts = [_NOTHING if sends else self._prefill_feeds.download(context) for _ in self._prefill(arrays, first)]
            result = np.concatenate(parts)
        self._check()
        return result

    def start_sampling(self, sampler: Sampler, prompts: list[list[int]], steps: int, keep_logits: bool) -> None:
        """See ``SamplingSession.start_sampling``."""
        self._sampler.start(sampler, prompts, steps)
        self._feeds.clear()  # rows that fill up a bucket feed tokens and positions too
        self._steps, self._keep_logits = steps, keep_logits

    def sample(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> Sampled:
        """See ``SamplingSession.sample``."""
        arrays, batch, logits = self._named(x, position_ids, last_token_ids), len(position_ids), list[np.ndarray]()
        if position_ids.shape[1] == 1:
            self._decode_feeds(batch, first).upload(arrays, self._rows(batch))
            return self._sampled(self._decode(self._sampler, batch, first), batch, first)
        context = self._engine.contexts[_PREFILL]
        last = np.take_along_axis(position_ids, last_token_ids[:, None], axis=1)
        self._engine.stream.upload(self._feeds.buffers["position_ids"].pointer + first * last.itemsize, last)
        for row, rows in self._prefill(arrays, first):
            self._sampler.enqueue(rows, first + row, self._prefill_feeds.buffers[self._engine.output].pointer)
            if self._keep_logits:
                logits.append(self._prefill_feeds.download(context).astype(np.float32))
        self._sampler.copy_out()
        return self._taken(batch, first, np.concatenate(logits) if logits else None)

    def sample_next(self) -> Sampled:
        """See ``SamplingSession.sample_next``."""
        sampler = self._sampler
        if not sampler.ahead:
            context = self._decode(sampler, self._batch, 0)
            if self._keep_logits:
                return self._sampled(context, self._batch, 0)
            sampler.copy_out()
        if sampler.steps < self._steps:
            self._decode(sampler, self._batch, 0)
            sampler.copy_out()
        return self._taken(self._batch, 0, None)

    def call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See ``runtime.session.CallableSession``."""
        self.start(len(feeds["position_ids"]))
        self._caches.write(feeds)
        missing = np.zeros(self._batch, np.int64)  # what only the last stage takes
        result = self.run(feeds[self._engine.main], feeds["position_ids"], feeds.get("last_token_ids", missing))
        outputs = {self._engine.output: result} | self._caches.read(self._batch)
        return {name: array.astype(np.float32) for name, array in outputs.items()}

    def _rows(self, batch: int) -> int:
        """Of the whole batch the bucket, where rows that fill it up write to cache rows that nobody reads; of a part its own."""
        return bucket_of(batch, self.max_batch_size) if batch == self._batch else batch

    def _decode_feeds(self, batch: int, first: int) -> Feeds:
        """Those of the batch, or of its first part, are what a device that is alone hands on to itself."""
        if first == 0:
            return self._feeds
        if (batch, first) not in self._part_feeds:
            self._part_feeds[batch, first] = Feeds(self._engine, (batch, 1))
        return self._part_feeds[batch, first]

    @property
    def _sampler(self) -> DeviceSampling:
        if self._sampling is None:
            raise ValueError("this session does not sample")
        return self._sampling

    def _named(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray) -> dict[str, np.ndarray]:
        arrays = {"position_ids": position_ids, "last_token_ids": last_token_ids}
        return arrays if self._neighbours.source is not None else arrays | {self._engine.main: x}

    def _forget_steps(self) -> None:
        """Lets contexts and graphs of decode steps go. Ranks have the same batches and do it together, so that a message is in a
        graph on all of them or on none."""
        engine = self._engine
        engine.stream.synchronize()
        engine.graphs.clear()
        for key in [key for key in engine.contexts if key != _PREFILL]:
            del engine.contexts[key]
        self._part_feeds.clear()
        self._ran.clear()

    def _sampled(self, context: Any, batch: int, first: int) -> Sampled:
        """What the decode step that was enqueued last gives."""
        self._sampler.copy_out()
        logits = None
        if self._keep_logits:
            logits = self._decode_feeds(batch, first).download(context)[:batch].astype(np.float32)
        return self._taken(batch, first, logits)

    def _taken(self, batch: int, first: int, logits: np.ndarray | None) -> Sampled:
        """The tokens that the device has chosen, once it has."""
        tokens = self._sampler.take(batch, first)
        self._check()
        return Sampled(tokens, logits)

    def _waits(self) -> int | None:
        """How many exchanges with other ranks have had to be waited for; None where nobody counts."""
        ways = current_ways()
        return None if ways is None else ways.waits

    def _check(self) -> None:
        """Raises: RuntimeError where what lies on the GPU is not to be used, since a peer did not come."""
        if self._exchanges and (ways := current_ways()) is not None:
            ways.check()

    def _prefill(self, arrays: Mapping[str, np.ndarray], first: int) -> Iterator[tuple[int, int]]:
        """Enqueues slices of a part of the batch, one after another: the first row of each in it, and how many there are. Waits
        for a slice before the next one, which goes through the same memory."""
        context, stream = self._engine.contexts[_PREFILL], self._engine.stream
        for row in range(0, len(arrays["position_ids"]), self._prefill_rows):
            part = {name: array[row : row + self._prefill_rows] for name, array in arrays.items()}
            rows, length = part["position_ids"].shape
            self._prefill_feeds.bind(context, (rows, length))
            self._caches.bind(context, rows, first, row)
            self._prefill_feeds.upload(part, rows)
            self._neighbours.receive(self._engine, self._prefill_feeds, (rows, length))
            self._engine.enqueue(_PREFILL)
            self._neighbours.send(self._engine, self._prefill_feeds, (rows, length))
            yield row, rows
            stream.synchronize()
        self._caches.advance(first)

    def _decode(self, sampling: DeviceSampling | None, batch: int, first: int) -> Any:
        """Enqueues one token of every sequence of a part, and the choice of the next: the step's context."""
        rows, feeds = self._rows(batch), self._decode_feeds(batch, first)
        key = rows, first, self._caches.turn(first)
        context = self._engine.contexts.get(key)
        if context is None:
            context = self._engine.make_context(key, DECODE)
            feeds.bind(context, (rows, 1))
            self._caches.bind(context, rows, first)

        def compute() -> None:
            self._engine.enqueue(key)

        def choose() -> None:
            if sampling is not None:
                sampling.enqueue(rows, first, feeds.buffers[self._engine.output].pointer)

        def both() -> None:
            compute()
            choose()

        self._neighbours.receive(self._engine, feeds, (rows, 1))
        if sampling is None:
            self._run((*key, None), compute)
        elif self._exchanges:  # a message is in a graph on all ranks or on none, and one of them alone chooses
            self._run((*key, None), compute)
            self._run((rows, first, "choice", sampling.greedy), choose)
        else:
            self._run((*key, sampling.greedy), both)
        self._neighbours.send(self._engine, feeds, (rows, 1))
        self._caches.advance(first)
        return context

    def _run(self, way: Any, work: Callable[[], None]) -> None:
        """Enqueues work that always is the same; as a graph from the second time on, where one can hold it."""
        graphs = self._engine.graphs
        if way not in graphs and way in self._ran:
            graphs[way] = self._engine.stream.capture(work)
        if way in graphs:
            graphs[way].launch(self._engine.stream)
            return
        waits = self._waits()
        work()
        if not self._exchanges or (waits is not None and waits == self._waits()):
            self._ran.add(way)

    def _make_sampling(self, kernels: SamplingKernels, limits: EngineLimits) -> DeviceSampling:
        vocab = self._engine.shape(self._engine.output)[-1]
        self._unread = Buffer(8 * self.max_batch_size)  # for tokens that a stage before this one is fed
        tokens = self._feeds.buffers.get("input_ids", self._unread)
        positions = self._feeds.buffers["position_ids"]
        return DeviceSampling(kernels, vocab, limits, self._engine.stream, tokens.pointer, positions.pointer)
