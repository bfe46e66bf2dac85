"""What was compared with what, for the report: programs, their sizes and times, the machine, versions."""

from __future__ import annotations

import platform
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from moecompiler import __version__
from moecompiler.comparison.engine_runs import EngineRun
from moecompiler.comparison.result import REFERENCE, Meta, ProgramInfo
from moecompiler.tools.bench_quantized_engines import format_of
from moecompiler.tools.comparison.request import Request, Text
from moecompiler.tools.comparison.sides import Side
from moecompiler.tools.job import Job
from moecompiler.validation.scenario import Scenario

_LIBRARIES = ("onnx", "onnxruntime", "polygraphy", "tensorrt", "torch", "triton")


def describe(
    sides: tuple[Side, Side],
    scenario: Scenario,
    text: Text,
    request: Request,
    runs: dict[str, EngineRun],
    reference: str,
    interpreted: frozenset[str],
) -> Meta:
    """``runs``: of the engines that were run; ``reference``: what PyTorch held; ``interpreted``: programs whose times say
    nothing."""
    job = sides[0].job
    same_format = format_of(sides[1].job.quantization) == format_of(job.quantization)
    return Meta(
        model_name(job),
        job.model.num_hidden_layers,
        job.model.num_local_experts,
        job.model.num_experts_per_tok,
        _both(*(side.job.export.dtype for side in sides)),
        format_of(job.quantization) if same_format else _both(*(format_of(side.job.quantization) for side in sides)),
        _both(*(str(side.job.mapping) for side in sides)),
        _both(*(side.backend for side in sides)),
        text.source,
        request.seed,
        sum(scenario.prompt_lengths) + scenario.decode_steps * len(scenario.prompt_lengths),
        sum(scenario.prompt_lengths),
        machine(sides),
        datetime.now(UTC).isoformat(timespec="seconds"),
        {"moecompiler": __version__} | libraries(),
        (
            _reference(job, reference),
            *(program_info(side, runs.get(side.name), scenario, interpreted) for side in sides),
        ),
    )


def program_info(side: Side, run: EngineRun | None, scenario: Scenario, interpreted: frozenset[str]) -> ProgramInfo:
    """Sizes are of all ranks together."""
    plan, weights = (None, None) if side.planned is not None else _sizes(side)
    timed = run if side.name not in interpreted else None
    batch = min(len(scenario.tokens), side.limits.max_batch_size)
    decode = float(np.median(timed.decode_s)) if timed is not None and timed.decode_s else None
    return ProgramInfo(
        side.name,
        side.label,
        str(side.engines.directory),
        side.backend,
        str(side.engines.header.get("runtime", "")),
        side.job.export.dtype,
        format_of(side.job.quantization),
        str(side.job.mapping),
        dict(Counter(side.plugins.values())),
        plan,
        weights,
        side.build_seconds,
        batch,
        1e3 * timed.prefill_s if timed is not None else None,
        1e3 * decode if decode is not None else None,
        batch / decode if decode else None,
    )


def _sizes(side: Side) -> tuple[int, int]:
    """Bytes of plans, or of graphs, and of weights apart from them."""
    ranks = range(side.engines.world_size)
    files = {name: record.bytes for rank in ranks for name, record in side.engines.rank_files(rank).items()}
    ends = ".plan" if side.backend == "tensorrt" else ".onnx"
    plan = sum(size for name, size in files.items() if name.endswith(ends))
    return plan, sum(size for name, size in files.items() if name.endswith(".safetensors"))


def _reference(job: Job, held: str) -> ProgramInfo:
    where = job.source.get("model_dir", "dummy weights")
    return ProgramInfo(
        REFERENCE, "PyTorch", str(where), "pytorch", f"torch {version('torch')}", "float32", held, "one rank", {}
    )


def model_name(job: Job) -> str:
    """The checkpoint's folder, or what dummy weights stand in for."""
    if "model_dir" in job.source:
        return Path(job.source["model_dir"]).absolute().name
    return f"dummy, {job.model.num_hidden_layers} layers of hidden size {job.model.hidden_size}"


def machine(sides: tuple[Side, Side]) -> str:
    """The processor, and the GPU of engines that run on one."""
    parts = [_processor()]
    gpus = {side.engines.header["made"]["gpu"] for side in sides if "made" in side.engines.header}
    return ", ".join([*parts, *sorted(gpus)])


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def libraries() -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _both(first: str, second: str) -> str:
    return first if first == second else f"{first} / {second}"
