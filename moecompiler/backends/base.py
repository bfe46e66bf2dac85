"""What every backend offers: build a rank's engine from its program, load it as a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moecompiler.graph import Program
from moecompiler.plugin_switches import PluginSwitches
from moecompiler.weights import Recipe, TensorReader

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from moecompiler.backends.sampling_kernels import SamplingKernels
    from moecompiler.runtime.collective_kernels import CollectiveKernels
    from moecompiler.runtime.session import StageSession


@dataclass(frozen=True)
class EngineLimits:
    """The largest request an engine takes, in sequences and tokens, and the size of its vocabulary. ``max_num_tokens``: the
    most tokens of one step, padding included; a session splits a longer prefill by sequences. None: no limit of its own."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    vocab_size: int
    max_num_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BuildSettings:
    """What an engine is built for. ``moe_weights``: ``external`` binds expert weights when the engine runs, ``all`` every weight,
    so that ranks whose graphs differ in nothing else share a plan, ``engine`` bakes
    them into it, ``auto`` leaves it to the backend. ``compute_capabilities``: of the GPUs that a backend which builds ahead of
    time builds for (``8.9``); empty leaves that to it too. ``plugin_tactics``: names of plans that interpreted plugins are to
    have, where their op has one of that name."""

    limits: EngineLimits
    plugins: PluginSwitches = field(default_factory=PluginSwitches)
    moe_weights: str = "auto"
    compute_capabilities: tuple[str, ...] = ()
    plugin_tactics: tuple[str, ...] = ()


class PluginLibrary(Protocol):
    """The plugins that a backend may use; made in ``plugins``, which backends do not know."""

    def refusal(self, node: onnx.NodeProto, dims: tuple[tuple[int, ...], ...], dtype: str, sm: int) -> str | None:
        """Why no plugin can stand for this node, whose inputs have these shapes (-1: not known before it runs), on a GPU of
        compute capability ``sm``; None where one can."""

    def aliases(self, op_type: str) -> Mapping[int, int]:
        """Outputs of an op's plugin that are written in place of an input: index of the output → index of the input."""

    def register(self) -> None:
        """Makes the plugins known to the backend's library, once per process."""

    def tactics(self, node: onnx.NodeProto, dims: tuple[tuple[int, ...], ...], dtype: str, sm: int) -> tuple[str, ...]:
        """The names of the plans by which a plugin can compute this node, the best guess first; see ``refusal``."""

    def check_interpreter(self) -> None:
        """Raises: UserError where there is nothing to interpret plugins' kernels with."""

    def interpret(self, node: str, file: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs the plan of an ``InterpretedNode``, given as text, on the CPU; ``file``: that of its weights. ``arrays``: its
        other inputs. They and the results are float32, whatever the node's types: it rounds to these.

        Raises: UserError where a kernel fails.
        """

    def compile_collectives(self, dtype: str, sm: int) -> bytes | None:
        """The kernels by which ranks of a node exchange tensors of a type from GPU to GPU, for a compute capability, as a file
        keeps them; None where there can be none."""

    def load_collectives(self, data: bytes) -> CollectiveKernels:
        """Those kernels, loaded into the current CUDA context. Raises: as ``load_sampling``."""

    def compile_sampling(self, vocab: int, dtype: str, sm: int) -> bytes | None:
        """The kernels that choose tokens from logits ``[rows, vocab]`` on a GPU of compute capability ``sm``, as a file keeps
        them; None where there can be none."""

    def load_sampling(self, data: bytes) -> SamplingKernels:
        """Those kernels, loaded into the current CUDA context; neither a compiler nor Triton is needed.

        Raises: UserError where they are damaged, or another version's.
        """


class Backend(Protocol):
    """One way to run a program; ``name`` is what ``--backend`` calls it."""

    name: str

    def version(self) -> str:
        """Which library, in which version, makes the engines."""

    def header(self) -> dict[str, Any]:
        """What else the manifest says of where engines were made and may run: a GPU's architecture, its driver."""

    def notes(self, dtype: str, settings: BuildSettings) -> list[str]:
        """What a user should know of how this backend computes ``dtype`` with these settings, one line each.

        Raises: UserError where it cannot build with them.
        """

    def identity(self, settings: BuildSettings) -> dict[str, Any]:
        """What of the settings and of this machine an engine's files depend on."""

    def compute_dtype(self, dtype: str) -> str:
        """The dtype an engine of ``dtype`` computes in."""

    def build_memory(self, weights: Mapping[str, Recipe], settings: BuildSettings) -> int:
        """An estimate, from above, of the bytes of host memory that building a rank with these weights takes."""

    def shared_graph(self, program: Program, settings: BuildSettings) -> str | None:
        """Fingerprint of what a rank's plan is made of, where that is none of its weights: ranks of one fingerprint share the
        plan. None where they cannot."""

    def build_shared(
        self,
        program: Program,
        stem: str,
        directory: Path,
        settings: BuildSettings,
        progress: Callable[[float], None],
    ) -> dict[str, Path]:
        """Makes the plan of a program that has a ``shared_graph``, and what else its ranks share, as ``build`` does."""

    def build(
        self,
        program: Program,
        reader: TensorReader,
        stem: str,
        directory: Path,
        settings: BuildSettings,
        progress: Callable[[float], None],
        shared: str | None = None,
    ) -> dict[str, Path]:
        """Makes a rank's engine files in ``directory`` under temporary names (``.tmp-…``): final name → temporary path.
        ``shared``: the stem of what ``build_shared`` made, which is not made again then."""

    def load(self, directory: Path, stem: str, limits: EngineLimits, threads: int, device: int = 0) -> StageSession:
        """Loads a rank's engine; ``threads`` of the CPU for it (0: as many as there are); ``device``: which GPU, counted
        round where there are fewer.

        Raises: UserError where it cannot run here.
        """
