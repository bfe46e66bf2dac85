"""What last bits do to quantized graphs."""

from __future__ import annotations

import numpy as np
import pytest
from programs import TINY_MIXTRAL

from moecompiler.backends.onnxruntime_program import WeightCache
from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import load_config
from moecompiler.quantization.recipe import default_recipe
from moecompiler.quantization.schemes import INT8
from moecompiler.tools.bench_rounding import measure
from moecompiler.validation.difference import kl_divergence, log_softmax


def test_divergence() -> None:
    exact = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    other = np.log(np.array([[0.5, 0.5], [0.8, 0.2]]))
    wanted = (0.9 * np.log(0.9 / 0.8) + 0.1 * np.log(0.1 / 0.2)) / 2
    assert kl_divergence(exact, other).mean() == pytest.approx(wanted)
    assert kl_divergence(exact, log_softmax(exact)).mean() == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_a_row_for_each_format() -> None:
    """Rounding to float16 is seen, and is less than what quantizing does."""
    config = load_config(TINY_MIXTRAL)
    weights = WeightCache(open_checkpoint(TINY_MIXTRAL, config))
    tokens = np.arange(24, dtype=np.int64).reshape(1, 24) % config.vocab_size
    exact, int8 = measure(config, weights, tokens, {"float32": None, "int8": default_recipe(INT8)}, 24)
    assert (exact["format"], int8["format"], exact["from_float32"]) == ("float32", "int8", 0.0)
    assert 0 < exact["between"] < int8["from_float32"]
    assert 0 < int8["between"] < 1e-2
