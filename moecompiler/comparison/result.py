"""What a comparison finds: plain numbers, as the report draws them and ``result.json`` holds them.

Programs are known by name: ``reference`` is PyTorch in float32; the two that are compared with it are ``plugins`` and
``ootb`` (one model's engines with plugins and without), or ``A`` and ``B`` (any two artifacts of one model). A level that was
not measured is None. Numbers that are not finite are the strings ``Infinity``, ``-Infinity`` and ``NaN`` in JSON.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

REFERENCE, PLUGINS, OOTB, A, B = "reference", "plugins", "ootb", "A", "B"
LEVELS = ("op", "layer", "model", "routing")


@dataclass(frozen=True)
class ProgramInfo:
    """``name``: see the module; ``label``: what to call it (a directory's name). ``plugins``: by op, how many of its nodes
    run as plugins. ``plan_bytes``: of the engine files, weights apart where they are bound at run time; ``weight_bytes``: of
    all weights. ``build_seconds``: None where the engine was there. Times are medians, None where not measured:
    ``prefill_ms`` of the text's first step and ``decode_ms`` of one token more, of ``batch`` sequences; ``tokens_per_second``
    decoding."""

    name: str
    label: str
    directory: str
    backend: str
    runtime: str
    dtype: str
    quantization: str
    mapping: str
    plugins: dict[str, int]
    plan_bytes: int | None = None
    weight_bytes: int | None = None
    build_seconds: float | None = None
    batch: int | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Meta:
    """What was compared with what. ``text``: where the tokens are from; ``tokens``: how many were run; ``prompt_tokens`` of
    them prefilled, the others decoded one by one; ``machine``: the processor and, where one was used, the GPU; ``date``: ISO
    8601, UTC; ``versions``: of libraries, by name."""

    model: str
    layers: int
    experts: int
    top_k: int
    dtype: str
    quantization: str
    mapping: str
    backend: str
    text: str
    seed: int
    tokens: int
    prompt_tokens: int
    machine: str
    date: str
    versions: dict[str, str]
    programs: tuple[ProgramInfo, ...]


@dataclass(frozen=True)
class Ulps:
    """The error of a node's output against the float64 result, in units in the last place of the output's dtype: of the largest
    element, the mean one, and the 99th percentile; the largest error as it is; and the mean error of the worst row (the last
    axis)."""

    max: float
    mean: float
    p99: float
    max_abs: float
    row: float = 0.0


@dataclass(frozen=True)
class OpCase:
    """One output of one node on one kind of input (``cases.CASES``). ``errors`` and ``milliseconds`` (of the node alone, a
    median; empty where not timed) are by program. ``ratio``: the first program's mean error over the second's, with its
    bootstrap ``interval`` of 95%; None where both are exact or one is no number. ``no_further``: the first is not further
    from the truth than the second. ``tokens``: rows of the output that are compared, and
    ``left_out`` those that are not, because rounding decides which expert they get."""

    node: str
    op: str
    layer: int | None
    module: str
    output: str
    case: str
    tokens: int
    dtype: str
    errors: dict[str, Ulps]
    ratio: float | None
    interval: tuple[float, float] | None
    no_further: bool
    milliseconds: dict[str, float]
    left_out: int = 0


@dataclass(frozen=True)
class OpTime:
    """Milliseconds of a step that all nodes of an op take in a program, each run alone on the real inputs."""

    program: str
    op: str
    nodes: int
    milliseconds: float


@dataclass(frozen=True)
class OpLevel:
    cases: tuple[OpCase, ...]
    times: tuple[OpTime, ...]


@dataclass(frozen=True)
class Stretch:
    """Some steps of the run: ``phase`` is ``prefill`` or ``decode``; positions ``first`` to ``last`` of each sequence."""

    phase: str
    first: int
    last: int


@dataclass(frozen=True)
class LayerErrors:
    """A program's hidden states against the reference's: ``‖a - b‖ / ‖b‖`` over the tokens of each stretch,
    ``relative[place][stretch]``, its worst token's likewise, and how many times the error of what enters a place's layer its
    own is, over all stretches (``growth[place]``; of the first 1)."""

    program: str
    relative: tuple[tuple[float, ...], ...]
    worst: tuple[tuple[float, ...], ...]
    growth: tuple[float, ...]


@dataclass(frozen=True)
class LayerLevel:
    """``places``: the modules whose outputs are compared, from the model's start (``model.embed_tokens``,
    ``model.layers.0.self_attn``, ``model.layers.0`` …); ``layers``: their layers, None outside of any. ``how``: by what means
    inner tensors were seen."""

    how: str
    places: tuple[str, ...]
    layers: tuple[int | None, ...]
    stretches: tuple[Stretch, ...]
    programs: tuple[LayerErrors, ...]


@dataclass(frozen=True)
class Token:
    """A token that was run, and where: ``row`` of the batch, ``position`` in it. The logits after it predict the next one."""

    text: str
    id: int
    row: int
    position: int
    phase: str


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` elements with ``edges[i] <= error < edges[i + 1]``; edges are powers of ten, the first 0, the last
    Infinity."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class LogitErrors:
    """A program's logits against the reference's: ``errors`` of their elements, in absolute value; ``kl``, the divergence
    from the reference's distribution at each token of the level, in nats; ``top1`` and ``top5``: the share of tokens with the
    reference's most likely successor, and the mean share of its five most likely that are among the program's five."""

    program: str
    errors: Histogram
    max_abs: float
    relative: float
    kl: tuple[float, ...]
    mean_kl: float
    top1: float
    top5: float
    perplexity: float


@dataclass(frozen=True)
class Greedy:
    """A program's greedy continuation of a prompt. ``equal``: how many tokens are the reference's before the first that is
    not. There, ``margin`` is by how much the reference prefers its own token (in logits) and ``error`` the program's largest
    error of a logit; None where all are equal. ``tie``: the margin is one that rounding may turn round, or there is none."""

    program: str
    texts: tuple[str, ...]
    equal: int
    margin: float | None
    error: float | None
    tie: bool


@dataclass(frozen=True)
class GreedyText:
    """``prompt`` and the reference's continuation of it, token by token, and the programs' beside it."""

    prompt: str
    prompt_tokens: int
    reference: tuple[str, ...]
    programs: tuple[Greedy, ...]


@dataclass(frozen=True)
class Between:
    """The first program against the second: the mean divergence (nats a token) of the first from the second, the share of the
    same most likely tokens, and the largest difference of a logit."""

    mean_kl: float
    top1: float
    max_abs: float


@dataclass(frozen=True)
class ModelLevel:
    """``tokens``: those after which logits are compared, in order of row and position. ``reference_perplexity``: of the
    tokens that follow in the text, as the programs' are."""

    tokens: tuple[Token, ...]
    reference_perplexity: float
    programs: tuple[LogitErrors, ...]
    between: Between | None
    greedy: tuple[GreedyText, ...]


@dataclass(frozen=True)
class Flip:
    """An expert of the reference that a program did not choose, and what it chose in its place. ``margin``: by how much the
    reference's last chosen expert is above the first not chosen, in router logits; ``relative_margin``: over the largest logit
    (``ties.router_margin``). ``within``: rounding in the program's dtype may decide a margin like this."""

    layer: int
    token: int
    wanted: int
    got: int
    margin: float
    relative_margin: float
    within: bool


@dataclass(frozen=True)
class ProgramRouting:
    """``choices[layer][token]``: experts in falling order of their weight. ``flips``: each expert that was chosen otherwise;
    ``flip_counts[layer][expert]``: by the expert that the reference had chosen; ``rerouted``: the share of (layer, token)
    with any."""

    program: str
    choices: tuple[tuple[tuple[int, ...], ...], ...]
    flips: tuple[Flip, ...]
    flip_counts: tuple[tuple[int, ...], ...]
    rerouted: float


@dataclass(frozen=True)
class Replayed:
    """The same comparison with the reference's choices and weights forced into the programs: what is left is the kernels' own
    error. ``how``: what was done to the graph."""

    how: str
    layer: LayerLevel | None
    model: ModelLevel | None


@dataclass(frozen=True)
class RoutingLevel:
    """``tokens``: as in ``ModelLevel``, but for all that were run, prompts included. ``reference``: its choices,
    ``[layer][token]``."""

    layers: tuple[int, ...]
    experts: int
    top_k: int
    tokens: tuple[Token, ...]
    reference: tuple[tuple[tuple[int, ...], ...], ...]
    programs: tuple[ProgramRouting, ...]
    replayed: Replayed | None


@dataclass(frozen=True)
class Check:
    """One number held against its bound (``thresholds``): ``value <= bound`` where ``at_most``, else ``value >= bound``.
    ``subject``: what it is of (a node and case, a layer, a program)."""

    level: str
    name: str
    subject: str
    value: float
    bound: float
    passed: bool
    at_most: bool = True


@dataclass(frozen=True)
class Probe:
    """One engine of a bisection: the nodes that were plugins, and what came of it: ``pass``, ``fail`` or ``unresolved``."""

    plugins: tuple[str, ...]
    outcome: str
    value: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Bisection:
    """``culprits``: the smallest set of nodes that fails as plugins; ``folder``: where it was reduced to, empty if it was
    not."""

    check: str
    culprits: tuple[str, ...]
    probes: tuple[Probe, ...]
    folder: str = ""


@dataclass(frozen=True)
class Result:
    """See the module. ``passed``: every check of the verdict did."""

    meta: Meta
    op: OpLevel | None
    layer: LayerLevel | None
    model: ModelLevel | None
    routing: RoutingLevel | None
    verdict: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    bisection: Bisection | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.verdict)

    def failed_levels(self) -> tuple[str, ...]:
        """Levels with a check that did not pass, in the order of ``LEVELS``."""
        return tuple(level for level in LEVELS if any(c.level == level and not c.passed for c in self.verdict))

    def to_json(self) -> dict[str, Any]:
        """Lists, dicts and numbers, which ``json.dumps`` takes with ``allow_nan=False``; with ``passed``."""
        return {**plain(asdict(self)), "passed": self.passed}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Result:
        """Raises: ValueError where it is no result."""
        from pydantic import TypeAdapter

        result: Result = TypeAdapter(Result).validate_python({**data})
        return result


def plain(value: Any) -> Any:
    """The value of dicts, lists and tuples as strict JSON has it: see the module of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
