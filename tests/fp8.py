"""FP8 for tests: a recipe of quantization with static scales from a little real text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import cast

from programs import TINY_MIXTRAL, Subject
from tokenizers import Tokenizer

from moecompiler.calibration.result import Calibration
from moecompiler.calibration.static import with_input_scales
from moecompiler.calibration.streaming import Settings, calibrate
from moecompiler.checkpoint import Source
from moecompiler.quantization.recipe import QuantizationRecipe, default_recipe
from moecompiler.quantization.schemes import FP8, WeightScheme

SAMPLES, LENGTH = 6, 128


def calibrated(shipped: Subject) -> Calibration:
    """The shipped model on training text of its kind, which the package brings."""
    from moecompiler.calibration.text import default_documents

    tokenizer = Tokenizer.from_file(str(TINY_MIXTRAL / "tokenizer.json"))
    ids = tokenizer.encode("\n".join(default_documents())[: 10 * SAMPLES * LENGTH]).ids
    samples = [ids[start : start + LENGTH] for start in range(0, SAMPLES * LENGTH, LENGTH)]
    source = cast(Source, shipped.reader)
    with tempfile.TemporaryDirectory() as folder:
        return calibrate(shipped.config, source, samples, Settings("float32", threads=1), Path(folder))


def fp8_recipe(shipped: Subject, scheme: WeightScheme = FP8) -> QuantizationRecipe:
    return with_input_scales(default_recipe(scheme), shipped.config, calibrated(shipped).input_scale)
