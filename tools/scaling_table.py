"""The tables of docs/scaling.md: what a decode step costs in a layer and in all, by mapping, up to 64 GPUs.

python -m moecompiler.tools.scaling_table --model 8x22b --batch 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moecompiler.config import ModelConfig, load_config
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping, check_mapping
from moecompiler.planning.hardware import Cluster, gpu_named
from moecompiler.planning.latency import decode_layer, decode_step
from moecompiler.planning.load import Load, rank_memory
from moecompiler.tools.main import complain

GPUS = (1, 2, 4, 8, 16, 32, 64)
NODE = 8
HEAD = (
    "| GPUs | mapping | weights, GB a GPU | layer: MB read | MFLOP | messages × kB | floor, ms | of it exchanges |"
    " tokens/s, stages full | fits |\n|---|---|---|---|---|---|---|---|---|---|"
)


def mappings(config: ModelConfig, gpus: int) -> list[Mapping]:
    """Experts split, experts whole, half of each, over a node at most or over all; the rest are stages. Those that can be."""
    found: dict[Mapping, None] = {}
    for tp in sorted({1, min(gpus, NODE), min(gpus, 2 * NODE)}):
        for ep in sorted({1, min(tp, 2), min(tp, config.num_local_experts)}):
            mapping = Mapping(tp, gpus // tp, tp // ep, ep)
            try:
                check_mapping(config, mapping)
            except UserError:
                continue
            found[mapping] = None
    return list(found)


def row(config: ModelConfig, mapping: Mapping, load: Load, cluster: Cluster, context: int) -> str:
    memory, layer = rank_memory(config, mapping, 0, load), decode_layer(config, mapping, load, 0, context)
    step = decode_step(config, mapping, load, cluster, context)
    cells = (
        str(mapping.world_size),
        str(mapping),
        f"{memory.weights / 1e9:.1f}",
        f"{layer.bytes / 1e6:.0f}",
        f"{layer.flops / 1e6:.0f}",
        f"{layer.messages} × {layer.message_bytes / 1e3:.0f}" if layer.messages else "none",
        f"{1e3 * step.floor_s:.2f}",
        f"{1e3 * (step.reducing_s + step.sending_s):.2f}",
        f"{mapping.pp_size * load.batch / step.floor_s:.0f}",
        "yes" if memory.total <= cluster.gpu.memory else "no",
    )
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8x22b", help="8x7b, 8x22b or a config.json.")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--batch", type=int, default=8, help="Sequences.")
    parser.add_argument("--context", type=int, default=2048, help="Tokens of each.")
    options = parser.parse_args(arguments)
    try:
        config, gpu = load_config(options.model), gpu_named(options.gpu)
    except UserError as error:
        return complain(str(error))
    load = Load(config.dtype, batch=options.batch, slots=options.context)
    print(HEAD)
    for gpus in GPUS:
        for mapping in mappings(config, gpus):
            print(row(config, mapping, load, Cluster(gpu, gpus, NODE), options.context))
    return 0


if __name__ == "__main__":
    sys.exit(main())
