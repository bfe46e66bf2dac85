"""Where an error enters: each part of a rank's graph alone, fed with the reference's values.

The graph is cut at the boundaries that ``export`` names. A part gets the reference's tensors, so an error shows in the part
that makes it and in no later one; and it is cut out rather than watched from outside, since marking an inner tensor as an
output changes what the backend fuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from moecompiler.cutting import cut
from moecompiler.graph import load_program, output_of
from moecompiler.runtime.communicator import Communicator, using_communicator
from moecompiler.validation.difference import relative_errors
from moecompiler.validation.place import RankPlace
from moecompiler.validation.recording import RecordingCommunicator
from moecompiler.validation.reference_run import RankStep
from moecompiler.validation.runners import as_engine_type
from moecompiler.validation.tolerances import Tolerance


@dataclass(frozen=True)
class PartReport:
    """The relative error ``‖a - b‖ / ‖b‖`` of one part of one rank, the worst token's but for the outliers that the tolerance
    allows: of what all ranks of its group made together, and of this rank's own share of the sum (the same where nothing is
    summed)."""

    rank: int
    module: str
    relative: float
    own_relative: float
    passed: bool


def localize(
    directory: Path,
    open_part: Callable[[onnx.ModelProto], onnxruntime.InferenceSession],
    place: RankPlace,
    records: Sequence[RankStep],
    tolerance: Tolerance,
    communicator: Communicator,
) -> list[PartReport]:
    """Runs every part of one rank's engine, which is in ``directory``. Its peers must do the same meanwhile."""
    model = load_program(directory / f"rank{place.rank}.onnx").model
    recorder = RecordingCommunicator(communicator)
    reports = []
    for name in _cuts(model, place):
        part = cut(model, [name], stops={*records[0].inner})
        session = open_part(part)
        wanted = {value.name: value.type for value in session.get_inputs()}
        errors, own_errors = [], []
        for record in records:
            known = record.feeds | record.inner
            feeds = {each: as_engine_type(known[each], kind) for each, kind in wanted.items()}
            recorder.last = None
            with using_communicator(recorder):
                (value,) = session.run([name], feeds)
            reference = (record.inner | record.outputs)[name]
            errors.append(relative_errors(value, reference))
            partial, own = record.partials.get(name), recorder.last
            if partial is not None and own is not None:
                own_errors.append(relative_errors(own.reshape(partial.shape), partial))
            else:
                own_errors.append(errors[-1])
        module = "lm_head" if name == "logits" else name.removesuffix("/output")
        worst, own_worst = (tolerance.worst(np.concatenate(each)) for each in (errors, own_errors))
        passed = worst <= tolerance.norm and own_worst <= tolerance.norm
        reports.append(PartReport(place.rank, module, worst, own_worst, passed))
    return reports


def _cuts(model: onnx.ModelProto, place: RankPlace) -> list[str]:
    """The boundaries that are still in the graph, from its start to its end."""
    there = {name for node in model.graph.node for name in node.output}
    names = [output_of("model.embed_tokens")]
    for layer in place.layers:
        names += [output_of(f"model.layers.{layer}.self_attn"), output_of(f"model.layers.{layer}.mlp")]
    if place.main_output == "logits":
        names.append("logits")
    return [name for name in names if name in there]
