"""Which rank computes what: world → (pp, tp, moe_tp, moe_ep). Imports no torch.

Ranks are numbered as in TensorRT-LLM's ``Mapping``: tensor-parallel ranks are neighbours, pipeline stages are blocks of
``tp_size`` ranks; within a stage ``moe_ep`` varies fastest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from moecompiler.config import ModelConfig
from moecompiler.errors import UserError


@dataclass(frozen=True)
class Mapping:
    """Sizes of the parallel dimensions; ``world_size = tp_size * pp_size`` and ``tp_size = moe_tp_size * moe_ep_size``.

    Attention, embedding and head are split over all ``tp_size`` ranks of a stage; experts by intermediate size over
    ``moe_tp_size`` and by expert over ``moe_ep_size``.
    """

    tp_size: int = 1
    pp_size: int = 1
    moe_tp_size: int = 1
    moe_ep_size: int = 1

    @staticmethod
    def create(
        tp_size: int = 1, pp_size: int = 1, moe_tp_size: int | None = None, moe_ep_size: int | None = None
    ) -> Mapping:
        """Fills in what is not given: neither or only ``moe_tp_size`` → experts tensor-parallel, only ``moe_ep_size``
        → expert-parallel, both → hybrid.

        Raises: UserError where a size is below 1 or ``moe_tp_size * moe_ep_size != tp_size``.
        """
        given = {"tp_size": tp_size, "pp_size": pp_size, "moe_tp_size": moe_tp_size, "moe_ep_size": moe_ep_size}
        for name, size in given.items():
            if size is not None and size < 1:
                raise UserError(f"--{name} {size}: a parallel size is at least 1")
        if moe_tp_size is None:
            moe_tp_size = tp_size if moe_ep_size is None else 1
        if moe_ep_size is None:
            moe_ep_size = 1
        if moe_tp_size * moe_ep_size != tp_size:
            raise UserError(
                f"--moe_tp_size {moe_tp_size} × --moe_ep_size {moe_ep_size} = {moe_tp_size * moe_ep_size},"
                f" but it must equal --tp_size {tp_size}"
            )
        return Mapping(tp_size, pp_size, moe_tp_size, moe_ep_size)

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def tp_rank(self, rank: int) -> int:
        return rank % self.tp_size

    def pp_rank(self, rank: int) -> int:
        return rank // self.tp_size

    def moe_tp_rank(self, rank: int) -> int:
        return self.tp_rank(rank) // self.moe_ep_size

    def moe_ep_rank(self, rank: int) -> int:
        return self.tp_rank(rank) % self.moe_ep_size

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks of this rank's pipeline stage, which reduce and gather together."""
        first = self.pp_rank(rank) * self.tp_size
        return tuple(range(first, first + self.tp_size))

    def is_first_stage(self, rank: int) -> bool:
        return self.pp_rank(rank) == 0

    def is_last_stage(self, rank: int) -> bool:
        return self.pp_rank(rank) == self.pp_size - 1

    def layers(self, rank: int, num_layers: int) -> range:
        """The layers of this rank's stage; where they do not divide, the first stages hold one more."""
        each, extra = divmod(num_layers, self.pp_size)
        stage = self.pp_rank(rank)
        first = stage * each + min(stage, extra)
        return range(first, first + each + (stage < extra))

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"tp{self.tp_size}" if self.tp_size > 1 else "", f"pp{self.pp_size}" if self.pp_size > 1 else ""]
        if self.moe_ep_size > 1:
            parts.append(f"moe_tp{self.moe_tp_size}" if self.moe_tp_size > 1 else "")
            parts.append(f"moe_ep{self.moe_ep_size}")
        return "·".join(part for part in parts if part) or "one rank"


def check_mapping(config: ModelConfig, mapping: Mapping) -> None:
    """Raises UserError where the model cannot be split so, naming the option and what does not divide."""
    heads, kv_heads, tp = config.num_attention_heads, config.num_key_value_heads, mapping.tp_size
    if heads % tp:
        raise UserError(f"--tp_size {tp}: the model's {heads} attention heads do not divide over {tp} ranks")
    if kv_heads % tp and tp % kv_heads:
        raise UserError(
            f"--tp_size {tp}: the model's {kv_heads} key-value heads neither divide over {tp} ranks nor can each be"
            " replicated on the same number of them"
        )
    if mapping.pp_size > config.num_hidden_layers:
        raise UserError(f"--pp_size {mapping.pp_size}: more stages than the model's {config.num_hidden_layers} layers")
    if mapping.moe_ep_size > config.num_local_experts:
        raise UserError(f"--moe_ep_size {mapping.moe_ep_size}: more ranks than the {config.num_local_experts} experts")
    if config.num_local_experts % mapping.moe_ep_size:
        raise UserError(
            f"--moe_ep_size {mapping.moe_ep_size}: the {config.num_local_experts} experts do not divide over"
            f" {mapping.moe_ep_size} ranks"
        )
    if config.intermediate_size % mapping.moe_tp_size:
        raise UserError(
            f"--moe_tp_size {mapping.moe_tp_size}: the experts' intermediate size {config.intermediate_size} does not"
            f" divide over {mapping.moe_tp_size} ranks"
        )


@dataclass(frozen=True)
class RankShape:
    """The sizes of one rank's share: counts of heads, experts, rows; ``vocab`` includes the padding rows."""

    heads: int
    kv_heads: int
    experts: int
    intermediate: int
    vocab: int


def rank_shape(config: ModelConfig, mapping: Mapping) -> RankShape:
    """The share of one rank; it is the same for every rank, which is why the ranks of a stage share one graph."""
    return RankShape(
        heads=config.num_attention_heads // mapping.tp_size,
        kv_heads=max(1, config.num_key_value_heads // mapping.tp_size),
        experts=config.num_local_experts // mapping.moe_ep_size,
        intermediate=config.intermediate_size // mapping.moe_tp_size,
        vocab=-(-config.vocab_size // mapping.tp_size),
    )
