"""``--kv_cache_dtype`` and ``--use_fp8_context_fmha`` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import TINY_MIXTRAL

from moecompiler.artifact import Artifact
from moecompiler.backends.base import EngineLimits
from moecompiler.backends.onnxruntime import OnnxRuntimeSession, open_session
from moecompiler.config import load_config
from moecompiler.errors import UserError
from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.recipe import QuantizationRecipe, default_recipe
from moecompiler.quantization.schemes import INT8, Format
from moecompiler.tools.flags import GraphFlags, MappingFlags, QuantizationFlags, SourceFlags
from moecompiler.tools.job import Job, make_job
from moecompiler.tools.kv_cache import with_cache
from moecompiler.tools.main import main
from moecompiler.tools.quantization_options import KVCacheDType, Switch

DUMMY = {"kind": "dummy"}
FP8 = QuantizationFlags(kv_cache_dtype=KVCacheDType.fp8)
CONTEXT = QuantizationFlags(use_fp8_context_fmha=Switch.enable)


def test_compiled_run_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrated, beside int8 weights; what `compile` was told is in the manifest."""
    out = tmp_path / "engines"
    asked = ["--kv_cache_dtype", "fp8", "--use_weight_only", "--calib_size", "2", "--calib_max_seq_length", "64"]
    sizes = ["--num_layers", "1", "--max_seq_len", "16", "--dtype", "float32"]
    assert main(["compile", "--model_dir", str(TINY_MIXTRAL), "--output_dir", str(out), *sizes, *asked]) == 0
    recipe = Job.of(Artifact.open(out, ("engine",))).quantization
    assert recipe is not None
    assert recipe.cache is not None
    assert recipe.cache.format is Format.E4M3
    ((keys, values),) = recipe.cache.scales
    assert 0 < values < keys < 0.1
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "KV cache fp8" in shown
    assert "2 caches like past_key_values.0.key: int8" in " ".join(shown.split())
    assert main(["run", "--engine_dir", str(out), "--max_output_len", "4", "--input_text", "def"]) == 0
    session = OnnxRuntimeSession(open_session(out / "rank0.onnx", 1), EngineLimits(2, 8, 16, 1536))
    session.start(2)
    assert {cache.numpy().dtype.name for cache in session._empty(2)} == {"int8"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (CONTEXT, "--use_fp8_context_fmha enable: reads an FP8 cache; give --kv_cache_dtype fp8 too"),
        (
            QuantizationFlags(kv_cache_dtype=KVCacheDType.int8, use_fp8_context_fmha=Switch.enable),
            "--use_fp8_context_fmha enable: reads an FP8 cache; give --kv_cache_dtype fp8 too",
        ),
        (QuantizationFlags(kv_cache_dtype=KVCacheDType.int8), "--kv_cache_dtype int8: needs the scales of keys and"),
        (QuantizationFlags(kv_cache_dtype=KVCacheDType.fp8, scales=Path("/nowhere")), "/nowhere: not found"),
        (QuantizationFlags(scales=Path("/nowhere")), "--scales /nowhere: goes with"),
    ],
)
def test_what_cannot_be(flags: QuantizationFlags, said: str) -> None:
    config = str(TINY_MIXTRAL / "config.json")
    with pytest.raises(UserError, match=said):
        make_job(SourceFlags(model=config), MappingFlags(), GraphFlags(), flags)


def test_scales_of_dummy_weights_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(TINY_MIXTRAL)
    made = with_cache(default_recipe(INT8), FP8, config, DUMMY)
    assert made is not None
    assert made.rules == default_recipe(INT8).rules
    assert made.cache == CacheQuantization(Format.E4M3, ((1.0, 1.0),) * config.num_hidden_layers)
    assert "a scale of 1" in capsys.readouterr().err


def test_fp8_prefill_of_a_cache_that_is_fp8_already() -> None:
    """As `trtllm-build` takes it after `quantize.py`."""
    config = load_config(TINY_MIXTRAL)
    cache = CacheQuantization(Format.E4M3, ((0.5, 0.25),) * config.num_hidden_layers)
    made = with_cache(QuantizationRecipe((), cache=cache), CONTEXT, config, DUMMY)
    assert made == QuantizationRecipe((), cache=CacheQuantization(Format.E4M3, cache.scales, True))
    assert with_cache(None, QuantizationFlags(), config, DUMMY) is None


def test_calibration_is_not_measured_for_nothing() -> None:
    """No option asks for scales: nothing is calibrated."""

    def measure(*_: object) -> None:
        raise AssertionError("calibrated")

    job = make_job(SourceFlags(model_dir=TINY_MIXTRAL), MappingFlags(), GraphFlags(), QuantizationFlags(), measure)  # type: ignore[arg-type]
    assert job.quantization is None
