"""Which model a calibration is of."""

from __future__ import annotations

import hashlib

import numpy as np

from moecompiler.atomic import fingerprint
from moecompiler.checkpoint import Source, expected_tensors
from moecompiler.config import ModelConfig

SAMPLED = 1024  # elements of each tensor


def model_fingerprint(config: ModelConfig, source: Source) -> str:
    """SHA-256, in hexadecimal digits, of the config and the first numbers of every tensor.

    Reads a few megabytes of a model of any size. Copies of a checkpoint have the same one wherever they lie, and another training
    of the model, which moves all its numbers, has another.
    """
    digest = hashlib.sha256(fingerprint(config.to_json()).encode())
    for name, shape in expected_tensors(config).items():
        box = (*(1 for _ in shape[1:]), min(shape[-1], SAMPLED))
        numbers = np.ascontiguousarray(source.read(name, (0,) * len(shape), box))
        digest.update(f"\n{name} {source.dtype(name)}\n".encode() + numbers.tobytes())
    return digest.hexdigest()
