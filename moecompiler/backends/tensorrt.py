"""Backend ``tensorrt``: engines are TensorRT plans, fused ops are plugins whose kernels the plans carry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecompiler.atomic import is_temporary, temporary_path
from moecompiler.backends.base import BuildSettings, EngineLimits, PluginLibrary
from moecompiler.backends.libraries import import_library
from moecompiler.backends.tensorrt_profiles import prefill_rows, profiles
from moecompiler.backends.tensorrt_program import BUILDER_SHARE, Prepared, Tidy, baked_bytes, prepare, serialized
from moecompiler.backends.tensorrt_record import Made, Record, check_fits
from moecompiler.graph import ONNX_DTYPES, Program, exchanges, floating_type
from moecompiler.packing import pack
from moecompiler.plugin_switches import Mode
from moecompiler.room import PROCESS
from moecompiler.weights import NO_WEIGHTS, Recipe, TensorReader

if TYPE_CHECKING:
    from moecompiler.backends.tensorrt_session import TensorRTSession

_WEIGHTS_SHARE = 0.3  # of a build's progress, the rest is the builder's


class TensorRTBackend:
    """See ``base.Backend``. TensorRT is imported, and a GPU looked for, when one of its methods is called. ``device``: number of
    the GPU that engines are built on, counted round; that becomes the current one.
    """

    name = "tensorrt"

    def __init__(self, plugins: PluginLibrary | None, tidy: Tidy = lambda program: program, device: int = 0):
        self._plugins, self._tidy, self._device = plugins, tidy, device

    @cached_property
    def _made(self) -> Made:
        from moecompiler.runtime.device import Device

        version = import_tensorrt().__version__
        info = Device(self._device).info()
        return Made(version, info.sm, info.name, info.driver)

    def version(self) -> str:
        return f"tensorrt {self._made.tensorrt}"

    def header(self) -> dict[str, Any]:
        return {"made": asdict(self._made)}

    def notes(self, dtype: str, settings: BuildSettings) -> list[str]:
        """Nothing to say. Raises: UserError where there is no TensorRT or no GPU, or where plugins would be corrupt."""
        assert self._made
        if settings.plugins.mode("", "") is not Mode.OFF:
            self._library().register()
        return []

    def identity(self, settings: BuildSettings) -> dict[str, Any]:
        return asdict(self._made) | {
            "limits": settings.limits.to_json(),
            "plugins": str(settings.plugins),
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
        """Writes ``stem.plan``, ``stem.engine.json`` (``Record``), ``stem.layers.json`` (the inspector's), ``stem.timing`` (for
        later builds), ``stem.onnx`` (what the parser read, weights by reference); with external expert weights
        ``stem.safetensors``; on the last stage ``stem.sampling``, the kernels that choose tokens; and with collectives
        ``stem.collectives``, the kernels that ranks of a node exchange by."""
        prepared = self._prepare(program, settings)
        names = ["engine.json", "onnx", *(["safetensors"] if prepared.bound else [])]
        staged = {f"{stem}.{name}": temporary_path(directory / f"{stem}.{name}") for name in names}
        if prepared.bound:
            bound = [(staged[f"{stem}.safetensors"], prepared.bound)]
            pack(bound, reader, lambda fraction: progress(_WEIGHTS_SHARE / 2 * fraction))
        record = Record(
            self._made,
            prefill_rows(settings.limits),
            tuple(prepared.bound),
            dict(prepared.plugins),
            dict(prepared.aliases),
            shared,
        )
        staged[f"{stem}.engine.json"].write_text(
            json.dumps(record.to_json() | {"notes": list(prepared.notes)}, indent=1)
        )
        staged[f"{stem}.onnx"].write_bytes(serialized(prepared, f"{stem}.baked"))
        if shared is not None:
            return staged
        begun = _WEIGHTS_SHARE / 2 if prepared.bound else 0.0
        return staged | self._build_plan(
            prepared, reader, stem, directory, settings, lambda fraction: progress(begun + (1 - begun) * fraction)
        )

    def build_memory(self, weights: Mapping[str, Recipe], settings: BuildSettings) -> int:
        """See ``base.Backend``."""
        return PROCESS + int(BUILDER_SHARE * baked_bytes(weights, settings))

    def shared_graph(self, program: Program, settings: BuildSettings) -> str | None:
        """See ``base.Backend``: where every weight is bound."""
        if settings.moe_weights != "all":
            return None
        prepared = self._prepare(program, settings)
        return None if prepared.program.weights else hashlib.sha256(serialized(prepared, "")).hexdigest()

    def build_shared(
        self,
        program: Program,
        stem: str,
        directory: Path,
        settings: BuildSettings,
        progress: Callable[[float], None],
    ) -> dict[str, Path]:
        """See ``base.Backend``: of what ``build`` writes, the plan, layers, timing and kernels."""
        return self._build_plan(self._prepare(program, settings), NO_WEIGHTS, stem, directory, settings, progress)

    def _prepare(self, program: Program, settings: BuildSettings) -> Prepared:
        return prepare(program, settings, floating_type(program), self._made.sm, self._library(), self._tidy)

    def _build_plan(
        self,
        prepared: Prepared,
        reader: TensorReader,
        stem: str,
        directory: Path,
        settings: BuildSettings,
        progress: Callable[[float], None],
    ) -> dict[str, Path]:
        from moecompiler.backends.tensorrt_build import build_plan

        if prepared.plugins:
            self._library().register()
        kernels = {
            "sampling": self._compile_sampling(prepared.program),
            "collectives": self._compile_collectives(prepared),
        }
        kept = {name: data for name, data in kernels.items() if data is not None}
        names = ["plan", "layers.json", "timing", *kept]
        staged = {f"{stem}.{name}": temporary_path(directory / f"{stem}.{name}") for name in names}
        parsed, baked = (temporary_path(directory / f"{stem}.{name}") for name in ("parsed", "baked"))
        try:
            pack([(baked, prepared.program.weights)], reader, lambda fraction: progress(_WEIGHTS_SHARE * fraction))
            model = prepared.program.model
            parsed.write_bytes(serialized(prepared, baked.name))
            plan = build_plan(
                parsed,
                profiles(model.graph.input, settings.limits),
                [node.name for node in model.graph.node],
                kept_timings(directory),
                bool(prepared.aliases),
                lambda fraction: progress(_WEIGHTS_SHARE + (1 - _WEIGHTS_SHARE) * fraction),
            )
        finally:
            parsed.unlink(missing_ok=True)
            baked.unlink(missing_ok=True)
        staged[f"{stem}.plan"].write_bytes(plan.data)
        staged[f"{stem}.layers.json"].write_text(plan.layers)
        staged[f"{stem}.timing"].write_bytes(plan.timing)
        for name, data in kept.items():
            staged[f"{stem}.{name}"].write_bytes(data)
        return staged

    def load(self, directory: Path, stem: str, limits: EngineLimits, threads: int, device: int = 0) -> TensorRTSession:
        """See ``base.Backend``; the caller has compared the plan's hash with the manifest's."""
        from moecompiler.runtime.device import Device

        record = Record.load(directory / f"{stem}.engine.json")
        here = Device(device)
        info = here.info()
        check_fits(record.made, Made(import_tensorrt().__version__, info.sm, info.name, info.driver), directory)
        if record.plugins:
            self._library().register()
        from moecompiler.backends.tensorrt_session import TensorRTSession

        kept = {name: directory / f"{record.shared or stem}.{name}" for name in ("sampling", "collectives")}
        data = {name: path.read_bytes() for name, path in kept.items() if path.is_file()}
        sampling = self._library().load_sampling(data["sampling"]) if "sampling" in data else None
        collectives = self._library().load_collectives(data["collectives"]) if "collectives" in data else None
        return TensorRTSession(directory, stem, record, limits, here, sampling, collectives)

    def _compile_collectives(self, prepared: Prepared) -> bytes | None:
        """None where the program has no collectives."""
        if not any(map(exchanges, prepared.plugins.values())):
            return None
        return self._library().compile_collectives(floating_type(prepared.program), self._made.sm)

    def _compile_sampling(self, program: Program) -> bytes | None:
        """None where the program's output are not the logits of one token of each sequence."""
        output = program.model.graph.output[0]
        dims = output.type.tensor_type.shape.dim
        names = {code: name for name, code in ONNX_DTYPES.items()}
        if output.name != "logits" or len(dims) != 2 or not dims[-1].dim_value:
            return None
        dtype = names[output.type.tensor_type.elem_type]
        return self._library().compile_sampling(dims[-1].dim_value, dtype, self._made.sm)

    def _library(self) -> PluginLibrary:
        if self._plugins is None:
            raise ValueError("backend tensorrt was made without a plugin library")
        return self._plugins


def kept_timings(directory: Path) -> list[bytes]:
    """What builds before this one have timed; another rank's may be replaced while it is looked for."""
    found = []
    for path in sorted(directory.glob("*.timing")):
        if not is_temporary(path):
            with suppress(FileNotFoundError):
                found.append(path.read_bytes())
    return found


def import_tensorrt() -> Any:
    """The module. Raises: UserError where it is not installed, or does not load."""
    return import_library("tensorrt", "TensorRT", "tensorrt")
