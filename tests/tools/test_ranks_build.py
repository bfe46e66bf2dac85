"""Plans that ranks share: built once, found again, and the same whoever builds; on a backend of files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_config
from cli import Here, contents

from moecompiler.artifact import Artifact
from moecompiler.atomic import temporary_path
from moecompiler.backends.onnxruntime import OnnxRuntimeBackend
from moecompiler.tools import build, ranks_build
from moecompiler.tools.build import run_build
from moecompiler.tools.engine_options import MoeWeights
from moecompiler.tools.flags import EngineFlags, WorkFlags
from moecompiler.tools.ranks_build import BuildRank, RankInputs


class FileBackend(OnnxRuntimeBackend):
    """Plans say what they are of. ``plans``: the stems of those that were built; ``shares``: ranks that have the same graph."""

    def __init__(self, shares: bool) -> None:
        super().__init__()
        self.plans: list[str] = []
        self.shares = shares

    def shared_graph(self, program: Any, settings: Any) -> str:  # type: ignore[override]
        first_row = program.weights["model.embed_tokens.first_row"].values
        return "one" if self.shares else f"of {first_row}"

    def build_shared(self, program: Any, stem: str, directory: Path, settings: Any, progress: Any) -> dict[str, Path]:
        self.plans.append(stem)
        return {name: put(directory, name, "the plan") for name in (f"{stem}.plan", f"{stem}.timing")}

    def build(
        self,
        program: Any,
        reader: Any,
        stem: str,
        directory: Path,
        settings: Any,
        progress: Any,
        shared: str | None = None,
    ) -> dict[str, Path]:
        return {f"{stem}.engine.json": put(directory, f"{stem}.engine.json", json.dumps({"shared": shared}))}


def put(directory: Path, name: str, text: str) -> Path:
    path = temporary_path(directory / name)
    path.write_text(text)
    return path


@pytest.mark.parametrize("shares", [True, False])
def test_ranks_of_one_graph_have_one_plan(
    shares: bool, engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FileBackend(shares)
    for module in (build, ranks_build):
        monkeypatch.setattr(module, "open_backend", lambda name, device=0: backend)
    source, flags = Artifact.open(engines("ep2") / "optimize"), EngineFlags(moe_weights=MoeWeights.all)
    run_build(source, tmp_path / "a", flags, WorkFlags())
    assert len(backend.plans) == (1 if shares else 2)
    made = Artifact.open(tmp_path / "a")
    made.check()
    for rank in range(2):
        stem = made.rank_info(rank)["engine"]["shared"]
        assert set(made.rank_files(rank)) == {f"rank{rank}.engine.json", f"{stem}.plan", f"{stem}.timing"}

    before = contents(tmp_path / "a")
    run_build(source, tmp_path / "a", flags, WorkFlags())
    (tmp_path / "a" / "rank1.engine.json").unlink()
    run_build(source, tmp_path / "a", flags, WorkFlags())  # the plan of rank 1 is there
    assert len(backend.plans) == (1 if shares else 2)
    assert contents(tmp_path / "a") == before

    for rank in (1, 0):  # one at a time, and the other way round
        run_build(source, tmp_path / "b", flags, WorkFlags(rank=rank))
    assert len(backend.plans) == (2 if shares else 4)
    assert {name: data for name, data in contents(tmp_path / "b").items() if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }

    (tmp_path / "a" / f"{backend.plans[0]}.plan").write_text("damaged")
    run_build(source, tmp_path / "a", flags, WorkFlags())
    assert contents(tmp_path / "a") == before


def test_workers_build_on_different_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(ranks_build, "open_backend", lambda name, device: asked.append((name, device)))
    fields = dict.fromkeys(field.name for field in dataclasses.fields(RankInputs))
    task = BuildRank(RankInputs(**fields | {"backend": "tensorrt"}), {})  # type: ignore[arg-type]
    for place in range(3):
        task.on_device(place).given.open_backend()
    assert asked == [("tensorrt", 0), ("tensorrt", 1), ("tensorrt", 2)]


@pytest.mark.slow  # TensorRT-RTX builds four plans
@pytest.mark.parametrize("workers", [1, 2])
def test_engines_for_rtx_cards_share_plans(
    workers: int, here: Here, engines: Callable[[str], Path], tmp_path: Path
) -> None:
    source = ("--checkpoint_dir", engines("tp2-pp2") / "optimize", "--output_dir", tmp_path, "--workers", workers)
    options = ("--backend", "tensorrt-rtx", "--compute_capability", "8.9", "--moe_weights", "all")
    assert here("build", *source, *options).status == 0
    made = Artifact.open(tmp_path)
    made.check()
    shared = [made.rank_info(rank)["engine"]["shared"] for rank in range(4)]
    assert shared[0] == shared[1] != shared[2] == shared[3]
    assert len(list(tmp_path.glob("*.plan"))) == 2
    described = " ".join(here("inspect", tmp_path).out.split())  # lines are broken
    assert f"shares {shared[0]} with ranks of the same graph" in described


@pytest.mark.slow  # as above: one plan
def test_eight_ranks_of_experts_have_one_plan(here: Here, tmp_path: Path) -> None:
    config = tiny_config(num_attention_heads=8, num_key_value_heads=8, num_local_experts=8, num_hidden_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    mapping = ("--tp_size", 8, "--moe_ep_size", 8, "--dtype", "float16")
    options = ("--backend", "tensorrt-rtx", "--compute_capability", "8.9", "--moe_weights", "all")
    limits = ("--max_seq_len", 16, "--max_input_len", 8, "--max_batch_size", 2)
    output = here(
        "compile", "--model", tmp_path / "config.json", "--output_dir", tmp_path / "out", *mapping, *options, *limits
    )
    assert output.status == 0, output.err
    made = Artifact.open(tmp_path / "out")
    made.check()
    assert len({made.rank_info(rank)["engine"]["shared"] for rank in range(8)}) == 1
    assert len(list((tmp_path / "out").glob("*.plan"))) == 1
    assert len(list((tmp_path / "out").glob("rank*.safetensors"))) == 8
