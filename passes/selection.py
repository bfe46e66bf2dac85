"""Which passes are asked for: a pipeline or names, without some, up to one. Other packages' passes have names too."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from moecompiler.errors import UserError
from moecompiler.passes.pipelines import OOTB, named_pipelines, passes_by_name
from moecompiler.pipeline import Pass
from moecompiler.quantization.recipe import QuantizationRecipe

ENTRY_POINTS = "moecompiler.passes"  # the group in which another package names its passes: name = "module:Class"


@dataclass(frozen=True)
class Selection:
    """``pipeline``: names of pipelines and of passes, joined by commas. Of these ``only`` some (all, if empty), and not those to
    ``disable``, up to and including ``stop_after`` (a name, for its first, or a label such as ``03-constant-folding``)."""

    pipeline: str = OOTB
    only: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    stop_after: str = ""
    quantization: QuantizationRecipe | None = None

    def passes(self) -> tuple[Pass, ...]:
        """Raises: UserError, one line, where a name is none, or another package's pass cannot be loaded."""
        steps = [step for name in self.pipeline.split(",") for step in self._named(name.strip())]
        for option, names in (("--only_pass", self.only), ("--disable_pass", self.disable)):
            for name in names:
                if all(step.name != name for step in steps):
                    raise UserError(f"{option} {name}: is not in {self._described(steps)}")
        kept = [each for each in steps if (not self.only or each.name in self.only) and each.name not in self.disable]
        end = self.position("--stop_after", self.stop_after, kept) if self.stop_after else len(kept)
        return tuple(kept[:end])

    def position(self, option: str, name: str, steps: Sequence[Pass]) -> int:
        """The index, from 1, of the first of ``steps`` of that name or label. Raises: UserError where there is none."""
        for index, step in enumerate(steps, 1):
            if name in (step.name, label(index, step.name)):
                return index
        raise UserError(f"{option} {name}: is not in {self._described(steps)}")

    def _named(self, name: str) -> tuple[Pass, ...]:
        pipelines, passes = named_pipelines(self.quantization), passes_by_name(self.quantization)
        if name in pipelines:
            return pipelines[name]
        if name in passes:
            return (passes[name],)
        theirs = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
        if name in theirs:
            return (load(theirs[name]),)
        known = f"{', '.join(sorted(pipelines))}, or passes by name: {', '.join(sorted({*passes, *theirs}))}"
        raise UserError(f"--pipeline {name}: there is none of that name; choose from {known}")

    def _described(self, steps: Sequence[Pass]) -> str:
        names = ", ".join(label(index, step.name) for index, step in enumerate(steps, 1))
        return f"pipeline {self.pipeline}, which is {names or 'empty'}"


def label(index: int, name: str) -> str:
    """The name of the graph after the pass at ``index`` (from 1; 0 is what the passes are given)."""
    return f"{index:02}-{name}"


def load(entry: EntryPoint) -> Pass:
    """Another package's pass. Raises: UserError where it cannot be imported or is none."""
    package = entry.dist.name if entry.dist is not None else entry.value
    try:
        step = entry.load()()
    except Exception as error:  # whatever another package's code raises
        raise UserError(f"pass {entry.name} of package {package}: cannot be loaded: {error!r}") from error
    if getattr(step, "name", None) != entry.name or not callable(getattr(step, "rewrites", None)):
        raise UserError(f"pass {entry.name} of package {package}: {entry.value} is no pass of that name")
    return step


def identity(steps: Sequence[Pass]) -> list[tuple[Any, ...]]:
    """Name, source (as SHA-256) and parameters of each pass: what an older version of one made, or one with other parameters, is
    not taken for this one's."""
    return [(step.name, _source(type(step)), getattr(step, "parameters", None)) for step in steps]


def _source(kind: type) -> str:
    """The digest of the file a class is in, and of another package's whole package: it may import from there."""
    file = inspect.getsourcefile(kind)
    if file is None:
        return ""
    package = sys.modules[kind.__module__].__package__
    if not package or package.partition(".")[0] == "moecompiler":
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for folder in sys.modules[package].__path__:
        for source in sorted(Path(folder).rglob("*.py")):
            digest.update(f"{source.relative_to(folder)}\n".encode() + source.read_bytes())
    return digest.hexdigest()
