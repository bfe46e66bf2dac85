"""A Hugging Face Mixtral directory as tensors by name, all checked from the files' headers before any is read.

Tensors go by their published names (``model.layers.0.block_sparse_moe.experts.3.w1.weight``). Some checkpoints hold the
experts fused instead, as transformers 5 keeps them in memory (``modeling_mixtral.MixtralExperts``): ``gate_up_proj
[E, 2F, H]``, each expert's gate rows first, then its up rows, and ``down_proj [E, H, F]``. There a published tensor is still
one run of bytes, so either layout resolves to a file, an offset and a shape.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moecompiler.config import DTYPES, ModelConfig
from moecompiler.errors import UserError
from moecompiler.safetensors_file import StoredTensor, map_tensor, read_header
from moecompiler.weights import Shape, TensorReader

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
LISTED = 8  # how many names a message gives
FINITE_CHUNK = 1 << 22  # elements looked at together for NaN and infinity


class Source(TensorReader, Protocol):
    """Where weights come from: ``HFCheckpoint`` or ``dummy.DummyCheckpoint``."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, none where they are generated."""

    def dtype(self, name: str) -> str:
        """The dtype in which ``read`` gives the tensor."""

    def identity(self) -> dict[str, Any]:
        """What it takes to reopen this very source, JSON-able; see ``dummy.open_source``."""


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """The published names and shapes of the model's weights; ``lm_head.weight`` is absent where it is tied."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (q_size, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (kv_size, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (kv_size, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, q_size)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (config.num_local_experts, hidden)
        for expert in range(config.num_local_experts):
            shapes[f"{prefix}.block_sparse_moe.experts.{expert}.w1.weight"] = (inner, hidden)  # gate
            shapes[f"{prefix}.block_sparse_moe.experts.{expert}.w2.weight"] = (hidden, inner)  # down
            shapes[f"{prefix}.block_sparse_moe.experts.{expert}.w3.weight"] = (inner, hidden)  # up
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_box(name: str, whole: Shape, start: Shape, shape: Shape) -> None:
    """Raises ValueError where the box of ``shape`` at ``start`` does not lie in a tensor of shape ``whole``."""
    if not len(whole) == len(start) == len(shape) or any(
        a < 0 or n < 0 or a + n > size for a, n, size in zip(start, shape, whole, strict=True)
    ):
        raise ValueError(f"{name} {whole} has no box {shape} at {start}")


@dataclass(frozen=True)
class HFCheckpoint:
    """``tensors`` says by published name where each lies; ``stamp`` is the files' identity as they were opened."""

    config: ModelConfig
    tensors: dict[str, StoredTensor]
    stamp: dict[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(Path(self.stamp["model_dir"], name) for name in self.stamp["files"])

    def dtype(self, name: str) -> str:
        return self.tensors[name].dtype

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        """The box of ``shape`` at ``start``, in stored dtype: a read-only view of the mapped file.

        Raises: KeyError where the model has no such tensor, ValueError where the box is not in it, UserError where the
        file is gone.
        """
        stored = self.tensors[name]
        check_box(name, stored.shape, start, shape)
        return map_tensor(stored)[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]

    def identity(self) -> dict[str, Any]:
        return self.stamp


def open_checkpoint(model_dir: Path, config: ModelConfig, *, check_finite: bool = False) -> HFCheckpoint:
    """Opens the directory's safetensors files and checks, from their headers, that they hold the model of ``config``.

    ``config`` may be cut by ``with_layers``; the further layers are passed over. ``check_finite`` also reads every weight.
    Raises: UserError that lists what is missing, unexpected, held twice, of the wrong shape or dtype, or not finite.
    """
    names, weight_map = _find_files(model_dir)
    total_layers = _own_config(model_dir).get("num_hidden_layers", config.num_hidden_layers)
    stamp = _stamp(model_dir, names)
    headers = {name: read_header(model_dir / name) for name in names}
    stored: dict[str, StoredTensor] = {}
    twice = []
    for file, header in headers.items():
        twice += [f"{name} (in {stored[name].file.name} and {file})" for name in header if name in stored]
        stored |= header
    lacking = [f"{name} ({file})" for name, file in weight_map.items() if name not in headers[file]]
    wanted = {name: tensor for name, tensor in stored.items() if not _ignored(name, config, total_layers)}
    tensors, problems = _resolve(wanted, config)
    among_files = {"tensors held twice": twice, "tensors that the index puts into a file without them": lacking}
    _raise_problems(model_dir, among_files | problems)
    if check_finite:
        broken = [name for name, tensor in tensors.items() if not _is_finite(map_tensor(tensor))]
        _raise_problems(model_dir, {"tensors with NaN or infinity": broken}, advice="download it again")
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return HFCheckpoint(config, tensors, stamp)


def _find_files(model_dir: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the directory's safetensors files, and its index (tensor → file; empty where there is none).

    Like transformers, takes ``model.safetensors`` first, then the index; failing these, a single file of any name.
    Raises: UserError where there is no such thing, or only pickles.
    """
    give = "give the folder of a Hugging Face checkpoint"
    try:
        entries = sorted(path.name for path in model_dir.iterdir())
    except OSError as error:
        raise UserError(f"{model_dir}: {error.strerror}; {give}") from None
    if "model.safetensors" in entries:
        return ["model.safetensors"], {}
    if INDEX in entries:
        weight_map = _read_index(model_dir / INDEX)
        names = sorted(set(weight_map.values()))
        _raise_problems(model_dir, {"files missing that the index names": [n for n in names if n not in entries]})
        return names, weight_map
    found = fnmatch.filter(entries, "*.safetensors")
    if len(found) > 1:
        raise UserError(f"{model_dir}: several safetensors files ({_listed(found)}) without {INDEX}; download that too")
    pickles = [name for name in entries if Path(name).suffix in PICKLES]
    if pickles and not found:
        raise UserError(
            f"{model_dir}: holds only pickles ({_listed(pickles)}), and unpickling runs whatever code they carry; download"
            " the safetensors revision, or, if you trust them, load them with transformers and call"
            " save_pretrained(directory, safe_serialization=True)"
        )
    if not found:
        raise UserError(f"{model_dir}: {'holds no *.safetensors file' if entries else 'is empty'}; {give}")
    return found, {}


def _read_index(path: Path) -> dict[str, str]:
    """The index's ``weight_map``. Raises: UserError where it has none, or names files outside the directory."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map from tensors to files; download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: names the file {file!r}; shards must lie beside the index")
    return weight_map


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {type(data).__name__}, not a JSON object")
    return data


def _own_config(model_dir: Path) -> dict[str, Any]:
    """The directory's ``config.json``, if any. Raises: UserError where it says that the weights are quantized."""
    path = model_dir / "config.json"
    data = _read_json(path) if path.exists() else {}
    if quantization := data.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(f"{model_dir}: is quantized ({method}) and cannot be compiled; give the unquantized checkpoint")
    return data


def _ignored(name: str, config: ModelConfig, total_layers: int) -> bool:
    """Whether the stored tensor is none of the model's weights and yet nothing to complain about."""
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
        return True  # computed from the config; the embedding itself
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and config.num_hidden_layers <= int(layer[1]) < total_layers


def _stored_layouts(config: ModelConfig) -> dict[str, tuple[Shape, tuple[str, ...]]]:
    """Every name a file may use → the shape it then has, and the published tensors that it is the concatenation of."""
    experts = range(config.num_local_experts)
    expected = expected_tensors(config)
    layouts: dict[str, tuple[Shape, tuple[str, ...]]] = {name: (shape, (name,)) for name, shape in expected.items()}
    for layer in range(config.num_hidden_layers):
        published, fused = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        w1, w2, w3 = ([f"{published}.experts.{e}.{w}.weight" for e in experts] for w in ("w1", "w2", "w3"))
        (inner, hidden), count = expected[w1[0]], len(experts)
        layouts[f"{fused}.gate.weight"] = expected[f"{published}.gate.weight"], (f"{published}.gate.weight",)
        layouts[f"{fused}.experts.down_proj"] = (count, hidden, inner), tuple(w2)
        gate_up = tuple(name for pair in zip(w1, w3, strict=True) for name in pair)
        layouts[f"{fused}.experts.gate_up_proj"] = (count, 2 * inner, hidden), gate_up
    return layouts


def _resolve(
    stored: dict[str, StoredTensor], config: ModelConfig
) -> tuple[dict[str, StoredTensor], dict[str, list[str]]]:
    """Published name → where it lies, in the order of ``expected_tensors``; and what is wrong, by kind."""
    expected, layouts = expected_tensors(config), _stored_layouts(config)
    tensors: dict[str, StoredTensor] = {}
    twice: dict[str, None] = {}  # as an ordered set: one fused tensor clashes with many
    shapes, dtypes = [], []
    for name, tensor in stored.items():
        if name not in layouts:
            continue
        shape, parts = layouts[name]
        if tensor.shape != shape:
            shapes.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in DTYPES:
            dtypes.append(f"{name} is {tensor.dtype}, expected {', '.join(DTYPES)}")
        size = tensor.nbytes // len(parts)  # the parts of one tensor are of one size
        for i, part in enumerate(parts):
            if part in tensors:
                twice[f"{tensors[part].name} and {name}"] = None
            tensors[part] = replace(tensor, shape=expected[part], offset=tensor.offset + i * size, nbytes=size)
    problems = {
        "tensors held in both layouts": list(twice),
        "tensors of the wrong shape": shapes,
        "tensors of the wrong dtype": dtypes,
        "tensors missing": [name for name in expected if name not in tensors],
        "tensors unexpected": [name for name in stored if name not in layouts],
    }
    return {name: tensors[name] for name in expected if name in tensors}, problems


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _raise_problems(
    model_dir: Path,
    problems: Mapping[str, Sequence[str]],
    advice: str = "download it again, or check that config.json belongs to it",
) -> None:
    """Raises one UserError that lists every kind of problem with names under it."""
    kinds = [f"{kind} ({len(names)}): {_listed(names)}" for kind, names in problems.items() if names]
    if kinds:
        raise UserError(f"{model_dir}: {'; '.join(kinds)}; {advice}")


def _is_finite(array: np.ndarray) -> bool:
    """Whether a float array holds neither NaN nor infinity; by the bits, as numpy has no fast test for bfloat16."""
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    exponent = np.array(np.inf, array.dtype).view(unsigned)  # NaN and infinity have all exponent bits set, no others do
    flat = array.reshape(-1).view(unsigned)
    chunks = (flat[at : at + FINITE_CHUNK] for at in range(0, flat.size, FINITE_CHUNK))
    return all(np.max(chunk & exponent) < exponent for chunk in chunks)


def _stamp(model_dir: Path, names: Sequence[str]) -> dict[str, Any]:
    """``HFCheckpoint.identity()``: the files by size and time, for they are too large to be hashed each time."""
    try:
        stats = {name: (model_dir / name).stat() for name in names}
        config = model_dir / "config.json"
        config_sha256 = hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else None
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    files = {name: {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats.items()}
    return {"kind": "hf", "model_dir": str(model_dir.absolute()), "config_sha256": config_sha256, "files": files}


def check_unchanged(identity: Mapping[str, Any]) -> None:
    """Raises UserError that names the file where a checkpoint is not as its ``HFCheckpoint.identity()`` says."""
    model_dir = Path(identity["model_dir"])
    now = _stamp(model_dir, list(identity["files"]))
    changed = [name for name, was in identity["files"].items() if now["files"][name] != was]
    if now["config_sha256"] != identity["config_sha256"]:
        changed.append("config.json")
    _raise_problems(model_dir, {"files changed since they were first read": changed}, advice="start over")
