"""Which of an engine's plugins make a check fail: engines built with fewer and fewer of them. What ``compare --bisect`` does."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moecompiler.artifact import Artifact
from moecompiler.atomic import fingerprint, write_json_atomic
from moecompiler.comparison.bisect import Found, Judgement, PluginNode, find_culprits, plugin_nodes
from moecompiler.comparison.ddmin import Outcome
from moecompiler.comparison.result import Probe
from moecompiler.errors import UserError
from moecompiler.graph import load_program
from moecompiler.plugin_switches import PluginSwitches
from moecompiler.tools.build import run_build
from moecompiler.tools.engine_options import MoeWeights
from moecompiler.tools.flags import EngineFlags, WorkFlags
from moecompiler.tools.job import code_fingerprint

STATE, PROBE = "bisect.json", "probe"
CRASHED = "the process ended while it was tried"


def bisect_plugins(
    engines: Artifact,
    source: Artifact,
    judge: Callable[[Artifact, PluginSwitches], Judgement],
    check: str,
    work_dir: Path,
    told: Callable[[Probe], None] = lambda probe: None,
    most: int = 200,
) -> Found:
    """The smallest set of the plugins of ``engines`` for which ``judge`` says fail of engines that have no others.

    ``source``: the optimized graphs that they were built from. Each probe is built with the limits of ``engines`` in
    ``work_dir``, in place of the one before it, whose timings it uses. What was tried is kept there: a run that was interrupted,
    also by a probe that took the process with it, goes on; ``check`` says what is judged, and another check begins anew.

    Raises: UserError where the engines have no plugins, or there is nothing to find.
    """
    nodes = nodes_of(engines, source)
    if not nodes:
        raise UserError(f"{engines.directory}: has no plugins: there is nothing to bisect")
    state = _State(work_dir / STATE, _key(engines, source, check))
    probe_dir = work_dir / PROBE

    def judged(switches: PluginSwitches) -> Judgement:
        flags, max_seq_len = flags_of(engines, switches)
        with redirect_stderr(io.StringIO()):  # what builds note is no news
            run_build(source, probe_dir, flags, WorkFlags(), max_seq_len)
            if other := _other_tactics(engines, Artifact.open(probe_dir, ("engine",))):
                run_build(source, probe_dir, replace(flags, plugin_tactics=",".join(other)), WorkFlags(), max_seq_len)
        return judge(Artifact.open(probe_dir, ("engine",)), switches)

    def heard(probe: Probe) -> None:
        state.add(probe)
        told(probe)

    try:
        return find_culprits(nodes, judged, state.probes, heard, state.begin, most)
    finally:
        state.end()
        shutil.rmtree(probe_dir, ignore_errors=True)


def nodes_of(engines: Artifact, source: Artifact) -> tuple[PluginNode, ...]:
    """The nodes that are plugins in engines, of all ranks. Raises: UserError where a rank is missing."""
    ranks = range(engines.world_size)
    chosen = {name for rank in ranks for name in engines.rank_info(rank).get("engine", {}).get("plugins", ())}
    return plugin_nodes((load_program(source.path(f"rank{rank}.onnx")) for rank in ranks), chosen)


def flags_of(engines: Artifact, switches: PluginSwitches) -> tuple[EngineFlags, int]:
    """What engines were built with, but for the plugins; and their ``--max_seq_len``."""
    limits, record = engines.header["limits"], engines.rank_info(0).get("engine", {})
    flags = EngineFlags(
        backend=engines.header["backend"],
        max_batch_size=limits["max_batch_size"],
        max_input_len=limits["max_input_len"],
        max_num_tokens=limits["max_num_tokens"],
        plugins=str(switches),
        moe_weights=_where_weights_are(record.get("bound", ())),
    )
    return flags, limits["max_seq_len"]


def _other_tactics(engines: Artifact, probe: Artifact) -> list[str]:
    """The plans that interpreted nodes have in ``engines``, where a probe's have others: they were asked for by name."""
    wanted, made = tactics_of(engines), tactics_of(probe)
    asked = {wanted[node] for node in made}
    return sorted(asked) if any(wanted[node] != tactic for node, tactic in made.items()) else []


def tactics_of(engines: Artifact) -> dict[str, str]:
    """Node → plan, of interpreted plugins of all ranks."""
    found: dict[str, str] = {}
    for rank in range(engines.world_size):
        found |= engines.rank_info(rank).get("engine", {}).get("tactics", {})
    return found


def _where_weights_are(bound: Collection[str]) -> MoeWeights:
    """By the names of those that are bound when an engine runs."""
    if not bound:
        return MoeWeights.auto
    return MoeWeights.external if all(".experts." in name for name in bound) else MoeWeights.all


def _key(engines: Artifact, source: Artifact, check: str) -> str:
    graphs = [source.rank_files(rank)[f"rank{rank}.onnx"].sha256 for rank in range(source.world_size)]
    plugins = [engines.rank_info(rank).get("engine", {}).get("plugins", {}) for rank in range(engines.world_size)]
    return fingerprint(code_fingerprint(), engines.header, graphs, plugins, check)


class _State:
    """The probes made so far, in a file. What was begun and did not end took the process with it: it is unresolved."""

    def __init__(self, path: Path, key: str):
        self._path, self._key, self._begun = path, key, False
        self.probes: list[Probe] = []
        with suppress(OSError, ValueError, KeyError, TypeError):  # what cannot be read is begun anew
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["key"] == key:
                probes = [_probe(each) for each in data["probes"]]
                if data["begun"] is not None:
                    probes.append(Probe(tuple(data["begun"]), str(Outcome.UNRESOLVED), None, 0.0, CRASHED))
                self.probes = [each for each in probes if each.outcome != Outcome.UNRESOLVED or each.note == CRASHED]

    def begin(self, names: Iterable[str]) -> None:
        self._write([*names])

    def end(self) -> None:
        """What was begun was given up, as by an interrupt."""
        if self._begun:
            self._write(None)

    def add(self, probe: Probe) -> None:
        self.probes.append(probe)
        self._write(None)

    def _write(self, begun: list[str] | None) -> None:
        self._begun = begun is not None
        # a value that is no number is text, which JSON takes
        probes = [asdict(each) | {"value": None if each.value is None else repr(each.value)} for each in self.probes]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._path, {"key": self._key, "begun": begun, "probes": probes})
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror or error}") from None


def _probe(data: dict[str, Any]) -> Probe:
    value = None if data["value"] is None else float(data["value"])
    return Probe(tuple(data["plugins"]), str(Outcome(data["outcome"])), value, data["seconds"], data["note"])
