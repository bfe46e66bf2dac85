"""What ``gpu_check`` runs: a list of commands, each a script or test of this repository that can be run by itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecompiler.tools.gpu_kinds import (
    KINDS,
    QUANTIZED,
    SCALES,
    TESTED,
    Kind,
    compile_full_size,
    compile_quantized,
    compile_shipped,
)
from moecompiler.tools.gpu_schedule import Step

CORRECTNESS, FIGURES, OF_CODES = "correctness", "figures", "quantized"
FULL_SIZE = ("8x22b", "8x7b")  # the longer ones first
DECODE_LAYERS, DECODE_SLOTS = 4, 256
BUILD_LAYERS, PACKED_LAYERS = 32, 2
_OOTB_TOKENS = ("1", "16", "64", "256", "1024", "4096", "8192")
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "--tb=short")


@dataclass(frozen=True)
class Places:
    """The repository, and a directory for all that is made."""

    root: Path
    work: Path

    @property
    def engines(self) -> Path:
        return self.work / "engines"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def figures(self) -> Path:
        return self.work / "figures"

    @property
    def shipped(self) -> Path:
        return self.root / "tests" / "data" / "tiny-mixtral"


def all_steps(places: Places) -> list[Step]:
    """In the order in which they begin: what takes long first, what others wait for before them."""
    return [*_correctness(places), *_quantized(places), *_figures(places), *_quantized_figures(places)]


def _correctness(places: Places) -> Iterator[Step]:
    yield Step("versions", CORRECTNESS, script("gpu_versions", places, "versions"), 60)
    for model in FULL_SIZE:
        for plugins in ("on", "off"):
            name = f"{model}-{plugins}"
            yield _compile_full_size(places, name, Kind("float16", plugins, "one"), model, 1)
            yield _validate(places, name, 240, removes=True)
    yield from _tests()
    for kind in KINDS:
        words = compile_shipped(kind, places.shipped, places.engines / kind.name)
        yield Step(f"compile-{kind.name}", CORRECTNESS, ours(*words), 200)
    for kind in KINDS:
        yield _validate(places, kind.name, 120)
        needs = (f"compile-{kind.name}",)
        engine = str(places.engines / kind.name)
        text = script("compare_text", places, f"text-{kind.name}", engine, "--model_dir", str(places.shipped))
        yield Step(f"text-{kind.name}", CORRECTNESS, text, 120, needs)
        if kind in TESTED:
            test = f"tests/gpu/test_tensorrt_model.py::test_tokens_chosen_on_the_gpu[{kind.name}]"
            shared = (f"--engines={places.engines}",)
            yield Step(f"chosen-{kind.name}", CORRECTNESS, (*PYTEST, *shared, test), 120, needs)
    shown = KINDS[0].name
    refusals = script("gpu_refusals", places, "refusals", str(places.engines / shown))
    yield Step("refusals", CORRECTNESS, refusals, 120, (f"compile-{shown}",))
    soak = script("gpu_soak", places, "soak", str(places.engines / shown), "--turns", "2000")
    yield Step("soak", CORRECTNESS, soak, 120, (f"compile-{shown}",), alone=True)


def _tests() -> Iterator[Step]:
    """The tests marked gpu, in processes of about the same length; those of test_tensorrt_model.py are steps of their own."""
    ops = "tests/gpu/test_tensorrt_ops.py"
    parts: dict[str, tuple[str, ...]] = {
        "kernels": ("tests/plugins/test_kernels_gpu.py",),
        "ops-moe-float16": (ops, "-k", "test_moe and float16 and not bfloat16"),
        "ops-moe-bfloat16": (ops, "-k", "test_moe and bfloat16"),
        "ops-attention": (ops, "-k", "test_attention"),
        "ops-others": (ops, "-k", "not test_moe and not test_attention"),
        "sampling": ("tests/gpu/test_sampling_gpu.py",),
    }
    for name, words in parts.items():
        yield Step(name, CORRECTNESS, (*PYTEST, *words), 240)


def _quantized(places: Places) -> Iterator[Step]:
    """Kernels of codes, and the shipped model in every format, with plugins and without."""
    scales = places.engines / "q-scales"
    words = ("--model_dir", str(places.shipped), "--output_dir", str(scales), "--calib_size", "16")
    yield Step("q-scales", OF_CODES, ours("calibrate", *words), 120)
    yield from _quantized_tests()
    engines = [f"q-{name}-{plugins}" for name in QUANTIZED for plugins in ("on", "off")]
    for engine in engines:
        _, name, plugins = engine.split("-")
        compiled = compile_quantized(name, plugins, places.shipped, scales, places.engines / engine)
        needs = ("q-scales",) if SCALES in compiled else ()
        yield Step(f"compile-{engine}", OF_CODES, ours(*compiled), 240, needs)
    for engine in engines:
        yield _validate(places, engine, 120, group=OF_CODES)
    for name in QUANTIZED:
        pair = [f"q-{name}-{plugins}" for plugins in ("on", "off")]
        read = [*(str(places.engines / each) for each in pair), "--model_dir", str(places.shipped)]
        text = script("bench_quantized_engines", places, f"q-text-{name}", *read)
        yield Step(f"q-text-{name}", OF_CODES, text, 180, tuple(f"compile-{each}" for each in pair))


def _quantized_tests() -> Iterator[Step]:
    """Each file's tests in processes of about the same length, by words in their names."""
    parts = {
        "quantized_kernels": ("Int8 or Fp8", "Nvfp4", "Asymmetric"),
        "quantized_linear": ("Int8 or Fp8", "Nvfp4", "Asymmetric"),
        "quantized_cache": ("int8", "fp8_context"),
        "grouped_codes_gpu": ("int8 or nvfp4", "asymmetric"),
        "grouped_fp8_gpu": ("test_linear", "bfloat16"),
    }
    for file, words in parts.items():
        for index, which in enumerate(split(words)):
            name = f"q-{file.removeprefix('quantized_').removesuffix('_gpu').replace('_', '-')}-{index}"
            yield Step(name, OF_CODES, (*PYTEST, f"tests/gpu/test_{file}.py", "-k", which), 200)


def split(words: Sequence[str]) -> list[str]:
    """Expressions for pytest's ``-k``, of which exactly one is true of each test: the first of ``words`` that is, or none."""
    before = [" or ".join(words[:index]) for index in range(len(words) + 1)]
    firsts = [
        f"({word}) and not ({earlier})" if earlier else word for word, earlier in zip(words, before, strict=False)
    ]
    return [*firsts, f"not ({before[-1]})"]


def _quantized_figures(places: Places) -> Iterator[Step]:
    def timed(name: str, seconds: int, command: tuple[str, ...]) -> Step:
        return Step(name, OF_CODES, command, seconds, alone=True)

    for name, tool, words in (
        ("q-moe", "bench_quantized_moe", ("--tokens", "1", "2", "4", "8", "16", "64", "256", "1024", "4096")),
        ("q-linear", "bench_quantized_linear", ("--tokens", "1", "4", "16", "64", "256", "1024", "4096")),
    ):
        command = (sys.executable, "-m", f"moecompiler.tools.{tool}", "--json", str(places.figures / f"{name}.json"))
        yield timed(name, 240, (*command, *words))
    in_engines = ("--tokens", "1", "4", "16", "64", "256", "1024", "4096")
    yield timed("q-moe-engine", 300, script("bench_engine_quantized_moe", places, "q-moe-engine", *in_engines))
    caches = ("--caches", "floats", "int8", "fp8", "fp8_context")
    yield timed("q-attention", 180, script("bench_attention", places, "q-attention", *caches))


def _figures(places: Places) -> Iterator[Step]:
    moe = {
        "moe": ("--layers", "8x7b", "8x22b"),
        "moe-bfloat16": ("--layers", "8x7b", "--dtypes", "bfloat16"),
        "moe-ranks": ("--layers", "8x7b tp2", "8x7b tp4", "8x7b ep2", "8x7b ep4"),
        "moe-ootb": ("--layers", "8x7b", "--plugins", "off", "--tokens", *_OOTB_TOKENS),
    }
    decode = {plugins: f"decode-{plugins}" for plugins in ("on", "off")}

    def timed(name: str, tool: str, seconds: int, *words: str, needs: tuple[str, ...] = ()) -> Step:
        return Step(name, FIGURES, script(tool, places, name, *words), seconds, needs, alone=True)

    yield timed("moe", "bench_engine_moe", 180, *moe["moe"])
    for plugins, name in decode.items():
        kind = Kind("float16", plugins, "one")
        yield _compile_full_size(places, name, kind, "8x7b", DECODE_LAYERS, FIGURES, DECODE_SLOTS, 1)
        engine = str(places.engines / name)
        step = script("bench_engine_decode", places, name, engine, "--input_len", "128", "--output_len", "65")
        yield Step(name, FIGURES, step, 100, (f"compile-{name}",), alone=True, removes=(places.engines / name,))
    yield timed("attention", "bench_engine_attention", 120, "--plugins", "on")
    yield timed("overhead", "bench_engine_overhead", 90)
    for name in ("moe-bfloat16", "moe-ranks", "moe-ootb"):
        yield timed(name, "bench_engine_moe", 150, *moe[name])
    for plugins in ("on", "off"):
        engine = f"float16-{plugins}-one"
        sizes = ("--batch_size", "1,8", "--input_len", "16,64", "--output_len", "64")
        files = ("--output_json", str(places.figures / f"shipped-{plugins}.json"))
        words = ours("bench", "--engine_dir", str(places.engines / engine), *sizes, *files)
        yield Step(f"shipped-{plugins}", FIGURES, words, 60, (f"compile-{engine}",), alone=True)
    build = ("--num_layers", str(BUILD_LAYERS), "--packed_layers", str(PACKED_LAYERS), "--work_dir", str(places.work))
    yield timed("build", "bench_engine_build", 240, *build)


def _compile_full_size(
    places: Places,
    name: str,
    kind: Kind,
    model: str,
    layers: int,
    group: str = CORRECTNESS,
    slots: int = 256,
    batch: int = 3,
) -> Step:
    words = compile_full_size(kind, model, layers, places.engines / name, slots, batch)
    return Step(f"compile-{name}", group, ours(*words), 240, alone=group == FIGURES)


def _validate(places: Places, name: str, seconds: int, removes: bool = False, group: str = CORRECTNESS) -> Step:
    engine, report = places.engines / name, places.figures / f"validate-{name}.json"
    words = ours("validate", str(engine), "--tokens", "512", "--output_json", str(report))
    gone = (engine,) if removes else ()
    return Step(f"validate-{name}", group, words, seconds, (f"compile-{name}",), removes=gone)


def ours(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "moecompiler.tools.main", *words)


def script(module: str, places: Places, name: str, *words: str) -> tuple[str, ...]:
    """A script whose first argument is where its figures go."""
    return (sys.executable, "-m", f"moecompiler.tools.{module}", str(places.figures / f"{name}.json"), *words)
