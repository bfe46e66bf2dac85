"""What ``gpu_check`` found, as tables for docs/benchmarks: ``python -m moecompiler.tools.gpu_report DIR > FILE.md``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in cells)} |" for cells in lines)


def machine(found: Figures) -> str:
    said = found["versions"]
    gpu, versions = said.get("gpu", {}), said["versions"]
    named = ("tensorrt", "torch", "triton", "cuda.bindings", "onnx", "numpy", "transformers")
    libraries = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    return f"{gpu.get('name')}, driver of CUDA {gpu.get('driver')}, Python {said['python']}, {libraries}."


def validated(found: Figures) -> str:
    """Worst of all outputs of all ranks, and against Hugging Face's model on real text (for full-size layers: random tokens)."""
    rows = []
    for name, report in _named(found, "validate-"):
        outputs, quality = report["outputs"], report["quality"]
        text = quality[-1] if quality else None
        rows.append(
            (
                name,
                f"{max(each['max_abs'] for each in outputs):.1e}",
                f"{max(each['relative'] for each in outputs):.1e}",
                *(
                    (f"{text['max_abs']:.2f}", f"{text['kl']:.1e}", f"{100 * text['top1']:.1f}%")
                    if text
                    else ("", "", "")
                ),
                *((f"{text['perplexity']:.3f} ({text['hf_perplexity']:.3f})",) if text else ("",)),
                "ok" if report["passed"] else "**out of tolerance**",
            )
        )
    titles = ("engines", "outputs, max error", "relative", "logits, max error", "KL", "top-1", "perplexity (HF's)", "")
    return table(titles, rows)


def texts(found: Figures) -> str:
    """Prompts whose 64 tokens are HF's, and how narrow the choices were where the others part."""
    rows = []
    for name, report in _named(found, "text-"):
        parted = [row for row in report["rows"] if row["equal"] < row["length"]]
        margins = ", ".join(f"{row['margin']:.4f} ({row['rms']:.4f})" for row in parted)
        bad = sum(not row["passed"] for row in parted)
        rows.append((name, f"{len(report['rows']) - len(parted)} of {len(report['rows'])}", margins, bad or ""))
    return table(("engines", "equal to HF's", "margin where they part (rms error there)", "no ties"), rows)


def moe(found: Figures) -> str:
    rows = [
        (
            *(
                row["layer"],
                row["dtype"],
                row["tactic"],
                row["tokens"],
                f"{row['hit']:.1f}",
                f"{row['microseconds']:.1f}",
            ),
            *(f"{row['floor']:.1f} ({row['bound']})", f"{100 * row['share']:.1f}%", f"{row['tflops']:.0f}"),
            f"{row['error']:.0e}",
        )
        for _, report in _named(found, "moe")
        for row in report["rows"]
    ]
    titles = ("layer", "dtype", "how", "tokens", "experts hit", "µs", "floor, µs", "share", "TFLOP/s", "error")
    return table(titles, rows)


def attention(found: Figures, name: str = "attention") -> str:
    rows = [
        (
            *(row["case"], row["dtype"], row["tactic"], f"{row['microseconds']:.1f}", f"{row['floor']:.1f}"),
            *(f"{100 * row['share']:.1f}%", f"{row['tflops']:.0f}", _error(row["error"])),
        )
        for row in found[name]["rows"]
    ]
    return table(("sequences × new tokens, past", "dtype", "how", "µs", "floor, µs", "share", "TFLOP/s", "error"), rows)


def decode(found: Figures) -> str:
    rows = [
        (
            *(name, row["layers"], f"{row['step']:.0f}", f"{row['floor']:.0f}", f"{100 * row['share']:.1f}%"),
            *(f"{row['read'] / 1e12:.2f}", f"{1e3 * row['figures']['time_to_first_token_s']:.2f}"),
        )
        for name, report in _named(found, "decode-")
        for row in report["rows"]
    ]
    return table(("plugins", "layers", "step, µs", "floor, µs", "share", "reading, TB/s", "first token, ms"), rows)


def overhead(found: Figures) -> str:
    rows = [
        (
            row["kind"],
            row["dtype"],
            row["nodes"],
            f"{row['shorter']:.1f}",
            f"{row['longer']:.1f}",
            f"{row['per_node']:.2f}",
        )
        for row in found["overhead"]["rows"]
    ]
    return table(("plugins", "dtype", "nodes", "µs", "µs, twice as many", "µs a node"), rows)


def build(found: Figures) -> str:
    rows = []
    for row in found["build"]["rows"]:
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in row["seconds"].items())
        sizes = f"{row['plan'] / 1e9:.2f} GB", f"{row['packed'] / 1e9:.1f} of {row['bound'] / 1e9:.1f} GB"
        rows.append(
            (row["layers"], row["dtype"], parts, f"{row['projected']:.0f}", *sizes, f"{row['peak'] / 2**30:.1f} GiB")
        )
    titles = ("layers", "dtype", "seconds", "with all weights", "plan", "bound weights written", "peak memory")
    return table(titles, rows)


def shipped(found: Figures) -> str:
    rows = [
        (
            *(
                name,
                row["batch_size"],
                row["input_len"],
                row["output_len"],
                f"{1e3 * row['time_to_first_token_s']:.2f}",
            ),
            *(f"{1e6 * row['step_s']:.0f}", f"{1e6 * row['step_p90_s']:.0f}", f"{row['decode_tokens_per_s']:.0f}"),
        )
        for name, report in _named(found, "shipped-")
        for row in report["figures"]
    ]
    return table(("plugins", "batch", "in", "out", "first token, ms", "step, µs", "p90, µs", "decode tokens/s"), rows)


def soak(found: Figures) -> str:
    said = found["soak"]
    lost = said["free_before"] - said["free_least"]
    return (
        f"{said['turns']} turns of {said['shapes']} shapes in {said['seconds']:.0f} s. Free memory after {said['warmup']} turns:"
        f" {said['free_before']} bytes, least after that {lost} less. The fixed prompt ran {said['fixed_runs']} times,"
        f" {said['fixed_changed']} of them with other tokens."
    )


def refusals(found: Figures) -> str:
    rows = [(row["case"], row["status"], f"`{row['stderr']}`") for row in found["refusals"]]
    return table(("engine", "status", "what is said"), rows)


def quantized_texts(found: Figures) -> str:
    """With plugins and without, and how far these are from each other."""
    rows = []
    for _, report in _named(found, "q-text-"):
        between = {f"{pair['name']}-on": pair for pair in report["pairs"]}
        for row in report["rows"]:
            pair = between.get(row["engine"])
            apart = f"{pair['kl']:.1e}{'' if pair['passed'] else ' **too far**'}" if pair else ""
            rows.append(
                (
                    *(row["engine"], row["format"], "" if row["plugins"] is None else row["plugins"]),
                    *(f"{row['perplexity']:.4f}", f"{100 * row['increase']:+.2f}%", f"{row['kl']:.1e}"),
                    *(f"{100 * row['top1']:.1f}%", apart),
                )
            )
    titles = ("engine", "format", "plugin nodes", "perplexity", "more than HF's", "KL from HF", "top-1", "KL on, off")
    return table(titles, rows)


def quantized_moe(found: Figures) -> str:
    rows = [
        (
            *(row["layer"], f"{row['format']}{' ' + str(row['block']) if row['block'] else ''}", row["dtype"]),
            *(row["tactic"], row["tokens"], f"{row['hit']:.1f}", f"{row['microseconds']:.1f}", f"{row['floor']:.1f}"),
            *(f"{100 * row['share']:.1f}%", *_beside(row["unquantized"], row["speedup"]), f"{row['error']:.0e}"),
        )
        for _, report in _named(found, "q-moe")
        for row in report["rows"]
    ]
    titles = ("layer", "format", "dtype", "how", "tokens", "experts hit", "µs", "floor, µs", "share", "floats, µs")
    return table((*titles, "times as fast", "error"), rows)


def quantized_linear(found: Figures) -> str:
    rows = [
        (
            *(row["layer"], row["format"], row["dtype"], row["tactic"], row["tokens"], f"{row['microseconds']:.1f}"),
            *(f"{row['floor']:.1f} ({row['bound']})", f"{100 * row['share']:.1f}%"),
            *(*_beside(row["float16"], row["times"]), f"{row['error']:.0e}"),
        )
        for row in found["q-linear"]["rows"]
    ]
    titles = ("layer", "format", "dtype", "how", "tokens", "µs", "floor, µs", "share", "floats, µs", "times as fast")
    return table((*titles, "error"), rows)


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"


def _beside(other: float, times: float) -> tuple[str, str]:
    """What floats take and how many times as fast codes are; nothing where that was not measured."""
    return (f"{other:.1f}", f"{times:.2f}") if other else ("", "")


SECTIONS: tuple[tuple[str, str, Callable[[Figures], str]], ...] = (
    ("Engines against PyTorch (`validate`)", "validate-", validated),
    ("Greedy text (`tools/compare_text.py`)", "text-", texts),
    ("Alternating batches and lengths (`tools/gpu_soak.py`)", "soak", soak),
    ("What must not run (`tools/gpu_refusals.py`)", "refusals", refusals),
    ("MoE in an engine (`tools/bench_engine_moe.py`)", "moe", moe),
    ("Attention in an engine (`tools/bench_engine_attention.py`)", "attention", attention),
    ("A whole decode step, batch 1 (`tools/bench_engine_decode.py`)", "decode-", decode),
    ("A plugin's node in a CUDA graph (`tools/bench_engine_overhead.py`)", "overhead", overhead),
    ("Building one rank of 8x7B (`tools/bench_engine_build.py`)", "build", build),
    ("The shipped model, float16 (`moecompiler bench`)", "shipped-", shipped),
    ("Quantized engines on text (`tools/bench_quantized_engines.py`)", "q-text-", quantized_texts),
    ("Quantized MoE (`tools/bench_quantized_moe.py`)", "q-moe", quantized_moe),
    ("Quantized Linear (`tools/bench_quantized_linear.py`)", "q-linear", quantized_linear),
    (
        "Attention over caches of codes (`tools/bench_attention.py`)",
        "q-attention",
        partial(attention, name="q-attention"),
    ),
)


def report(summary: Mapping[str, Any], found: Figures) -> str:
    """All that there is, as a page. What was cut short is not there."""
    found = {name: value for name, value in found.items() if value is not None}
    parts = [f"# TensorRT engines, {summary['date']}"]
    if "versions" in found:
        parts.append(machine(found))
    counts = ", ".join(f"{count} {state}" for state, count in summary["counts"].items())
    parts.append(f"`python tools/gpu_check.py --output_dir DIR`: {counts}, {summary['seconds']:.0f} s in all.")
    bad = [(each["name"], each["state"], each["last"]) for each in summary["steps"] if each["state"] != "ok"]
    if bad:
        parts.append(table(("step", "", "last line"), bad))
    for title, prefix, section in SECTIONS:
        if any(name.startswith(prefix) for name in found):
            parts += [f"## {title}", section(found)]
    return "\n\n".join(parts) + "\n"


def _named(found: Figures, prefix: str) -> Iterator[tuple[str, Any]]:
    """By what follows the prefix."""
    return ((name.removeprefix(prefix), value) for name, value in found.items() if name.startswith(prefix))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="what gpu_check wrote")
    options = parser.parse_args(arguments)
    try:
        summary, found = (
            json.loads((options.directory / f"{name}.json").read_text()) for name in ("summary", "figures")
        )
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}; give the --output_dir of gpu_check")
    print(report(summary, found), end="")


if __name__ == "__main__":
    main()
