"""The PyTorch rank module with its weights: what engines are compared with."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch

from moecompiler.config import ExportOptions, ModelConfig
from moecompiler.export import INVERSE_FREQUENCIES, TORCH_DTYPES
from moecompiler.mapping import Mapping, rank_shape
from moecompiler.materializing import Materializer
from moecompiler.model import Cache, RankModule
from moecompiler.sharding import inverse_frequencies, recipe_for
from moecompiler.weights import Recipe, TensorReader


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory; numpy's bfloat16 (ml_dtypes) is one that torch does not know by itself."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A numpy array of the values; bfloat16 becomes float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def load_rank_module(
    config: ModelConfig,
    mapping: Mapping,
    rank: int,
    options: ExportOptions,
    reader: TensorReader,
    compute_dtype: str | None = None,
    quantized: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> RankModule:
    """One rank's module on the CPU, with the weights that ``sharding`` gives that rank, rounded to the engine's dtype, or as
    ``quantized`` makes of that; ``compute_dtype`` (default: the same) is what they are then held and computed in.

    Raises: UserError where weights cannot be quantized so.
    """
    dtype = TORCH_DTYPES[compute_dtype or options.dtype]
    with torch.device("meta"):
        module = RankModule(config, mapping, rank, dtype, options.normalization_mode)
    tensors, state = Materializer(reader), {}
    for name, parameter in module.state_dict().items():
        if name != INVERSE_FREQUENCIES:
            recipe = quantized(recipe_for(name, config, mapping, rank, options.dtype))
            state[name] = to_torch(tensors.tensor(recipe)).to(parameter.dtype)
    state[INVERSE_FREQUENCIES] = torch.from_numpy(inverse_frequencies(config))
    module.load_state_dict(state, assign=True)
    return module.eval()


def empty_caches(
    config: ModelConfig, mapping: Mapping, rank: int, options: ExportOptions, batch: int, dtype: str = "float32"
) -> list[Cache]:
    """A zeroed (key, value) ``[batch, kv_heads, max_seq_len, D]`` for each local layer."""
    shape = (batch, rank_shape(config, mapping).kv_heads, options.max_seq_len, config.head_dim)
    layers = mapping.layers(rank, config.num_hidden_layers)
    return [
        (torch.zeros(shape, dtype=TORCH_DTYPES[dtype]), torch.zeros(shape, dtype=TORCH_DTYPES[dtype])) for _ in layers
    ]
