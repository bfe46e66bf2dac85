"""What ``--pipeline auto`` stands for."""

from __future__ import annotations

import pytest

from moecompiler.passes.pipelines import named_pipelines
from moecompiler.tools.flags import SelectionFlags


@pytest.mark.parametrize(
    ("backend", "given", "wanted"),
    [
        ("onnxruntime", "auto", "ootb"),
        ("tensorrt-rtx", "auto", "ootb"),
        ("tensorrt", "auto", "tensorrt"),
        ("tensorrt", "debug", "debug"),
    ],
)
def test_the_pipeline_of_a_backend(backend: str, given: str, wanted: str) -> None:
    chosen = SelectionFlags(pipeline=given, disable_pass=["clean-up"] if given == "auto" else None).for_backend(backend)
    assert chosen.selection.pipeline == wanted
    expected = [step.name for step in named_pipelines()[wanted] if step.name != "clean-up"]
    assert [step.name for step in chosen.selection.passes()] == expected


def test_without_a_backend() -> None:
    assert SelectionFlags().selection.pipeline == "ootb"
