"""``--pack_weights``: a rank's graph with its own file of weights, from which engines are built without the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoints import save_hf
from cli import Here, contents, logits
from safetensors.numpy import load_file

TWO_RANKS = ("--tp_size", 2, "--num_layers", 2, "--max_seq_len", 32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(tmp_path_factory.mktemp("packed") / "hf", max_shard_size="200KB")


def test_the_packed_engines_are_those_of_the_checkpoint(checkpoint: Path, here: Here, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "hf")
    asked = ("--model_dir", model, *TWO_RANKS, "--use_weight_only")
    assert here("compile", *asked, "--output_dir", tmp_path / "plain").status == 0
    packed = here("export", *asked, "--output_dir", tmp_path / "at" / "export", "--pack_weights")
    assert packed.status == 0, packed.err
    shutil.rmtree(model)
    (tmp_path / "at").rename(tmp_path / "elsewhere")  # the machine that builds
    steps = tmp_path / "elsewhere"
    for verb, source, to in (("optimize", "export", "optimize"), ("build", "optimize", "engine")):
        done = here(verb, "--checkpoint_dir", steps / source, "--output_dir", steps / to)
        assert done.status == 0, done.err
    for rank in range(2):
        name = f"rank{rank}.safetensors"
        assert (steps / "engine" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_packed_graph_runs_as_it_is(checkpoint: Path, here: Here, tmp_path: Path) -> None:
    asked = ("--model_dir", checkpoint, "--num_layers", 1, "--max_seq_len", 32)
    compiling = ("compile", *asked, "--output_dir", tmp_path / "packed", "--pack_weights")
    assert here(*compiling).status == 0
    folder = tmp_path / "packed" / "export"
    tensors = load_file(folder / "rank0.safetensors")
    assert tensors["model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 96, 32)
    assert logits(folder / "rank0.onnx", 64).shape == (2, 64)
    before = contents(tmp_path / "packed")
    assert here(*compiling).status == 0
    assert contents(tmp_path / "packed") == before


def test_a_packed_file_that_changed(checkpoint: Path, here: Here, tmp_path: Path) -> None:
    exported, optimized = tmp_path / "export", tmp_path / "optimize"
    asked = ("--model_dir", checkpoint, "--num_layers", 1, "--output_dir", exported)
    assert here("export", *asked, "--pack_weights").status == 0
    assert here("optimize", "--checkpoint_dir", exported, "--output_dir", optimized).status == 0
    file = exported / "rank0.safetensors"
    content = bytearray(file.read_bytes())
    for damage, said in ((content[:-1] + b"x", "its SHA-256 is not"), (content[:-1], "damaged"), (None, "missing")):
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        output = here("build", "--checkpoint_dir", optimized, "--output_dir", tmp_path / "engine")
        assert output.status == 2
        assert len(output.complaints) == 1
        assert "rank0.safetensors" in output.err
        assert said in output.err
        assert not list((tmp_path / "engine").rglob("*.safetensors"))
