"""All mappings of a model onto a number of GPUs, and which to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping, check_mapping
from moecompiler.planning.hardware import Cluster
from moecompiler.planning.latency import Step, decode_step
from moecompiler.planning.load import Load, Memory, rank_memory


@dataclass(frozen=True)
class Plan:
    """A mapping: ``memory`` of its fullest rank, which is ``rank``; a decode step with full caches; whether that rank fits."""

    mapping: Mapping
    rank: int
    memory: Memory
    step: Step
    fits: bool


@dataclass(frozen=True)
class Choice:
    """``plans``: the best first, those that fit before those that do not. ``refused``: why others cannot be. ``least``: the
    smallest number of GPUs among the divisors of those asked for on which a mapping fits; None: not even on all."""

    plans: tuple[Plan, ...]
    refused: tuple[str, ...]
    least: int | None

    @property
    def best(self) -> Plan | None:
        return self.plans[0] if self.plans and self.plans[0].fits else None


def mappings_of(world: int) -> list[Mapping]:
    """Every split of ``world`` ranks into stages, and of a stage's experts by size and by expert."""
    return [Mapping(tp, world // tp, tp // ep, ep) for tp in _divisors(world) for ep in _divisors(tp)]


def choose(config: ModelConfig, load: Load, cluster: Cluster) -> Choice:
    """Mappings onto all GPUs of ``cluster``. The best fits and has the lowest expected latency of a decode step; of equal ones
    that with the least memory a rank."""
    plans, refused = _plans(config, load, cluster)
    least = next((n for n in _divisors(cluster.gpus) if _fits_on(config, load, cluster, n)), None)
    return Choice(tuple(sorted(plans, key=_order)), tuple(refused), least)


def reasons(choice: Choice, cluster: Cluster) -> list[str]:
    """Why the best is the best, against the best of each other kind; or why none fits."""
    best = choice.best
    if best is None:
        if not choice.plans:
            return ["the model cannot be split over so many GPUs: " + "; ".join(choice.refused[:3])]
        least = min(choice.plans, key=lambda plan: plan.memory.total)
        return [
            f"nothing fits: the smallest, {least.mapping}, needs {least.memory.total / 1e9:.1f} GB a GPU of"
            f" {cluster.gpu.memory / 1e9:.1f}; take more GPUs, fewer sequences or slots, or codes (--qformat, --kv_cache_dtype)"
        ]
    said = [_of_best(best, cluster), *_of_network(choice, best, cluster)]
    for kind, plan in _best_of_kinds(choice.plans).items():
        if plan.mapping != best.mapping:
            said.append(_against(kind, plan, best, cluster))
    if choice.least is not None and choice.least < cluster.gpus:
        copies = cluster.gpus // choice.least
        said.append(
            f"{choice.least} GPU(s) are enough to hold it: {copies} copies on as many GPUs each serve more sequences in all,"
            " one copy on all answers sooner"
        )
    return said


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _order(plan: Plan) -> tuple[bool, float, int]:
    return not plan.fits, round(plan.step.expected_s, 6), plan.memory.total


def _plans(config: ModelConfig, load: Load, cluster: Cluster) -> tuple[list[Plan], list[str]]:
    plans, refused = [], []
    for mapping in mappings_of(cluster.gpus):
        try:
            check_mapping(config, mapping)
            first_of_stages = [stage * mapping.tp_size for stage in range(mapping.pp_size)]
            memories = {rank: rank_memory(config, mapping, rank, load) for rank in first_of_stages}
        except UserError as error:
            refused.append(f"{mapping}: {error}")
            continue
        rank, memory = max(memories.items(), key=lambda each: each[1].total)
        step = decode_step(config, mapping, load, cluster, load.slots)
        plans.append(Plan(mapping, rank, memory, step, memory.total <= cluster.gpu.memory))
    return plans, refused


def _fits_on(config: ModelConfig, load: Load, cluster: Cluster, gpus: int) -> bool:
    return any(plan.fits for plan in _plans(config, load, replace(cluster, gpus=gpus))[0])


def _best_of_kinds(plans: Sequence[Plan]) -> dict[str, Plan]:
    found: dict[str, Plan] = {}
    for plan in plans:
        found.setdefault(_kind(plan.mapping), plan)
    return found


def _kind(mapping: Mapping) -> str:
    inner = "experts whole" if mapping.moe_tp_size == 1 and mapping.moe_ep_size > 1 else "experts split"
    if 1 < mapping.moe_ep_size < mapping.tp_size:
        inner = "hybrid"
    if mapping.tp_size == 1:
        return "stages alone" if mapping.pp_size > 1 else "one rank"
    return f"{inner}, one stage" if mapping.pp_size == 1 else f"{inner}, several stages"


def _of_best(plan: Plan, cluster: Cluster) -> str:
    memory, step = plan.memory, plan.step
    return (
        f"{plan.mapping}: {memory.total / 1e9:.1f} of {cluster.gpu.memory / 1e9:.1f} GB a GPU, and the soonest answer of all that"
        f" fit: {1e3 * step.working_s:.2f} ms of reading weights and cache, {1e3 * (step.reducing_s + step.sending_s):.2f} ms of"
        f" {step.messages} exchanges"
    )


def _of_network(choice: Choice, best: Plan, cluster: Cluster) -> list[str]:
    """How slow exchanges across nodes may be, where the best makes them in every layer, before another mapping is sooner."""
    within = [plan for plan in choice.plans if plan.fits and plan.mapping.tp_size <= cluster.gpus_per_node]
    if best.mapping.tp_size <= cluster.gpus_per_node or not within:
        return []
    other = within[0]
    spare = (other.step.expected_s - best.step.expected_s) / best.step.messages
    return [
        f"its {best.step.messages} exchanges cross nodes, and are taken to wait {1e6 * cluster.network_latency:.0f} µs each,"
        f" which is not measured; from about {1e6 * (cluster.network_latency + spare):.0f} µs on, {other.mapping} answers sooner"
    ]


def _against(kind: str, plan: Plan, best: Plan, cluster: Cluster) -> str:
    if not plan.fits:
        lacks = (plan.memory.total - cluster.gpu.memory) / 1e9
        return f"{plan.mapping} ({kind}): does not fit, by {lacks:.1f} GB a GPU"
    parts = {
        "reading": plan.step.working_s - best.step.working_s,
        "exchanges within stages": plan.step.reducing_s - best.step.reducing_s,
        "exchanges between stages": plan.step.sending_s - best.step.sending_s,
    }
    more = ", ".join(f"{what} {1e3 * seconds:+.2f} ms" for what, seconds in parts.items() if abs(seconds) >= 5e-6)
    return f"{plan.mapping} ({kind}): {1e3 * plan.step.floor_s:.2f} ms at least: {more or 'the same'}"
