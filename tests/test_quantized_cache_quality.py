"""What a quantized KV cache costs on the shipped model, by scales of a calibration on the package's own text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from programs import GRID, TINY_MIXTRAL, Programs, Subject

from moecompiler.backends.onnxruntime_program import WeightCache
from moecompiler.calibration.result import Calibration
from moecompiler.calibration.samples import cut_samples
from moecompiler.calibration.streaming import Settings, calibrate
from moecompiler.calibration.text import default_documents
from moecompiler.config import ExportOptions, NormalizationMode
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.schemes import Format
from moecompiler.runtime.prompts import load_tokenizer
from moecompiler.tools.bench_quantized import logits_of, perplexity, read_text
from moecompiler.validation.difference import log_softmax

LENGTH, WINDOWS = 256, 24


@pytest.fixture(scope="module")
def calibration(shipped: Subject, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    encode = load_tokenizer(TINY_MIXTRAL, shipped.config.vocab_size).encode
    samples = cut_samples(default_documents(), encode, 8, LENGTH)
    settings = Settings("float32", NormalizationMode.RENORMALIZE, "cpu", None)
    folder: Path = tmp_path_factory.mktemp("calibration")
    return calibrate(shipped.config, shipped.reader, samples, settings, folder, lambda done, total: None)


def test_perplexity(shipped: Subject, programs: Programs, calibration: Calibration) -> None:
    options = ExportOptions("float32", max_seq_len=LENGTH, all_logits=True)
    program = programs.exported(shipped.config, GRID["one-rank"], 0, options)
    text = TINY_MIXTRAL / "heldout.txt"
    tokens = read_text(TINY_MIXTRAL, text, shipped.config.vocab_size, WINDOWS, LENGTH)
    weights = WeightCache(shipped.reader)
    names = [f"model.layers.{layer}.self_attn" for layer in range(shipped.config.num_hidden_layers)]

    def measured(cache: CacheQuantization | None) -> float:
        recipe = None if cache is None else QuantizationRecipe((), cache=cache)
        made, _ = run_passes(named_pipelines(recipe)["ootb"], program)
        return perplexity(log_softmax(logits_of(made, weights, tokens)), tokens)

    def of(form: Format, largest: float) -> CacheQuantization:
        return CacheQuantization(form, tuple(calibration.cache_scales(name, largest) for name in names))

    floats = measured(None)
    increases = {
        form: measured(of(form, largest)) / floats - 1 for form, largest in ((Format.E4M3, 448.0), (Format.INT8, 127.0))
    }
    assert abs(increases[Format.E4M3]) > 1e-5, "an FP8 cache that changes nothing is none"
    assert increases[Format.E4M3] < 5e-3
    assert increases[Format.INT8] < 2e-3
    assert np.isfinite(list(increases.values())).all()
