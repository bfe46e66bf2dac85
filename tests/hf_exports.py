"""Hugging Face's own models, tiny, exported by torch: graphs that nobody here wrote. Each is made once in a process."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
import transformers
from readers import ArrayReader
from torch import nn
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from moecompiler.backends.onnxruntime_program import WeightCache, open_program
from moecompiler.foreign import open_foreign
from moecompiler.graph import Program
from moecompiler.weights import TensorReader

EXPERTS = 4
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SHAPES = ((1, 1), (2, 7))
EXAMPLE = (2, 9)


@dataclass(frozen=True)
class Kind:
    """A model and a way to export it. ``experts`` and ``attention`` name implementations of transformers. ``exporter``:
    torch's (``dynamo``), its tracing one (``traced``, ``dynamo=False``), or ``transformers``' own, which extends torch's."""

    model: str
    experts: str = "batched_mm"
    attention: str = "sdpa"
    dtype: str = "float32"
    layers: int = 1
    exporter: Literal["dynamo", "traced", "transformers"] = "dynamo"
    opset: int = 21
    fixed: bool = False  # sizes are those of the example, ``EXAMPLE``

    def __str__(self) -> str:
        experts = [self.experts] if self.model == "mixtral" else []
        return "-".join([self.model, *experts, self.attention, self.dtype, self.exporter, *["fixed"][: self.fixed]])


@dataclass(frozen=True)
class Foreign:
    """An export as ``open_foreign`` takes it, and the module it is of."""

    program: Program
    reader: TensorReader
    module: transformers.PreTrainedModel


class _Logits(nn.Module):
    def __init__(self, model: transformers.PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def make(kind: Kind) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": kind.layers}
    model: transformers.PreTrainedModel
    if kind.model == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=EXPERTS))
        model.set_experts_implementation(kind.experts)
    elif kind.model == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    model.set_attn_implementation(kind.attention)
    for name, parameter in model.named_parameters():  # norms that differ, biases that are not zero
        nn.init.normal_(parameter.data, 1.0 if "norm" in name else 0.0, 0.2)
    return model.eval().to(getattr(torch, kind.dtype))


def export(kind: Kind, path: Path) -> None:
    """Writes the model to ``path``; its example hits all experts."""
    ids = torch.randint(0, SIZES["vocab_size"], EXAMPLE, generator=torch.Generator().manual_seed(1))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dynamic = None if kind.fixed else {name: {0: "batch", 1: "sequence"} for name in example}
    common: dict[str, Any] = {"opset_version": kind.opset, "verbose": False}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        model = make(kind)
        if kind.exporter == "transformers":
            config = OnnxConfig(dynamic=True, opset_version=kind.opset, output_path=path)
            OnnxExporter().export(model, {**example, "use_cache": False}, config)
        elif kind.exporter == "traced":
            names: dict[str, Any] = {"input_names": list(example), "output_names": ["logits"], "dynamic_axes": dynamic}
            torch.onnx.export(_Logits(model), tuple(example.values()), path, dynamo=False, **names, **common)
        else:
            torch.onnx.export(_Logits(model), (), path, dynamo=True, kwargs=example, dynamic_shapes=dynamic, **common)


@functools.cache
def exported(kind: Kind) -> Foreign:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        export(kind, path)
        program, _ = open_foreign(path)
        model = onnx.load(path)  # the folder goes, so weights are held in memory
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return Foreign(program, ArrayReader(held), make(kind))


def tokens(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], shape)


def logits(program: Program, reader: TensorReader, shape: tuple[int, int], hidden: int = 0) -> np.ndarray:
    """What a program says of ``tokens``, float32, by ONNX Runtime; the mask hides the first ``hidden`` tokens of each row."""
    session = open_program(program, WeightCache(reader), threads=1)
    ids = tokens(shape)
    feeds = {"input_ids": ids, "attention_mask": (np.arange(shape[1]) >= hidden).astype(np.int64) * np.ones_like(ids)}
    result = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    return np.asarray(result, np.float32)


def hf_logits(module: transformers.PreTrainedModel, shape: tuple[int, int]) -> np.ndarray:
    with torch.no_grad():
        result = module(torch.from_numpy(tokens(shape)), use_cache=False).logits
    return np.asarray(result.float().numpy())


@functools.cache
def exported_logits(kind: Kind, shape: tuple[int, int]) -> np.ndarray:
    """What the export says as it is."""
    return logits(exported(kind).program, exported(kind).reader, shape)
