"""A Hugging Face Mixtral directory as tensors by name, all checked from the files' headers before any is read.

Tensors go by their published names (``model.layers.0.block_sparse_moe.experts.3.w1.weight``). Some checkpoints hold the
experts fused instead, as transformers 5 keeps them in memory (``modeling_mixtral.MixtralExperts``): ``gate_up_proj
[E, 2F, H]``, each expert's gate rows first, then its up rows, and ``down_proj [E, H, F]``. There a published tensor is still
one run of bytes, so either layout resolves to a file, an offset and a shape. Quantized weights are ``published_checkpoint``'s.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moecompiler.checkpoint_files import find_files, raise_problems, read_json
from moecompiler.config import DTYPES, ModelConfig
from moecompiler.errors import UserError
from moecompiler.published_checkpoint import QuantizedCheckpoint, take_quantized
from moecompiler.quantization.published_config import MODELOPT_FILE, load_published_config
from moecompiler.safetensors_file import StoredTensor, map_tensor, numpy_dtype, read_ahead, read_header, read_into
from moecompiler.weights import Shape, TensorReader

FINITE_CHUNK = 1 << 22  # elements looked at together for NaN and infinity


class Source(TensorReader, Protocol):
    """Where weights come from: ``HFCheckpoint``, ``QuantizedCheckpoint`` or ``dummy.DummyCheckpoint``."""

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
        read_ahead(stored, start, shape)
        return map_tensor(stored)[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]

    def read_into(self, name: str, start: Shape, shape: Shape, out: np.ndarray) -> bool:
        """See ``weights.IntoReader``. Raises: as ``read``."""
        stored = self.tensors[name]
        check_box(name, stored.shape, start, shape)
        return out.dtype == numpy_dtype(stored.dtype) and read_into(stored, start, shape, out)

    def identity(self) -> dict[str, Any]:
        return self.stamp


def open_checkpoint(
    model_dir: Path, config: ModelConfig, *, check_finite: bool = False
) -> HFCheckpoint | QuantizedCheckpoint:
    """Opens the directory's safetensors files and checks, from their headers, that they hold the model of ``config``.

    ``config`` may be cut by ``with_layers``; the further layers are passed over. ``check_finite`` also reads every weight.
    Raises: UserError that lists what is missing, unexpected, held twice, of the wrong shape or dtype, or not finite; or says
    what is wrong with a quantized weight.
    """
    names, weight_map = find_files(model_dir)
    own_config = model_dir / "config.json"
    own = read_json(own_config) if own_config.exists() else {}
    published = load_published_config(model_dir)
    stamp = _stamp(model_dir, names)
    headers = {name: read_header(model_dir / name) for name in names}
    stored: dict[str, StoredTensor] = {}
    twice = []
    for file, header in headers.items():
        twice += [f"{name} (in {stored[name].file.name} and {file})" for name in header if name in stored]
        stored |= header
    lacking = [f"{name} ({file})" for name, file in weight_map.items() if name not in headers[file]]
    total_layers = own.get("num_hidden_layers", config.num_hidden_layers)
    wanted = {name: tensor for name, tensor in stored.items() if not _ignored(name, config, total_layers)}
    codes = None
    if published is not None:
        codes, wanted = take_quantized(published, wanted, config, expected_tensors(config), str(model_dir))
    tensors, problems = _resolve(wanted, config, codes.shapes if codes else ())
    among_files = {"tensors held twice": twice, "tensors that the index puts into a file without them": lacking}
    raise_problems(model_dir, among_files | problems)
    if check_finite:
        broken = [name for name, tensor in tensors.items() if not _is_finite(map_tensor(tensor))]
        raise_problems(model_dir, {"tensors with NaN or infinity": broken}, advice="download it again")
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if codes is None:
        return HFCheckpoint(config, tensors, stamp)
    source = QuantizedCheckpoint(HFCheckpoint(config, tensors, stamp | codes.stamp(config)), codes)
    if check_finite:
        codes.check()
    return source


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
    stored: dict[str, StoredTensor], config: ModelConfig, held: Collection[str]
) -> tuple[dict[str, StoredTensor], dict[str, list[str]]]:
    """Published name → where it lies, in the order of ``expected_tensors``; and what is wrong, by kind. Weights that are
    ``held`` as codes lie elsewhere."""
    expected = {name: shape for name, shape in expected_tensors(config).items() if name not in held}
    layouts = {name: layout for name, layout in _stored_layouts(config).items() if not set(layout[1]) & set(held)}
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
        configs = [path for path in (model_dir / name for name in ("config.json", MODELOPT_FILE)) if path.exists()]
        config_sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in configs)).hexdigest() if configs else None
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
    raise_problems(model_dir, {"files changed since they were first read": changed}, advice="start over")
