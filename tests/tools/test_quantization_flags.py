"""What options of quantization say together."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import tiny_config

from moecompiler.config import parse_config
from moecompiler.errors import UserError
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.tools.flags import QuantizationFlags
from moecompiler.tools.quantization import with_scales
from moecompiler.tools.quantization_options import KVCacheDType, QFormat


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (QuantizationFlags(qformat=QFormat.nvfp4), KVCacheDType.fp8),
        (QuantizationFlags(qformat=QFormat.nvfp4, kv_cache_dtype=KVCacheDType.int8), KVCacheDType.int8),
        (QuantizationFlags(qformat=QFormat.fp8), KVCacheDType.auto),
        (QuantizationFlags(kv_cache_dtype=KVCacheDType.fp8), KVCacheDType.fp8),
    ],
)
def test_the_cache_s_type(flags: QuantizationFlags, dtype: KVCacheDType) -> None:
    assert flags.cache_dtype is dtype


def test_scales_of_a_cache_need_no_fp8_weights() -> None:
    config = parse_config(tiny_config(), "tiny")
    recipe = QuantizationRecipe(())
    scales = {"scales": Path("scales.json")}
    nvfp4 = QuantizationFlags(qformat=QFormat.nvfp4, **scales)  # type: ignore[arg-type]
    assert with_scales(recipe, nvfp4, config, {}, "--qformat nvfp4") is recipe
    int8 = QuantizationFlags(qformat=QFormat.int8_wo, **scales)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"--scales scales.json: goes with --qformat fp8; --qformat int8_wo asks for no"
    ):
        with_scales(recipe, int8, config, {}, "--qformat int8_wo")
