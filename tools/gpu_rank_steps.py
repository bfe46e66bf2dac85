"""What ``gpu_check`` shows of several ranks: that they say what one says, how they exchange, and how long that takes.

Ranks run as processes under ``mpirun`` (Open MPI's or MPICH's, with mpi4py), one on each GPU, counted round where there are
fewer.
"""

from __future__ import annotations

from collections.abc import Iterator

from moecompiler.tools.gpu_kinds import RANK_MAPPINGS, Kind, compile_shipped
from moecompiler.tools.gpu_schedule import Step
from moecompiler.tools.gpu_steps import PYTEST, Places, ours, script

RANKS = "ranks"
COMPARED = ("tp2", "ep2", "pp2", *RANK_MAPPINGS)
FUSED = ("tp2", "tp4")  # with what follows an all-reduce in the same op, too
LONG_SLOTS, LONG_TOKENS = 1024, 2000  # as many slots as the shipped model has positions; two texts


def rank_steps(places: Places) -> Iterator[Step]:
    """They follow those of ``gpu_steps``, whose engines of two ranks they use."""
    kinds = [Kind("float16", "on", mapping) for mapping in COMPARED]
    for kind in kinds:
        if kind.mapping in RANK_MAPPINGS:
            words = compile_shipped(kind, places.shipped, places.engines / kind.name)
            yield Step(f"compile-{kind.name}", RANKS, ours(*words), 200)
    fused = {f"float16-on-{mapping}-fused": Kind("float16", "on", mapping) for mapping in FUSED}
    for name, kind in fused.items():
        words = compile_shipped(kind, places.shipped, places.engines / name, pipeline="tensorrt")
        yield Step(f"compile-{name}", RANKS, ours(*words), 200)
    long = "float16-on-tp2-long"
    words = compile_shipped(Kind("float16", "on", "tp2"), places.shipped, places.engines / long, LONG_SLOTS)
    yield Step(f"compile-{long}", RANKS, ours(*words), 200)
    for file, seconds in (("collectives", 400), ("nccl", 200)):
        yield Step(f"ranks-{file}", RANKS, (*PYTEST, f"tests/gpu/test_{file}_gpu.py"), seconds, alone=True)
    one = Kind("float16", "on", "one").name
    names = [one, *(kind.name for kind in kinds), *fused]
    engines, needs = [str(places.engines / name) for name in names], tuple(f"compile-{name}" for name in names)
    for asked, chosen in (("auto", engines), ("host", engines[:2])):
        more = ("--model_dir", str(places.shipped), "--collectives", asked)
        compared = script("compare_ranks", places, f"ranks-{asked}", *chosen, *more)
        yield Step(f"ranks-{asked}", RANKS, compared, 500, needs, alone=True)
    for ranks in ("2", "4"):
        name = f"all-reduce-{ranks}"
        bench = script("bench_all_reduce", places, name, "--ranks", ranks)
        yield Step(name, RANKS, bench, 260, alone=True)
    soak = script("gpu_long", places, "ranks-long", str(places.engines / long), "--tokens", str(LONG_TOKENS))
    yield Step("ranks-long", RANKS, soak, 400, (f"compile-{long}",), alone=True)
