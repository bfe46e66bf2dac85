"""The command line's options: their names, types and help, once for all verbs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moecompiler.runtime.ways import Asked

_SOURCE, _PARALLEL, _GRAPH, _PASSES = "Checkpoint", "Parallel mapping", "Graph", "Passes"
_ENGINE, _WORK = "Engine", "Work"


class DType(StrEnum):
    """``auto``: the checkpoint's."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Dump(StrEnum):
    """Which graphs ``--dump_passes`` writes: of all passes, or of those that changed something."""

    none = "none"
    all = "all"
    changed = "changed"


class PluginDType(StrEnum):
    """What TensorRT-LLM's ``--gemm_plugin`` takes."""

    auto = "auto"
    disable = "disable"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Normalization(StrEnum):
    """``--moe_normalization_mode`` by number, as in TensorRT-LLM, or by name."""

    number_0 = "0"
    number_1 = "1"
    number_2 = "2"
    none = "none"
    renormalize = "renormalize"
    sparse_mixer = "sparse_mixer"


ModelDir = Annotated[
    Path | None, typer.Option("--model_dir", help="Folder of a Hugging Face checkpoint.", rich_help_panel=_SOURCE)
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="8x7b, 8x22b or a config.json: compile it with dummy weights.", rich_help_panel=_SOURCE
    ),
]
NumLayers = Annotated[
    int | None, typer.Option("--num_layers", help="Only the first N layers.", rich_help_panel=_SOURCE)
]
DummySeed = Annotated[int, typer.Option("--dummy_seed", help="Seed of dummy weights.", rich_help_panel=_SOURCE)]
CheckFinite = Annotated[
    bool,
    typer.Option(
        "--check_finite", help="Read every weight first and refuse NaN and infinity.", rich_help_panel=_SOURCE
    ),
]

TpSize = Annotated[int, typer.Option("--tp_size", help="Tensor-parallel ranks of a stage.", rich_help_panel=_PARALLEL)]
PpSize = Annotated[int, typer.Option("--pp_size", help="Pipeline stages.", rich_help_panel=_PARALLEL)]
MoeTpSize = Annotated[
    int | None,
    typer.Option("--moe_tp_size", help="Ranks that share an expert (default: all).", rich_help_panel=_PARALLEL),
]
MoeEpSize = Annotated[
    int | None,
    typer.Option("--moe_ep_size", help="Ranks that experts are dealt over (default: 1).", rich_help_panel=_PARALLEL),
]

# a metavar where the choices are long: `--help` on 80 columns would cut the names of options instead
DataType = Annotated[
    DType,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Of weights and activations: auto (the checkpoint's), float16, bfloat16 or float32.",
        rich_help_panel=_GRAPH,
    ),
]
NormalizationOption = Annotated[
    Normalization,
    typer.Option(
        "--moe_normalization_mode",
        metavar="MODE",
        help="Expert weights: 0 none, 1 renormalize (Mixtral's), 2 sparse_mixer.",
        rich_help_panel=_GRAPH,
    ),
]
MaxSeqLen = Annotated[
    int | None,
    typer.Option(
        "--max_seq_len",
        help="Slots of the KV cache, prompt and output together (default: the model's, at most 2048).",
        rich_help_panel=_GRAPH,
    ),
]
GatherContextLogits = Annotated[
    bool,
    typer.Option(
        "--gather_context_logits", help="Logits of every token instead of each prompt's last.", rich_help_panel=_GRAPH
    ),
]

Pipeline = Annotated[
    str,
    typer.Option(
        "--pipeline",
        help="Which passes to run: pipelines or passes, joined by commas; auto: plugins on tensorrt, else ootb.",
        rich_help_panel=_PASSES,
    ),
]
OnlyPass = Annotated[
    list[str] | None,
    typer.Option("--only_pass", metavar="NAME", help="Of the pipeline, only this pass.", rich_help_panel=_PASSES),
]
DisablePass = Annotated[
    list[str] | None,
    typer.Option("--disable_pass", metavar="NAME", help="Leave this pass out.", rich_help_panel=_PASSES),
]
StopAfter = Annotated[
    str,
    typer.Option(
        "--stop_after",
        metavar="NAME",
        help="The last pass to run, as 03-name or name.",
        show_default=False,
        rich_help_panel=_PASSES,
    ),
]
AllowMissed = Annotated[
    bool,
    typer.Option("--allow_missed", help="Go on where a pass does not match though it should.", rich_help_panel=_PASSES),
]
TimePasses = Annotated[
    bool, typer.Option("--time_passes", help="Print what each pass did and took.", rich_help_panel=_PASSES)
]
PrintAfter = Annotated[
    list[str] | None,
    typer.Option("--print_after", metavar="NAME", help="Print the graph after this pass.", rich_help_panel=_PASSES),
]
DumpPasses = Annotated[
    Dump,
    typer.Option(
        "--dump_passes",
        metavar="[=changed]",
        help="Write the graph after each pass (or each that changed it) to passes/ in the output.",
        show_default=False,
        rich_help_panel=_PASSES,
    ),
]
DumpWeights = Annotated[
    bool,
    typer.Option(
        "--dump_weights/--no_dump_weights",
        help="Write weights beside dumped graphs, so that they run as they are.",
        rich_help_panel=_PASSES,
    ),
]
VerifyEach = Annotated[
    bool,
    typer.Option(
        "--verify_each",
        help="Compare numbers after each pass, all ranks together; stop at the first that is off.",
        rich_help_panel=_PASSES,
    ),
]

Backend = Annotated[str, typer.Option("--backend", help="What runs the engines.", rich_help_panel=_ENGINE)]
MaxBatchSize = Annotated[int, typer.Option("--max_batch_size", help="Most sequences at once.", rich_help_panel=_ENGINE)]
MaxInputLen = Annotated[
    int | None,
    typer.Option(
        "--max_input_len", help="Longest prompt in tokens (default: max_seq_len - 1).", rich_help_panel=_ENGINE
    ),
]
GemmPlugin = Annotated[
    PluginDType,
    typer.Option(
        "--gemm_plugin",
        metavar="TYPE",
        help="Matrix products by plugin, where the backend has one: auto, disable, float16 or bfloat16.",
        rich_help_panel=_ENGINE,
    ),
]

_OUTPUT_DIR = typer.Option("--output_dir", help="Where the result goes.", rich_help_panel=_WORK)
_CHECKPOINT_DIR = typer.Option("--checkpoint_dir", help="What `export` or `optimize` wrote.", rich_help_panel=_WORK)
OutputDir = Annotated[Path, _OUTPUT_DIR]
OptionalOutputDir = Annotated[Path | None, _OUTPUT_DIR]
CheckpointDir = Annotated[Path, _CHECKPOINT_DIR]
OptionalCheckpointDir = Annotated[Path | None, _CHECKPOINT_DIR]
EngineDir = Annotated[
    Path,
    typer.Option(
        "--engine_dir",
        help="What `compile` or `build` wrote; {rank}, {local_rank} and {host} in it are each rank's own.",
    ),
]
WatchdogS = Annotated[
    float,
    typer.Option(
        "--watchdog_s", min=0.0, help="End all ranks when one gives no sign of life for so many seconds (0: never)."
    ),
]
Collectives = Annotated[
    Asked,
    typer.Option(
        "--collectives",
        metavar="WAY",
        help="How GPUs exchange: auto (the best there is), ipc, nccl or host.",
    ),
]
MicroBatches = Annotated[
    int | None,
    typer.Option(
        "--micro_batches",
        min=1,
        help="Parts of a batch that follow one another through the stages (default: as many as stages).",
        show_default=False,
    ),
]
PackWeights = Annotated[
    bool,
    typer.Option(
        "--pack_weights",
        help="Give each exported rank a file of its own weights: engines can then be built without the checkpoint.",
        rich_help_panel=_WORK,
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        min=1,
        help="Ranks worked on in parallel, as far as cores and memory allow.",
        rich_help_panel=_WORK,
    ),
]
Rank = Annotated[int | None, typer.Option("--rank", help="Only this rank.", rich_help_panel=_WORK)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
