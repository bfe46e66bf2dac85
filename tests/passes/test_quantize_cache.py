"""The KV cache as codes, in every pipeline: the same numbers from all of them, and close to the float model's."""

from __future__ import annotations

import dataclasses

import pytest
from programs import (
    GRID,
    MAX_SEQ_LEN,
    Programs,
    Subject,
)

from moecompiler.config import ExportOptions
from moecompiler.graph import check, floating_type
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.schemes import Format

# largest keys and values that `calibrate` finds in the shipped model are about so many
SCALES = {Format.E4M3: (12 / 448, 4 / 448), Format.INT8: (12 / 127, 4 / 127)}


def cache_of(form: Format, layers: int, context: bool = False) -> CacheQuantization:
    return CacheQuantization(form, (SCALES[form],) * layers, context)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pipeline", ["debug", "ootb", "plugins", "onnxruntime"])
@pytest.mark.parametrize(("form", "context"), [(Format.INT8, False), (Format.E4M3, False), (Format.E4M3, True)])
def test_every_pipeline(
    shipped: Subject, programs: Programs, form: Format, context: bool, pipeline: str, dtype: str
) -> None:
    exported = programs.exported(
        dataclasses.replace(shipped.config, num_hidden_layers=1),
        GRID["one-rank"],
        0,
        ExportOptions(dtype, max_seq_len=MAX_SEQ_LEN),
    )
    recipe = QuantizationRecipe((), cache=cache_of(form, 1, context))
    program, results = run_passes(named_pipelines(recipe)[pipeline], exported)
    (made,) = [result for result in results if result.name == "quantize-cache"]
    assert made.matches == (1 if context or pipeline in ("plugins", "onnxruntime") else 2)
    check(program)
    caches = [value for value in (*program.model.graph.input, *program.model.graph.output) if "." in value.name]
    assert len(caches) == 4
    assert all(value.type.tensor_type.elem_type == 3 for value in caches)  # TensorProto.INT8
    assert floating_type(program) == dtype
