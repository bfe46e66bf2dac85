"""Results of comparisons as they might be, made up: for the report, which does not ask where its figures are from."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from moecompiler.comparison.result import (
    OOTB,
    PLUGINS,
    REFERENCE,
    Between,
    Bisection,
    Check,
    Flip,
    Greedy,
    GreedyText,
    Histogram,
    LayerErrors,
    LayerLevel,
    LogitErrors,
    Meta,
    ModelLevel,
    OpCase,
    OpLevel,
    OpTime,
    Probe,
    ProgramInfo,
    ProgramRouting,
    Replayed,
    Result,
    RoutingLevel,
    Stretch,
    Token,
    Ulps,
)

_TEXT = "The little bear went to the river . He saw a fish and wanted to eat it , but it was too fast"
WORDS = _TEXT.replace(". ", ".\n ").split(" ")
CASES = ("real", "large", "one_expert", "ties", "zeros", "denormals", "cache_end", "one_token", "ragged")
OPS = (
    ("RMSNorm", "input_layernorm"),
    ("Attention", "self_attn"),
    ("AddRMSNorm", "post_attention_layernorm"),
    ("MoE", "mlp"),
)
EDGES = (0.0, *(10.0**power for power in np.arange(-9, 2.5, 0.5)), math.inf)


def made_result(layers: int = 4, experts: int = 4, tokens: int = 24, *, bad: bool = False) -> Result:
    """A result with every level, of ``layers`` layers and ``tokens`` tokens; ``bad``: with checks that fail, flips beyond
    rounding, a bisection, and numbers that are none."""
    numbers = np.random.default_rng(layers + experts + tokens)
    layer, model = _layer(numbers, layers, tokens, bad, 4), _model(numbers, tokens, bad)
    replayed = Replayed(
        "The reference’s choices are fed as logits.",
        _layer(numbers, layers, tokens, False),
        _model(numbers, tokens, False),
    )
    verdict = [
        Check("op", "no further from the truth", "every node", 1.0 if bad else 0.0, 0.0, not bad),
        Check("layer", "relative error", "plugins, model.layers.1", 3e-3, 1e-2, True),
        Check("model", "mean KL", PLUGINS, 4e-4, 1e-3, True),
        Check("model", "top-1", PLUGINS, 0.991, 0.98, True, at_most=False),
        Check("routing", "flips beyond rounding", PLUGINS, 2.0 if bad else 0.0, 0.0, not bad),
    ]
    probes = (
        Probe(("a", "b"), "fail", 2.0, 1.5),
        Probe(("a",), "pass", 0.1, 1.0),
        Probe((), "unresolved", None, 0.1, "no"),
    )
    return Result(
        _meta(layers, experts, tokens),
        _op(numbers, layers, bad),
        layer,
        model,
        _routing(numbers, layers, experts, tokens, replayed, bad),
        tuple(verdict),
        ("Plugins ran in Triton’s interpreter.",),
        Bisection("op: no further from the truth", ("model.layers.1.mlp/MoE",), probes, "reduced/moe") if bad else None,
    )


def _meta(layers: int, experts: int, tokens: int) -> Meta:
    def info(name: str, plugins: dict[str, int], decode: float) -> ProgramInfo:
        return ProgramInfo(
            *(name, name, f"work/{name}", "onnxruntime", "ONNX Runtime 1.32", "float16", "none", "tp1 pp1", plugins),
            *(31_200_000, 92_300_000, 12.25, 1, 8.4, decode, 1000 / decode),
        )

    plugins = {op: layers for op, _ in OPS}
    programs = (
        info(PLUGINS, plugins, 2.31),
        info(OOTB, {}, 3.27),
        ProgramInfo(
            REFERENCE, REFERENCE, "tests/data/tiny-mixtral", "torch", "PyTorch 2.13", "float32", "none", "tp1 pp1", {}
        ),
    )
    return Meta(
        *("tiny-mixtral", layers, experts, 2, "float16", "none", "tp1 pp1", "onnxruntime", "held-out text", 0, tokens),
        *(
            tokens * 2 // 3,
            "a processor",
            "2026-11-25T12:00:00Z",
            {"onnxruntime": "1.32.0", "torch": "2.13.0"},
            programs,
        ),
    )


def _op(numbers: np.random.Generator, layers: int, bad: bool) -> OpLevel:
    cases = []
    for layer in range(layers):
        for op, module in OPS:
            for case in CASES:
                mine, other = numbers.lognormal(-0.7, 0.3, 2)
                wrong = bad and (layer, op, case) == (1, "MoE", "ragged")
                exact = case == "zeros"
                mine = 40.0 if wrong else 0.0 if exact else mine
                errors = {
                    name: Ulps(value * 9, value, math.nan if wrong else value * 5, value * 1e-3, value * 2)
                    for name, value in ((PLUGINS, mine), (OOTB, 0.0 if exact else other))
                }
                ratio = None if exact else mine / other
                interval = None if ratio is None else (ratio * 0.9, ratio * 1.1)
                node = f"model.layers.{layer}.{module}/{op}"
                cases.append(
                    OpCase(
                        *(node, op, layer, f"model.layers.{layer}.{module}", "y", case, 16, "float16"),
                        *(errors, ratio, interval, not wrong, {PLUGINS: 0.02, OOTB: 0.03}),
                    )
                )
    times = [
        OpTime(program, op, layers, layers * value * (1 if program == PLUGINS else 1.6))
        for program in (PLUGINS, OOTB)
        for (op, _), value in zip(OPS, (0.004, 0.06, 0.005, 0.2), strict=True)
    ]
    return OpLevel(tuple(cases), tuple(times))


def _layer(
    numbers: np.random.Generator, layers: int, tokens: int, bad: bool, stretches_of_decode: int = 2
) -> LayerLevel:
    places: list[tuple[str, int | None]] = [("model.embed_tokens", None)]
    for layer in range(layers):
        places += [(f"model.layers.{layer}{module}", layer) for module in (".self_attn", ".mlp", "")]
    places.append(("model.norm", None))
    prompt = tokens * 2 // 3
    ends = np.linspace(prompt, tokens, 1 + stretches_of_decode, dtype=int).tolist()
    decode = (Stretch("decode", first, last - 1) for first, last in pairwise(ends))
    stretches = (Stretch("prefill", 0, prompt - 1), *decode)

    def errors(program: str) -> LayerErrors:
        relative = np.zeros((len(places), len(stretches)))
        relative[1:] = 2e-4 * np.cumprod(numbers.lognormal(0.06, 0.1, (len(places) - 1, len(stretches))), axis=0)
        if bad and program == PLUGINS:
            relative[6:] *= 20
        worst = relative * 4
        growth = [
            1.0,
            *(float(b / a) if a else math.inf for a, b in zip(relative[:-1, 0], relative[1:, 0], strict=True)),
        ]
        return LayerErrors(program, _rows(relative), _rows(worst), tuple(growth))

    names, numbered = zip(*places, strict=True)
    return LayerLevel("seen in parts of the graph", names, numbered, stretches, (errors(PLUGINS), errors(OOTB)))


def _model(numbers: np.random.Generator, tokens: int, bad: bool) -> ModelLevel:
    prompt = tokens * 2 // 3
    texts = tuple(
        Token(f" {WORDS[index % len(WORDS)]}", 100 + index, 0, index, "prefill" if index < prompt else "decode")
        for index in range(tokens)
    )

    def logits(program: str) -> LogitErrors:
        kl = numbers.lognormal(-9.0, 2.0, tokens)
        kl[0] = 0.0
        if bad:
            kl[-1] = 2.0
        counts = np.histogram(10 ** numbers.normal(-2.8, 0.6, 4000), EDGES[:-1])[0].tolist()
        return LogitErrors(
            *(program, Histogram(EDGES, (*counts, 0)), 0.12, 1.1e-3, tuple(kl.tolist()), float(kl.mean())),
            *(0.9921, 0.9804, 3.4567 + float(kl.mean())),
        )

    said = tuple(f" {word}" for word in WORDS[:12])
    other = (*said[:7], " cake", " and", " jam")
    greedy = GreedyText(
        "Once upon a time",
        5,
        said,
        (Greedy(PLUGINS, other, 7, 0.004, 0.01, True), Greedy(OOTB, said, 12, None, None, True)),
    )
    wrong = GreedyText(
        "Tim", 1, said, (Greedy(PLUGINS, other, 7, 0.9, 0.02, False), Greedy(OOTB, said, 12, None, None, True))
    )
    greedys = (greedy, wrong) if bad else (greedy,)
    return ModelLevel(texts, 3.4567, (logits(PLUGINS), logits(OOTB)), Between(2e-4, 0.995, 0.1), greedys)


def _routing(
    numbers: np.random.Generator, layers: int, experts: int, tokens: int, replayed: Replayed, bad: bool
) -> RoutingLevel:
    chosen = tuple(
        tuple(tuple(int(each) for each in numbers.permutation(experts)[:2]) for _ in range(tokens))
        for _ in range(layers)
    )

    def routing(program: str, many: int) -> ProgramRouting:
        flips, counts = [], np.zeros((layers, experts), int)
        for index in range(many):
            layer, token = int(numbers.integers(layers)), int(numbers.integers(tokens))
            wanted = chosen[layer][token][1]
            got = next(each for each in range(experts) if each not in chosen[layer][token])
            margin = float(numbers.lognormal(-6.5, 1.0))
            beyond = bad and index < 2
            flips.append(
                Flip(layer, token, wanted, got, 0.9 if beyond else margin * 5, 0.2 if beyond else margin, not beyond)
            )
            counts[layer, wanted] += 1
        return ProgramRouting(program, chosen, tuple(flips), _rows(counts), many / (layers * tokens))

    texts = tuple(Token(f" {WORDS[index % len(WORDS)]}", index, 0, index, "prefill") for index in range(tokens))
    many = max(layers * tokens // 30, 3)
    return RoutingLevel(
        *(tuple(range(layers)), experts, 2, texts, chosen, (routing(PLUGINS, many), routing(OOTB, many + 2)), replayed)
    )


def _rows(values: np.ndarray) -> tuple[tuple, ...]:
    return tuple(tuple(row) for row in values.tolist())
