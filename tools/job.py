"""What the steps of a compile share: which model, split how, exported how, and where its weights are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moecompiler.artifact import Artifact
from moecompiler.atomic import is_temporary
from moecompiler.calibration.result import Calibration
from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import ExportOptions, ModelConfig, load_config
from moecompiler.dummy import DummyCheckpoint
from moecompiler.errors import UserError
from moecompiler.manifest import LOCK, MANIFEST
from moecompiler.mapping import Mapping, check_mapping
from moecompiler.quantization.as_json import recipe_from_json, recipe_to_json
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.tools.flags import GraphFlags, MappingFlags, QuantizationFlags, SourceFlags
from moecompiler.tools.kv_cache import with_cache
from moecompiler.tools.quantization import held_or_asked

_NOTHING = QuantizationFlags()


@dataclass(frozen=True)
class Job:
    """``source``: the identity of the checkpoint, see ``checkpoint.Source.identity``. ``quantization``: which of its weights
    engines are to hold as codes, those included that the checkpoint holds so itself; None: none."""

    model: ModelConfig
    mapping: Mapping
    export: ExportOptions
    source: dict[str, Any]
    quantization: QuantizationRecipe | None = None

    def header(self) -> dict[str, Any]:
        return {
            "model": self.model.to_json(),
            "mapping": self.mapping.to_json(),
            "export": self.export.to_json(),
            "source": self.source,
            "quantization": None if self.quantization is None else recipe_to_json(self.quantization),
        }

    @staticmethod
    def of(artifact: Artifact) -> Job:
        header = artifact.header
        quantization = header.get("quantization")
        return Job(
            ModelConfig.from_json(header["model"]),
            Mapping(**header["mapping"]),
            ExportOptions.from_json(header["export"]),
            header["source"],
            None if quantization is None else recipe_from_json(quantization),
        )


def resolve_source(flags: SourceFlags) -> tuple[ModelConfig, dict[str, Any]]:
    """The model and the identity of its weights: a checkpoint's, or dummy ones.

    Raises: UserError where neither or both are given, or the checkpoint does not hold the model its config describes.
    """
    model_dir, model, num_layers = flags.model_dir, flags.model, flags.num_layers
    if model_dir is not None and model is not None:
        raise UserError("--model_dir and --model exclude each other: real weights, or dummy ones")
    if model_dir is not None:
        if not model_dir.is_dir():
            found = "is not a directory" if model_dir.exists() else "not found"
            raise UserError(f"--model_dir {model_dir}: {found}; give the folder of a Hugging Face checkpoint")
        config = load_config(model_dir).with_layers(num_layers)
        return config, open_checkpoint(model_dir, config, check_finite=flags.check_finite).identity()
    if model is None:
        raise UserError("give --model_dir, or --model 8x7b, 8x22b or a config.json for dummy weights")
    config = load_config(model).with_layers(num_layers)
    return config, DummyCheckpoint(config, flags.dummy_seed, config.dtype).identity()


def resolve_export(config: ModelConfig, flags: GraphFlags) -> ExportOptions:
    """Raises: UserError where the cache could not hold a token and its successor."""
    from moecompiler.config import NormalizationMode

    name = flags.moe_normalization_mode
    mode = NormalizationMode(int(name)) if name.isdigit() else NormalizationMode[name.upper()]
    slots = min(config.max_position_embeddings, 2048) if flags.max_seq_len is None else flags.max_seq_len
    if not 2 <= slots <= config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {slots}: give 2 to {config.max_position_embeddings}, the model's max_position_embeddings"
        )
    dtype = config.dtype if flags.dtype == "auto" else flags.dtype.value
    return ExportOptions(dtype, mode, slots, flags.gather_context_logits)


def make_job(
    source: SourceFlags,
    parallel: MappingFlags,
    graph: GraphFlags,
    quantization: QuantizationFlags = _NOTHING,
    measure: Callable[[ModelConfig, dict[str, Any], ExportOptions], Calibration] | None = None,
) -> Job:
    """What is asked for. ``measure`` calibrates the model, where FP8 needs static scales and none are given.

    Raises: UserError where there is no such model, or it cannot be split or quantized so; as ``measure``.
    """
    mapping = Mapping.create(parallel.tp_size, parallel.pp_size, parallel.moe_tp_size, parallel.moe_ep_size)
    config, identity = resolve_source(source)
    export = resolve_export(config, graph)
    check_mapping(config, mapping)
    measured = None if measure is None else partial(measure, config, identity, export)
    recipe = held_or_asked(quantization, config, mapping, identity, measured)
    recipe = with_cache(recipe, quantization, config, identity, measured)
    return Job(config, mapping, export, identity, recipe)


def ranks_asked_for(world_size: int, rank: int | None) -> list[int]:
    """All ranks, or the one of ``--rank``. Raises: UserError where there is no such rank."""
    if rank is None:
        return list(range(world_size))
    if not 0 <= rank < world_size:
        raise UserError(f"--rank {rank}: the world has ranks 0 to {world_size - 1}")
    return [rank]


def check_engine_dir(directory: Path) -> None:
    """Refuses, before anything is put into it, a directory that engines and the stages before them cannot go to.

    Raises: UserError where it holds files of someone else, or what another step wrote.
    """
    if (directory / MANIFEST).exists():
        Artifact.open(directory, ("engine",))
        return
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name not in ("export", "optimize", LOCK) and not is_temporary(path):
            raise UserError(
                f"{directory}: holds files of someone else ({path.name}); give an empty or new --output_dir"
            )


def code_fingerprint() -> str:
    """SHA-256 of the program's own sources: what an older version of a pass made is not taken for this one's."""
    import moecompiler
    import moecompiler.passes
    import moecompiler.plugins

    digest = hashlib.sha256()
    for package in (moecompiler, moecompiler.passes, moecompiler.plugins):
        (folder,) = (Path(each) for each in package.__path__)
        for source in sorted(folder.rglob("*.py")):
            digest.update(f"{source.relative_to(folder)}\n".encode() + source.read_bytes())
    return digest.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of ``packages``, without importing them."""
    return {package: version(package) for package in packages}
