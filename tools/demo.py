"""``make demo``: the shipped model from checkpoint to text on two ranks, checked, with what each step did and took.

Each step is the command a user would type; it is shown before it runs. The output starts fresh, so that there is something
to see the second time too.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moecompiler.artifact import Artifact
from moecompiler.pages.figures import byte_size

ROOT = Path(__file__).resolve().parent.parent
MODEL, OUTPUT = Path("tests/data/tiny-mixtral"), Path("build/demo")
RANKS = 2
COMPILE = ("--tp_size", "2", "--moe_ep_size", "2", "--dtype", "bfloat16", "--max_seq_len", "256", "--workers", "2")
PROMPT = "def read_lines(path):"
NEW_TOKENS = 64
OUT_OF_TOLERANCE = 1  # the exit status of a validation that was made and not passed
VENV_BIN = Path(sys.executable).parent
Run = Callable[..., str]


class StepFailed(Exception):
    """A step's command ended with this status; what was wrong it has said itself."""

    def __init__(self, command: str, status: int):
        super().__init__(f"{command} ended with status {status}")
        self.status = status


def main(output: Path = OUTPUT) -> int:
    """Returns the exit status: 0, or that of the step that failed. What is in ``output`` is replaced."""
    os.chdir(ROOT)
    engines, summary = output / "engines", output / "summary.json"
    console = Console(highlight=False)
    seconds: dict[str, float] = {}
    try:
        report = run_steps(console, seconds, output, engines, summary)
    except StepFailed as error:
        console.print(f"[red]demo: {error}[/red]")
        return error.status
    artifact = Artifact.open(engines, ("engine",))
    figures = figures_table(report, json.loads(summary.read_text()), seconds)
    for table in (passes_table(artifact), ranks_table(artifact, report), figures):
        console.print()
        console.print(table)
    program = os.path.relpath(VENV_BIN / "moecompiler", ROOT)
    console.print(f"\nThe engines are in {engines}. Look into them with {program} inspect {engines}", soft_wrap=True)
    if not report["passed"]:
        console.print(f"[red]demo: out of tolerance; {program} validate {engines} says where[/red]", soft_wrap=True)
        return OUT_OF_TOLERANCE
    return 0


def run_steps(
    console: Console, seconds: dict[str, float], output: Path, engines: Path, summary: Path
) -> dict[str, Any]:
    """Compiles, runs and validates; returns what ``validate --json`` reports."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)

    with step(console, seconds, "compile", f"A trained Mixtral of 8 experts becomes engines for {RANKS} ranks") as run:
        run("moecompiler", "compile", "--model_dir", MODEL, "--output_dir", engines, *COMPILE)
    with step(console, seconds, "run", f"{RANKS} MPI processes continue a prompt, on the CPU") as run:
        text = ("--max_output_len", NEW_TOKENS, "--input_text", PROMPT)
        run(*mpirun(RANKS), "moecompiler", "run", "--engine_dir", engines, *text, "--summary_json", summary)
    with step(
        console, seconds, "validate", "Polygraphy compares every rank with PyTorch, and all with HF's model"
    ) as run:
        found = run("moecompiler", "validate", engines, "--json", capture=True, allowed=(0, OUT_OF_TOLERANCE))
    return json.loads(found)


def mpirun(ranks: int) -> tuple[str, ...]:
    """Open MPI's launcher: as root it wants to be told so, it may start more ranks than there are cores, leaves their
    threads free to use all of them, and passes text on as it comes instead of line by line."""
    as_root = ("--allow-run-as-root",) if os.geteuid() == 0 else ()
    return ("mpirun", *as_root, "--oversubscribe", "--bind-to", "none", "--stream-buffering", "0", "-n", str(ranks))


@contextmanager
def step(console: Console, seconds: dict[str, float], name: str, title: str) -> Iterator[Run]:
    """Gives a function that shows and runs a command, and notes in ``seconds[name]`` how long the block took."""
    console.print(f"\n[bold cyan]{title}[/bold cyan]")
    environment = os.environ | {"PATH": f"{VENV_BIN}{os.pathsep}{os.environ.get('PATH', '')}"}

    def run(*command: object, capture: bool = False, allowed: tuple[int, ...] = (0,)) -> str:
        words = [str(word) for word in command]
        console.print(f"[dim]$ {escape(shlex.join(words))}[/dim]", soft_wrap=True)
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE if capture else None, text=True)
        if done.returncode not in allowed or (capture and not done.stdout):
            raise StepFailed(name, done.returncode or 1)
        return done.stdout or ""

    started = time.perf_counter()
    yield run
    seconds[name] = time.perf_counter() - started


def passes_table(artifact: Artifact) -> Table:
    """The passes in order, and how often each matched on each rank."""
    table = Table("pass", *(f"matches, rank {rank}" for rank in artifact.ranks), "nodes", title="Graph passes")
    for steps in zip(*(artifact.rank_info(rank)["passes"] for rank in artifact.ranks), strict=True):
        matches = (str(each["matches"]) for each in steps)
        table.add_row(steps[0]["name"], *matches, f"{steps[0]['nodes_before']} → {steps[0]['nodes_after']}")
    return table


def ranks_table(artifact: Artifact, report: dict[str, Any]) -> Table:
    """Each rank's engine: its size and how far it is from its PyTorch module."""
    table = Table(
        "rank", "engine", "outputs compared", "largest error", "relative", "", title="Engines against PyTorch"
    )
    for rank in artifact.ranks:
        size = sum(record.bytes for record in artifact.rank_files(rank).values())
        outputs = [each for each in report["outputs"] if each["rank"] == rank]
        errors = (f"{max(each[key] for each in outputs):.1e}" for key in ("max_abs", "relative"))
        passed = "[green]ok[/green]" if all(each["passed"] for each in outputs) else "[red]FAIL[/red]"
        table.add_row(str(rank), byte_size(size), str(len(outputs)), *errors, passed)
    return table


def figures_table(report: dict[str, Any], summary: dict[str, Any], seconds: dict[str, float]) -> Table:
    """Agreement with HF's model, speed, and how long each step took."""
    table = Table(show_header=False, title="All ranks together")
    for each in report["quality"]:
        agreement = (
            f"largest logit error {each['max_abs']:.1e}, same first choice {each['top1']:.1%}, KL {each['kl']:.1e}"
        )
        table.add_row(f"against HF, {each['tokens']} {each['scenario']} tokens", agreement)
        if each["scenario"] == "text":
            table.add_row(
                "perplexity of held-out text", f"{each['perplexity']:.3f} (HF's: {each['hf_perplexity']:.3f})"
            )
    table.add_row("first token after", f"{summary['time_to_first_token_s'] * 1e3:.1f} ms")
    table.add_row("tokens per second", f"{summary['decode_tokens_per_s']:.0f}")
    for name, duration in seconds.items():
        table.add_row(f"seconds to {name}", f"{duration:.1f}")
    table.add_row("seconds in all", f"{sum(seconds.values()):.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
