"""Backend ``tensorrt-rtx``: engines for RTX cards, built ahead of time on a machine that need not have one.

TensorRT-RTX has no plugins in Python: the bodies of our ops are inlined. Engines are built here and not run: that takes NVIDIA's
TensorRT-RTX runtime on such a card.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecompiler.atomic import temporary_path
from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.libraries import import_library
from moecompiler.backends.tensorrt_profiles import prefill_rows, profiles
from moecompiler.backends.tensorrt_program import BUILDER_SHARE, baked_bytes
from moecompiler.backends.tensorrt_rtx_program import Lowered, lower
from moecompiler.errors import UserError
from moecompiler.graph import Program, floating_type, point_weights_at
from moecompiler.packing import pack
from moecompiler.room import PROCESS
from moecompiler.weights import NO_WEIGHTS, Recipe, TensorReader

if TYPE_CHECKING:
    from moecompiler.runtime.session import StageSession

DEFAULT_CAPABILITIES = ("8.9", "12.0")  # GeForce RTX 40 and 50
_WEIGHTS_SHARE = 0.5  # of a build's progress, the rest is the builder's


class TensorRTRTXBackend:
    """See ``base.Backend``. TensorRT-RTX is imported when one of its methods is called."""

    name = "tensorrt-rtx"

    def version(self) -> str:
        return f"tensorrt-rtx {import_tensorrt_rtx().__version__}"

    def header(self) -> dict[str, Any]:
        return {}

    def notes(self, dtype: str, settings: BuildSettings) -> list[str]:
        """Where the engines run. Raises: UserError where TensorRT-RTX is not installed or does not build with such settings."""
        if settings.plugins.insists:
            raise UserError(
                f"--plugins {settings.plugins}: backend tensorrt-rtx has no plugins and inlines every op's body;"
                " leave plugins at auto, or give --backend tensorrt"
            )
        import_tensorrt_rtx()
        from moecompiler.backends.tensorrt_rtx_build import capabilities

        names = _capabilities(settings)
        capabilities(names)
        if "7.5" in names and dtype != "float16":
            raise UserError(
                f"--compute_capability {','.join(names)}: cards of 7.5 multiply matrices in float16 alone, not {dtype};"
                " give --dtype float16, or leave 7.5 out"
            )
        return [
            f"engines run on RTX cards of compute capability {' and '.join(names)}, in NVIDIA's TensorRT-RTX runtime"
        ]

    def identity(self, settings: BuildSettings) -> dict[str, Any]:
        return {
            "limits": settings.limits.to_json(),
            "compute_capabilities": list(_capabilities(settings)),
            "moe_weights": settings.moe_weights,
        }

    def compute_dtype(self, dtype: str) -> str:
        return dtype

    def build(
        self,
        program: Program,
        reader: TensorReader,
        stem: str,
        directory: Path,
        settings: BuildSettings,
        progress: Callable[[float], None],
        shared: str | None = None,
    ) -> dict[str, Path]:
        """Writes ``stem.plan``, ``stem.engine.json`` (what the plan is for and how it is fed), ``stem.onnx`` (what the parser
        read, without weights) and, with external weights, ``stem.safetensors``."""
        lowered = lower(program, settings, floating_type(program))
        names = ["engine.json", "onnx", *(["safetensors"] if lowered.bound else [])]
        staged = {f"{stem}.{name}": temporary_path(directory / f"{stem}.{name}") for name in names}
        begun = 0.0
        try:
            if lowered.bound:
                begun = _WEIGHTS_SHARE / 2
                bound = [(staged[f"{stem}.safetensors"], lowered.bound)]
                pack(bound, reader, lambda fraction: progress(begun * fraction))
            record = {
                "compute_capabilities": _capabilities(settings),
                "tensorrt_rtx": import_tensorrt_rtx().__version__,
                "prefill_rows": prefill_rows(settings.limits),
                "bound": list(lowered.bound),
                "aliases": dict(lowered.aliases),
                "communicator": lowered.group,
                "notes": list(lowered.notes),
                "shared": shared,
            }
            staged[f"{stem}.onnx"].write_bytes(_without_weights(lowered))
            staged[f"{stem}.engine.json"].write_text(json.dumps(record, indent=1))
            if shared is None:
                staged |= _build_plan(
                    lowered,
                    reader,
                    stem,
                    directory,
                    settings,
                    lambda fraction: progress(begun + (1 - begun) * fraction),
                )
        except BaseException:
            for path in staged.values():
                path.unlink(missing_ok=True)
            raise
        progress(1.0)
        return staged

    def build_memory(self, weights: Mapping[str, Recipe], settings: BuildSettings) -> int:
        """See ``base.Backend``."""
        return PROCESS + int(BUILDER_SHARE * baked_bytes(weights, settings))

    def shared_graph(self, program: Program, settings: BuildSettings) -> str | None:
        """See ``base.Backend``: where every weight is bound."""
        if settings.moe_weights != "all":
            return None
        lowered = lower(program, settings, floating_type(program))
        return None if lowered.program.weights else hashlib.sha256(_without_weights(lowered)).hexdigest()

    def build_shared(
        self,
        program: Program,
        stem: str,
        directory: Path,
        settings: BuildSettings,
        progress: Callable[[float], None],
    ) -> dict[str, Path]:
        """See ``base.Backend``: the plan."""
        lowered = lower(program, settings, floating_type(program))
        return _build_plan(lowered, NO_WEIGHTS, stem, directory, settings, progress)

    def load(self, directory: Path, stem: str, limits: EngineLimits, threads: int, device: int = 0) -> StageSession:
        """Raises: UserError, always."""
        raise UserError(
            f"{directory}: holds engines for RTX cards, which run in NVIDIA's TensorRT-RTX runtime and not here;"
            " to run the model here, build it with --backend onnxruntime or tensorrt"
        )


def import_tensorrt_rtx() -> Any:
    """The module. Raises: UserError where it is not installed, or does not load."""
    return import_library("tensorrt_rtx", "TensorRT-RTX", "tensorrt-rtx")


def _build_plan(
    lowered: Lowered,
    reader: TensorReader,
    stem: str,
    directory: Path,
    settings: BuildSettings,
    progress: Callable[[float], None],
) -> dict[str, Path]:
    import_tensorrt_rtx()
    from moecompiler.backends.tensorrt_rtx_build import build_plan

    staged = temporary_path(directory / f"{stem}.plan")
    graph, baked = (temporary_path(directory / f"{stem}.{name}") for name in ("parsed", "baked"))
    try:
        pack([(baked, lowered.program.weights)], reader, lambda fraction: progress(_WEIGHTS_SHARE * fraction))
        model = point_weights_at(lowered.program, baked.name).model
        graph.write_bytes(model.SerializeToString(deterministic=True))
        plan = build_plan(
            graph,
            profiles(model.graph.input, settings.limits),
            [node.name for node in model.graph.node],
            _capabilities(settings),
            lambda fraction: progress(_WEIGHTS_SHARE + (1 - _WEIGHTS_SHARE) * fraction),
        )
    finally:
        graph.unlink(missing_ok=True)
        baked.unlink(missing_ok=True)
    staged.write_bytes(plan.data)
    return {f"{stem}.plan": staged}


def _without_weights(lowered: Lowered) -> bytes:
    return lowered.program.model.SerializeToString(deterministic=True)


def _capabilities(settings: BuildSettings) -> tuple[str, ...]:
    return settings.compute_capabilities or DEFAULT_CAPABILITIES
