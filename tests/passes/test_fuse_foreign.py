"""Graphs that nobody here wrote: Hugging Face's own models, exported by torch."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from torch import nn

from moecompiler.graph import Program
from moecompiler.passes.fuse_add_rms_norm import FuseAddRMSNorm
from moecompiler.passes.fuse_context_attention import FuseContextAttention
from moecompiler.passes.fuse_rms_norm import FuseRMSNorm
from moecompiler.pipeline import run_passes

pytestmark = pytest.mark.xdist_group("foreign")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


class _Logits(nn.Module):
    def __init__(self, model: transformers.PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def _make(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if kind == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))
        model.set_experts_implementation("batched_mm")
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))
    model.config._attn_implementation = "eager"
    for name, parameter in model.named_parameters():  # norms that differ, biases that are not zero
        nn.init.normal_(parameter.data, 1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()


@functools.cache
def exported(kind: str) -> onnx.ModelProto:
    example = {"input_ids": torch.zeros(2, 5, dtype=torch.int64)}
    dynamic = {"input_ids": {0: "batch", 1: "sequence"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Logits(_make(kind)),
            (),
            kwargs=example,
            dynamo=True,
            opset_version=21,
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    return onnx.shape_inference.infer_shapes(program.model_proto, data_prop=True)


@pytest.mark.parametrize("kind", ["mixtral", "llama", "qwen2"])
def test_norms_and_attention_are_found_and_compute_the_same(kind: str) -> None:
    passes = (FuseRMSNorm(), FuseContextAttention(), FuseAddRMSNorm())
    fused, results = run_passes(passes, Program(exported(kind)))
    assert [result.matches for result in results] == [5, 2, 4]
    onnx.checker.check_model(fused.model, full_check=True)
    for shape in ((1, 1), (2, 7)):
        feeds = {"input_ids": np.random.default_rng(0).integers(0, 64, shape)}
        before, after = (
            onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
            for model in (exported(kind), fused.model)
        )
        assert np.abs(before).max() > 0.1
        np.testing.assert_allclose(after, before, atol=2e-5, rtol=0)


@pytest.mark.parametrize("broken", ["Softmax", "Expand"])
def test_attention_that_is_almost_one_stays(broken: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported("llama"))
    if broken == "Softmax":
        node = next(node for node in model.graph.node if node.op_type == "Softmax")
        next(each for each in node.attribute if each.name == "axis").i = 2
    else:  # heads repeated as a whole, 0 1 0 1 instead of 0 0 1 1
        expand = next(
            node for node in model.graph.node if node.op_type == "Expand" and len(_dims(model, node.output[0])) == 5
        )
        value = next(value for value in model.graph.value_info if value.name == expand.input[0])
        one, heads = value.type.tensor_type.shape.dim[2], value.type.tensor_type.shape.dim[1]
        one.dim_value, heads.dim_value = heads.dim_value, one.dim_value
    _, results = run_passes((FuseContextAttention(),), Program(model), allow_missed=True)
    assert results[0].matches == 1


def _dims(model: onnx.ModelProto, name: str) -> list[object]:
    value = next((value for value in model.graph.value_info if value.name == name), None)
    return [] if value is None else list(value.type.tensor_type.shape.dim)
