"""``--plugins on`` with backend ``onnxruntime``: from build to text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cli import PROMPT, Here


def test_build_inspect_and_run(engines: Callable[[str], Path], here: Here, tmp_path: Path) -> None:
    """The same text as with bodies; what is there is in the manifest; pipeline ``auto`` makes fused ops for it."""
    out = tmp_path / "interpreted"
    built = here(
        "build", "--checkpoint_dir", engines("one") / "export", "--output_dir", out, "--plugins", "rmsnorm=on",
        "--plugin_tactics", "rows",
    )  # fmt: skip
    assert built.status == 0
    assert "note: --plugins rmsnorm=on: Triton's interpreter runs the plugins' kernels on the CPU" in built.out
    assert "plugins, interpreted: AddRMSNorm 7, RMSNorm 2" in here("inspect", out).out
    texts = [
        here("run", "--engine_dir", each, "--input_text", PROMPT, "--max_output_len", "3").out
        for each in (out, engines("one"))
    ]
    assert texts[0]
    assert texts[0] == texts[1]
