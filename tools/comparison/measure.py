"""A comparison from its sides: engines, programs of the same graphs to look into, the reference, and what they say of each
other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from moecompiler.backends.base import EngineLimits
from moecompiler.checkpoint import Source
from moecompiler.comparison.capture import capture, rounded
from moecompiler.comparison.engine_runs import EngineRun, greedy, run_engine
from moecompiler.comparison.forced import force_routing
from moecompiler.comparison.layer_level import measure_layers
from moecompiler.comparison.model_level import greedy_texts, measure_model
from moecompiler.comparison.nodes import select
from moecompiler.comparison.observed import router_taps, tensors_of, watched_places, with_outputs
from moecompiler.comparison.op_level import Programs, measure_ops
from moecompiler.comparison.padded_reader import PaddedReader
from moecompiler.comparison.reference import ReferenceModel
from moecompiler.comparison.result import GreedyText, LayerLevel, ModelLevel, OpLevel, Replayed, RoutingLevel
from moecompiler.comparison.routing_level import measure_routing
from moecompiler.comparison.runners import OpenProgram
from moecompiler.comparison.runs import OpenSession, Run, observed_run
from moecompiler.comparison.sessions import ObservedSession, ProgramSession
from moecompiler.comparison.thresholds import Bounds
from moecompiler.errors import UserError
from moecompiler.graph import Program, load_program
from moecompiler.materializing import Materializer
from moecompiler.runtime.session import closing
from moecompiler.tools.comparison.openers import opener_of
from moecompiler.tools.comparison.request import Request, Text, prompts_of
from moecompiler.tools.comparison.sides import Side
from moecompiler.tools.run import load_rank
from moecompiler.validation.scenario import Scenario, Step
from moecompiler.weights import TensorReader, materialize


@dataclass
class Measuring:
    """What levels are measured with; what several of them need is made once. ``notes`` gets what a reader should know."""

    sides: tuple[Side, Side]
    reference_model: ReferenceModel
    reader: Source
    scenario: Scenario
    text: Text
    bounds: Bounds
    request: Request
    told: Callable[[str], None]
    notes: list[str] = field(default_factory=list)
    _reference: OpenSession | None = None
    _engine_runs: dict[str, EngineRun] = field(default_factory=dict)
    _reference_run: Run | None = None
    _runs: dict[str, Run] = field(default_factory=dict)

    @property
    def reference(self) -> OpenSession:
        if self._reference is None:
            self.told("PyTorch")
            self._reference = self.reference_model.sessions(self.reader)
        return self._reference

    def engine_runs(self) -> dict[str, EngineRun]:
        for side in self.sides:
            if side.name not in self._engine_runs:
                self.told(f"engines, {side.name}")
                opened = partial(_engine, side, self.request.threads)
                timed = not is_interpreted(side)
                self._engine_runs[side.name] = run_engine(opened, side.job.mapping, self.scenario, timed=timed)
        return {side.name: self._engine_runs[side.name] for side in self.sides}

    def opener(self, side: Side, reader: TensorReader) -> OpenProgram:
        """What runs graphs as the side's engines do."""
        folder, threads = self.request.work_dir / "programs", self.request.threads
        return opener_of(side.backend, side.switches, reader, folder, threads, side.tactics)

    def reference_run(self) -> Run:
        if self._reference_run is None:
            self._reference_run = observed_run(self.reference, self.reference_model.mapping, self.scenario)
        return self._reference_run

    def watched_runs(self) -> dict[str, Run]:
        """Both sides' graphs with more outputs, on the text."""
        for side in self.sides:
            if side.name not in self._runs:
                self._runs[side.name] = self.watched(side, self.reader, None)
        return {side.name: self._runs[side.name] for side in self.sides}

    def watched(self, side: Side, reader: TensorReader, forced: dict[int, np.ndarray] | None) -> Run:
        if side.backend != "onnxruntime" and side.job.mapping.world_size > 1:
            raise UserError(
                f"backend {side.backend}: graphs of several ranks are not looked into, which the layer and routing levels need:"
                " give --level op,model"
            )
        self.told(f"graphs with more outputs, {side.name}" + (", routing replayed" if forced else ""))
        programs = programs_of(side)
        opened = watched_sessions(side, programs, reader, self.opener(side, reader), self.scenario, forced is not None)
        return observed_run(opened, side.job.mapping, self.scenario, forced)


def measure_op_level(m: Measuring, told: Callable[[str], None]) -> OpLevel:
    """Raises: UserError where the sides are not two programs of the same graphs, or no node is asked for."""
    first, second = m.sides
    if first.source is None or second.source is None or first.source.directory != second.source.directory:
        raise UserError(
            "op level: nodes are compared where both programs are of the same graphs: leave it out (--level)"
        )
    programs = programs_of(first)
    wanted = {
        node.name
        for program in programs
        for node in select(program.model, m.request.layers, m.request.ops)
        if node.name in first.plugins
    }
    if not wanted:
        raise UserError("op level: no plugin of the graphs is of these --layers and --ops")
    step = m.scenario.steps()[0]
    captured = capture(programs, first.job.mapping, m.reader, step, wanted)
    openers = {side.name: m.opener(side, m.reader) for side in m.sides}
    timed = frozenset(side.name for side in m.sides if not is_interpreted(side))
    lengths = np.array(m.scenario.prompt_lengths)
    return measure_ops(captured, lengths, Programs(openers, timed), lambda rank: Materializer(m.reader), told)


def measure_layer_level(m: Measuring) -> LayerLevel:
    runs = m.watched_runs()
    return measure_layers(m.reference_run(), runs, m.scenario, _how(m, runs))


def _how(m: Measuring, runs: dict[str, Run]) -> str:
    """By how much the logits of what is looked into differ from those of the engines."""
    engines = m.engine_runs()
    parts = [
        f"{side.name} {float(np.abs(runs[side.name].logits - engines[side.name].logits).max()):.1e}" for side in m.sides
    ]
    return (
        "seen in programs of the same graphs with the modules' outputs as outputs of their own, not in the engines, which stay as"
        f" they are; their logits differ from the engines' by at most {', '.join(parts)}"
    )


def measure_model_level(m: Measuring) -> ModelLevel:
    logits = {name: run.logits for name, run in m.engine_runs().items()}
    return measure_model(m.reference_run().logits, logits, m.scenario, m.text.spoken, _greedy(m))


def _greedy(m: Measuring) -> tuple[GreedyText, ...]:
    limits = smallest(m.sides)
    prompts = prompts_of(m.text, limits, m.request.prompts, m.request.output_len)
    if not prompts:
        return ()
    m.told("greedy text")
    steps = m.request.output_len
    wanted = greedy(m.reference, m.reference_model.mapping, prompts, steps)
    programs = {
        side.name: greedy(partial(_engine, side, m.request.threads), side.job.mapping, prompts, steps)
        for side in m.sides
    }
    return greedy_texts(prompts, wanted, programs, m.text.spoken, m.bounds.tie)


def measure_routing_level(m: Measuring) -> RoutingLevel:
    reference, runs = m.reference_run(), m.watched_runs()
    top_k = m.sides[0].job.model.num_experts_per_tok
    replayed = _replayed(m, reference) if m.request.replay else None
    return measure_routing(reference, runs, m.scenario, top_k, m.bounds.margin, m.text.spoken, replayed)


def _replayed(m: Measuring, free: Run) -> Replayed | None:
    """None, and a note, where it cannot be."""
    dtype = m.sides[0].job.export.dtype
    forced = {layer: rounded(logits, dtype).astype(np.float32) for layer, logits in free.routed.items()}
    try:
        runs = {
            side.name: m.watched(side, PaddedReader(m.reader, side.job.model.hidden_size), forced) for side in m.sides
        }
    except UserError as error:
        m.notes.append(str(error))
        return None
    reference = observed_run(m.reference, m.reference_model.mapping, m.scenario, forced)
    how = (
        f"the reference's router logits, rounded to {dtype}, are an input of both programs' graphs and of the reference: fused"
        " ops get them as features of their tokens that their routers alone read (comparison.forced)"
    )
    layers = measure_layers(reference, runs, m.scenario, how)
    logits = {name: run.logits for name, run in runs.items()}
    return Replayed(how, layers, measure_model(reference.logits, logits, m.scenario, m.text.spoken))


def programs_of(side: Side) -> list[Program]:
    """Of all ranks. Raises: UserError where the graphs are not at hand."""
    if side.source is None:
        raise UserError(
            f"{side.engines.directory}: holds engines without the graphs they were built from, which all levels but model need:"
            " give --level model, or a directory with optimize/ in it"
        )
    return [load_program(side.source.path(f"rank{rank}.onnx")) for rank in range(side.source.world_size)]


def watched_sessions(
    side: Side,
    programs: Sequence[Program],
    reader: TensorReader,
    opener: OpenProgram,
    scenario: Scenario,
    replayed: bool,
) -> OpenSession:
    """Sessions of a side's graphs with more outputs."""
    dtype = side.job.export.dtype
    steps = scenario.steps()[:2]

    @contextmanager
    def opened(rank: int) -> Iterator[ObservedSession]:
        program = programs[rank]
        places = watched_places(program)
        taps = [] if replayed else router_taps(program, list(side.plugins))
        routers = {t.layer: materialize(t.router, reader).astype(np.float32) for t in taps if t.router is not None}
        wide = with_outputs(force_routing(program) if replayed else program, tensors_of(places, taps))
        with opener(wide, [_zeros(wide, step) for step in steps]) as runner:
            yield ProgramSession(runner, wide, side.limits, dtype, places, taps, routers)

    return opened


def _zeros(program: Program, step: Step) -> dict[str, np.ndarray]:
    """Inputs of the shapes that they have in a step."""
    from moecompiler.backends.onnxruntime_program import input_types

    sizes = dict(zip(("batch", "sequence"), step.position_ids.shape, strict=True))
    return {
        name: np.zeros([dim if isinstance(dim, int) else sizes[dim] for dim in shape], dtype)
        for name, (dtype, shape) in input_types(program).items()
    }


@contextmanager
def _engine(side: Side, threads: int, rank: int) -> Iterator[ObservedSession]:
    with closing(load_rank(side.engines, rank, threads, check_hashes=False)) as session:
        yield session  # type: ignore[misc]


def is_interpreted(side: Side) -> bool:
    """Whether its times are an interpreter's."""
    return side.backend == "onnxruntime" and bool(side.plugins)


def smallest(sides: Sequence[Side]) -> EngineLimits:
    """What all engines take."""
    limits = [side.limits for side in sides]
    return EngineLimits(
        min(each.max_batch_size for each in limits),
        min(each.max_input_len for each in limits),
        min(each.max_seq_len for each in limits),
        limits[0].vocab_size,
    )
