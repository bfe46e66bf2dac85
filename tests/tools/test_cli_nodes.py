"""Ranks on two nodes: this machine twice, under two host names, each reached as ``mpirun`` reaches others; engine directories
of each rank."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import PROMPT, Here, Output, started, wait_for

Engines = Callable[[str], Path]
pytestmark = [pytest.mark.xdist_group("watchdog"), pytest.mark.timeout(60)]
AGENT = Path(__file__).with_name("local_node.sh")
SCRIPT = Path(__file__).with_name("failing_rank.py")
needs_host_names = pytest.mark.skipif(
    subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="needs leave to give a process another host name (unshare --uts)",
)


def on_two_nodes(folder: Path, hosts: str, engine_dir: Path, ranks: int) -> Output:
    verb = ("run", "--engine_dir", engine_dir, "--max_output_len", 6, "--input_text", PROMPT)
    program = (sys.executable, SCRIPT, -1, "never", "kill", folder, *verb)
    words = ["mpirun", "--prtemca", "plm_ssh_agent", AGENT, "--host", hosts, "-n", ranks, "--bind-to", "none", *program]
    with started([str(word) for word in words], folder) as launcher:
        status = wait_for(launcher)
    return Output(status, (folder / "out").read_text(), (folder / "err").read_text())


def by_name(engine_dir: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """A copy of engines for each name; returns ``folder``."""
    for name in names:
        shutil.copytree(engine_dir, folder / name)
    return folder


def edit_manifest(engine_dir: Path, edit: Callable[[dict[str, object]], None]) -> None:
    manifest = json.loads((engine_dir / "manifest.json").read_text())
    edit(manifest)
    (engine_dir / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.mpi
@needs_host_names
def test_each_node_has_its_engines_and_counts_its_gpus(engines: Engines, here: Here, tmp_path: Path) -> None:
    directory = by_name(engines("tp2-pp2"), tmp_path, ("node-a", "node-b")) / "{host}"
    output = on_two_nodes(tmp_path, "node-a:2,node-b:2", directory, 4)
    assert output.status == 0, output.err
    devices = [(tmp_path / f"device of rank {rank}").read_text() for rank in range(4)]
    assert devices == ["0", "1", "0", "1"]
    alone = here(
        "run", "--engine_dir", engines("tp2-pp2"), "--max_output_len", 6, "--input_text", PROMPT, "--in_process"
    )
    assert output.out == alone.out


@pytest.mark.mpi
@needs_host_names
def test_a_node_has_engines_of_other_options(engines: Engines, tmp_path: Path) -> None:
    directory = by_name(engines("ep2"), tmp_path, ("node-a", "node-b")) / "{host}"
    edit_manifest(tmp_path / "node-b", lambda manifest: manifest["header"]["source"].update(seed=1))
    output = on_two_nodes(tmp_path, "node-a:1,node-b:1", directory, 2)
    assert output.status == 2
    (line,) = output.complaints
    assert f"rank 1 on node-b has engines in {tmp_path}/node-b that do not fit those of rank 0 on node-a in" in line
    assert "their manifests differ in source; give every rank engines of one compile" in line


def test_directories_of_ranks(engines: Engines, here: Here, tmp_path: Path) -> None:
    by_name(engines("ep2"), tmp_path, ("engines-0", "engines-1"))
    (tmp_path / "engines-0" / "rank1.safetensors").unlink()
    words = ("run", "--engine_dir", tmp_path / "engines-{rank}", "--max_output_len", 4, "--input_text", PROMPT)
    assert here(*words, "--in_process").status == 0
    edit_manifest(tmp_path / "engines-1", lambda manifest: manifest["ranks"]["1"].update(key="another"))
    refused = here(*words, "--in_process")
    assert refused.status == 2
    assert f"its engine in {tmp_path}/engines-1 is of another compile than rank 0 on" in refused.complaints[0]
    (tmp_path / "engines-1" / "manifest.json").unlink()
    assert "engines-1: has no manifest.json" in here(*words, "--in_process").complaints[0]
