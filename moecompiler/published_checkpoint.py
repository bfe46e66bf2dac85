"""A published quantized checkpoint as a source of weights: numbers, as from any other, and the codes that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecompiler.calibration.static import with_input_scales
from moecompiler.checkpoint_files import raise_problems
from moecompiler.config import ModelConfig
from moecompiler.quantization.as_json import recipe_to_json
from moecompiler.quantization.published import published_recipe, quantized_layers, read_input_scale, read_linear
from moecompiler.quantization.published_boxes import read_codes, read_numbers, stored_shapes, stored_tensors
from moecompiler.quantization.published_config import PublishedConfig
from moecompiler.quantization.schemes import QuantizedTensor, WeightScheme
from moecompiler.safetensors_file import StoredTensor, map_tensor
from moecompiler.weights import Shape

if TYPE_CHECKING:
    from moecompiler.checkpoint import HFCheckpoint  # which opens these

# what may lie beside a layer's tensors and has no say in the weight: its shape once more, and the scales of an FP8 cache
_UNREAD = ("weight_shape", "k_scale", "v_scale")


@dataclass(frozen=True)
class HeldCodes:
    """``shapes``: of the weights that are held as codes, by published name; ``tensors``: where what each consists of lies."""

    config: PublishedConfig
    shapes: dict[str, Shape]
    tensors: dict[str, StoredTensor]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What the weight called ``name`` consists of, mapped."""
        linear = name.removesuffix(".weight")
        names = [f"{linear}.{suffix}" for suffix in stored_tensors(self.config)]
        return {each: map_tensor(self.tensors[each]) for each in names if each in self.tensors}

    def stamp(self, model: ModelConfig) -> dict[str, Any]:
        """What the source's identity says of them: in short, and as a recipe.

        Raises: UserError where static scales of FP8 inputs are missing, or not positive and finite.
        """
        linears = {name.removesuffix(".weight") for name in self.shapes}
        recipe = published_recipe(self.config, linears, model)
        scales = {each: read_input_scale(self.config, self.arrays(f"{each}.weight"), each) for each in sorted(linears)}
        if all(scale is not None for scale in scales.values()):
            recipe = with_input_scales(recipe, model, lambda name: scales[name] or 0.0)
        return {"quantization": {"format": self.config.described, **recipe_to_json(recipe)}}

    def check(self) -> None:
        """Reads all. Raises: UserError as ``published.read_linear``."""
        for name, shape in self.shapes.items():
            read_linear(self.config, self.arrays(name), name.removesuffix(".weight"), shape)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A ``checkpoint.Source`` whose tensors ``codes`` names are held as codes; the others are those of ``plain``."""

    plain: HFCheckpoint
    codes: HeldCodes

    @property
    def files(self) -> tuple[Path, ...]:
        return self.plain.files

    def dtype(self, name: str) -> str:
        return "float32" if name in self.codes.shapes else self.plain.dtype(name)

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        """As ``HFCheckpoint.read``; of a weight held as codes, the numbers that they stand for, float32."""
        if name not in self.codes.shapes:
            return self.plain.read(name, start, shape)
        return read_numbers(*self._layer(name), start, shape)

    def scheme(self, name: str) -> WeightScheme | None:
        """How the tensor's codes are made; None where it is held as floats."""
        return self.codes.config.held_scheme if name in self.codes.shapes else None

    def read_codes(self, name: str, start: Shape, shape: Shape) -> QuantizedTensor:
        """The codes of the box of ``shape`` at ``start`` and what goes with them.

        Raises: UserError where they are broken, or the box is not of whole groups.
        """
        return read_codes(*self._layer(name), start, shape)

    def identity(self) -> dict[str, Any]:
        return self.plain.identity()

    def _layer(self, name: str) -> tuple[PublishedConfig, Mapping[str, np.ndarray], str, Shape]:
        return self.codes.config, self.codes.arrays(name), name.removesuffix(".weight"), self.codes.shapes[name]


def take_quantized(
    config: PublishedConfig,
    stored: Mapping[str, StoredTensor],
    model: ModelConfig,
    expected: Mapping[str, Shape],
    where: str,
) -> tuple[HeldCodes, dict[str, StoredTensor]]:
    """What of the ``stored`` tensors makes up quantized weights, and the others. ``expected``: shapes of the model's weights.

    AutoGPTQ gives every layer a bias, of zeros where the model has none.

    Raises: UserError that begins with ``where``, where tensors are missing, of the wrong shape or dtype, or a layer's experts
    are not stored alike; where a layer has a bias that is not of zeros.
    """
    linears = quantized_layers(config, stored.keys(), model, where)
    shapes = {name: shape for name, shape in expected.items() if name.removesuffix(".weight") in linears}
    rest, tensors = dict(stored), {}
    wrong_shapes, wrong_dtypes, biased = [], [], []
    for name, shape in shapes.items():
        linear = name.removesuffix(".weight")
        config.scheme.scale_shape(shape, f"{where}: {linear}")
        for suffix, form in stored_tensors(config).items():
            tensor = rest.pop(f"{linear}.{suffix}", None)
            if tensor is None:
                continue
            tensors[f"{linear}.{suffix}"] = tensor
            allowed = stored_shapes(config, form, shape)
            if tensor.shape not in allowed:
                wrong_shapes.append(f"{tensor.name} is {list(tensor.shape)}, expected {list(allowed[0])}")
            if tensor.dtype not in map(str, form.dtypes):
                wrong_dtypes.append(f"{tensor.name} is {tensor.dtype}, expected {', '.join(map(str, form.dtypes))}")
        bias = rest.pop(f"{linear}.bias", None)
        if bias is not None and map_tensor(bias).any():
            biased.append(bias.name)
        for suffix in _UNREAD:
            for module in (linear, linear.rpartition(".")[0]):
                rest.pop(f"{module}.{suffix}", None)
    problems = {
        "tensors of the wrong shape": wrong_shapes,
        "tensors of the wrong dtype": wrong_dtypes,
        "biases, which Mixtral's linear layers have none of": biased,
    }
    raise_problems(Path(where), problems)
    return HeldCodes(config, shapes, tensors), rest
