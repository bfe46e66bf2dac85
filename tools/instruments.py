"""What is shown of passes while they run: graphs as files and as text, and a table of what each did."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moecompiler.dumps import write_dumps
from moecompiler.errors import UserError
from moecompiler.graph import Program
from moecompiler.graph_text import graph_text
from moecompiler.passes.selection import Selection, label
from moecompiler.pipeline import PassResult
from moecompiler.tools.flags import InstrumentFlags
from moecompiler.tools.options import Dump
from moecompiler.weights import TensorReader


def check_instruments(flags: InstrumentFlags, selection: Selection) -> None:
    """Raises: UserError where a graph is to be printed after a pass that does not run, or passes cannot be had."""
    steps = selection.passes()
    for name in flags.print_after or ():
        selection.position("--print_after", name, steps)


class Watcher:
    """Hears of each pass of one graph, ``whose`` it is, and keeps what is to be written and printed."""

    def __init__(self, flags: InstrumentFlags, given: Program, whose: str):
        self._flags, self._whose = flags, whose
        self._programs = {} if flags.dump_passes is Dump.none else {f"{label(0, 'given')}.onnx": given}
        self.text = ""

    @contextmanager
    def printed_if_it_fails(self) -> Iterator[None]:
        """Prints the graphs asked for up to the pass that ends the run with an error, and lets the error pass."""
        try:
            yield
        except UserError:
            sys.stdout.write(self.text)
            raise

    def watch(self, index: int, program: Program, result: PassResult) -> None:
        """See ``pipeline.run_passes``."""
        name = label(index + 1, result.name)
        if self._flags.dump_passes is Dump.all or (self._flags.dump_passes is Dump.changed and result.changes):
            self._programs[f"{name}.onnx"] = program
        if {result.name, name} & {*(self._flags.print_after or ())}:
            self.text += f"--- {self._whose} after {name} ---\n{graph_text(program)}"

    @property
    def dumps(self) -> bool:
        """Whether there are graphs to write."""
        return bool(self._programs)

    @property
    def share(self) -> float:
        """How much of the work are the passes themselves: little, where weights are to be written."""
        return 0.1 if self.dumps and self._flags.dump_weights else 1.0

    def write(
        self,
        open_reader: Callable[[], TensorReader],
        path_of: Callable[[str], Path],
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """Writes the graphs that are wanted, ``path_of`` each name; ``progress`` goes on from ``share``.

        Raises: UserError where a weight does not fit the type in which it is to be written, or cannot be written.
        """
        if not self.dumps:
            return
        reader = open_reader() if self._flags.dump_weights else None
        try:
            write_dumps(self._programs, reader, path_of, lambda done: progress(self.share + (1 - self.share) * done))
        except OverflowError as error:
            raise UserError(f"{error}, or --no_dump_weights") from None


def show(results: Sequence[PassResult], text: str, flags: InstrumentFlags, whose: str) -> None:
    """Prints graphs and times on stdout, and what did not match on stderr."""
    sys.stdout.write(text)
    if flags.time_passes:
        Console().print(times_table(results, whose))
    for result in results:
        for missed in result.missed:
            print(f"note: {whose}: pass {result.name} did not match in {missed}", file=sys.stderr)


def times_table(results: Sequence[PassResult], title: str) -> Table:
    """What each pass did and how long it took."""
    table = Table("pass", "matches", "nodes", "seconds", title=title, title_justify="left")
    for index, result in enumerate(results, 1):
        nodes = f"{result.nodes_before} → {result.nodes_after}"
        table.add_row(label(index, result.name), str(result.matches), nodes, f"{result.seconds:.3f}")
    table.add_row("all", str(sum(r.matches for r in results)), "", f"{sum(r.seconds for r in results):.3f}")
    return table
