"""Calibration as verbs ask for it: from options to files, made once."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress

from moecompiler.atomic import fingerprint
from moecompiler.calibration.files import FILE, JSON_FILE, VERSION, read_calibration, write_calibration
from moecompiler.calibration.identity import model_fingerprint
from moecompiler.calibration.result import Calibration
from moecompiler.calibration.samples import LONGEST_TOKEN, bytes_as_tokens, check_sizes, cut_samples
from moecompiler.calibration.text import default_documents, read_documents
from moecompiler.checkpoint import Source
from moecompiler.config import ExportOptions, ModelConfig, NormalizationMode
from moecompiler.dummy import open_source
from moecompiler.errors import UserError
from moecompiler.runtime.prompts import load_tokenizer
from moecompiler.tools.flags import CalibrationFlags

if TYPE_CHECKING:
    from moecompiler.calibration.streaming import Settings

Made = TypeVar("Made")

DEFAULT_LENGTH = 512  # of a sample, in tokens, as in TensorRT-LLM's quantize.py


def run_calibrate(
    config: ModelConfig,
    identity: dict[str, Any],
    dtype: str,
    mode: NormalizationMode,
    flags: CalibrationFlags,
    output_dir: Path,
    notes: list[str],
) -> Calibration:
    """Calibrates the model of ``identity`` and writes the result into ``output_dir``, unless it is there already.

    ``notes`` gets what the user should know. Raises: UserError where options, model or text are bad, or ``output_dir`` holds the
    calibration of another model.
    """
    source, samples, header = measured_on(config, identity, dtype, mode, flags, notes)
    model = header["model_fingerprint"]
    # the identity sees changes that the model's fingerprint, of a part of its numbers, may not
    header["cache_key"] = fingerprint(VERSION, model, identity, header["text"], header["options"])
    if (there := _there(output_dir, model)) is not None and there.header.get("cache_key") == header["cache_key"]:
        notes.append(f"{output_dir} is up to date: the same model, text and options")
        return there
    made = _calibrated(config, source, samples, settings_of(dtype, mode, flags), output_dir)
    result = Calibration(
        made.input_amax, made.input_mean, made.keys, made.values, made.experts, header, str(output_dir)
    )
    write_calibration(output_dir, result)
    return result


def measured_on(
    config: ModelConfig,
    identity: dict[str, Any],
    dtype: str,
    mode: NormalizationMode,
    flags: CalibrationFlags,
    notes: list[str],
) -> tuple[Source, list[list[int]], dict[str, Any]]:
    """The model's weights, the samples to run through it, and what a header says of them.

    Raises: UserError where options, model or text are bad.
    """
    length = flags.calib_max_seq_length
    length = min(DEFAULT_LENGTH, config.max_position_embeddings) if length is None else length
    check_sizes(flags.calib_size, length, config.max_position_embeddings)
    if flags.calib_min_tokens is not None and flags.calib_min_tokens < 1:
        raise UserError(f"--calib_min_tokens {flags.calib_min_tokens}: give 1 or more")
    samples = samples_of(config, identity, flags, length, notes)
    source = open_source(identity, config)
    return (
        source,
        samples,
        {
            "model_fingerprint": model_fingerprint(config, source),
            "dataset": "default" if flags.calib_dataset is None else str(flags.calib_dataset),
            "text": {"sha256": _sha256(samples), "samples": len(samples), "tokens": sum(map(len, samples))},
            "options": {
                "dtype": dtype,
                "normalization_mode": int(mode),
                "calib_size": flags.calib_size,
                "calib_max_seq_length": length,
                "calib_min_tokens": flags.calib_min_tokens,
                "device": flags.device.value,
            },
        },
    )


def calibrate_beside(
    output_dir: Path, flags: CalibrationFlags, config: ModelConfig, identity: dict[str, Any], export: ExportOptions
) -> Calibration:
    """As ``run_calibrate``, for what is to go to ``output_dir``; the result is kept in ``OUTPUT_DIR.calibration``."""
    folder, notes = output_dir.with_name(f"{output_dir.name}.calibration"), list[str]()
    found = run_calibrate(config, identity, export.dtype, export.normalization_mode, flags, folder, notes)
    for note in (*notes, f"static scales are of {found.header['text']['tokens']} tokens, kept in {folder}"):
        print(f"note: {note}", file=sys.stderr)
    return found


def samples_of(
    config: ModelConfig, identity: dict[str, Any], flags: CalibrationFlags, length: int, notes: list[str]
) -> list[list[int]]:
    """Token ids to run, at most ``length`` in a sample. Dummy weights have no tokenizer: bytes are their tokens unless one is
    given.

    Raises: UserError where the text cannot be read or gives no token, or there is no tokenizer that fits the model.
    """
    size = flags.calib_size
    if flags.calib_dataset is None:
        documents = default_documents()
    else:
        documents = read_documents(flags.calib_dataset, size, size * length * LONGEST_TOKEN)
    encode: Callable[[str], list[int]]
    if flags.tokenizer_dir is not None or identity["kind"] == "hf":
        encode = load_tokenizer(flags.tokenizer_dir or Path(identity["model_dir"]), config.vocab_size).encode
    else:
        encode = bytes_as_tokens(config.vocab_size)
        notes.append("dummy weights have no tokenizer: bytes are taken for tokens (give --tokenizer_dir)")
    samples = cut_samples(documents, encode, size, length)
    if len(samples) < size:
        text = "the package's own text" if flags.calib_dataset is None else flags.calib_dataset
        tokens = sum(map(len, samples))
        notes.append(f"{text} gives {len(samples)} of --calib_size {size} samples, {tokens} tokens")
    return samples


def settings_of(dtype: str, mode: NormalizationMode, flags: CalibrationFlags) -> Settings:
    import torch

    from moecompiler.calibration.streaming import Settings

    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA GPU here; leave it out to use the CPU")
    return Settings(dtype, mode, flags.device.value, flags.calib_min_tokens)


def _calibrated(
    config: ModelConfig, source: Source, samples: list[list[int]], settings: Settings, output_dir: Path
) -> Calibration:
    from moecompiler.calibration.streaming import calibrate

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be made: {error.strerror}") from None
    return with_progress("calibrating", partial(calibrate, config, source, samples, settings, output_dir))


def with_progress(what: str, run: Callable[[Callable[[int, int], None]], Made]) -> Made:
    """Calls ``run`` with a function that shows how much is done, of how much, where a person is looking."""
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True) if console.is_terminal else None
    task = None if bar is None else bar.add_task(what, total=None)

    def progress(done: int, total: int) -> None:
        if bar is not None and task is not None:
            bar.update(task, completed=done, total=total)

    with bar or nullcontext():
        return run(progress)


def _there(output_dir: Path, model: str) -> Calibration | None:
    """What an earlier run left. Raises: UserError where that is of another model, or something else."""
    if not any((output_dir / name).exists() for name in (FILE, JSON_FILE)):
        return None
    try:
        there = read_calibration(output_dir)
    except UserError as error:
        raise UserError(f"{error}; remove it, or give another --output_dir") from None
    there.check_model(model)
    return there


def _sha256(samples: list[list[int]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "little") + np.asarray(sample, "<i8").tobytes())
    return digest.hexdigest()
