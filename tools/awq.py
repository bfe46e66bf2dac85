"""AWQ's search as verbs ask for it: found once, kept beside what is made with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moecompiler.atomic import fingerprint
from moecompiler.checkpoint import Source
from moecompiler.dummy import open_source
from moecompiler.errors import UserError
from moecompiler.quantization.as_json import recipe_to_json
from moecompiler.smoothed_checkpoint import FILE, VERSION, Smoothing, open_smoothed, read_smoothing, write_smoothing
from moecompiler.tools.calibration import measured_on, settings_of, with_progress
from moecompiler.tools.flags import CalibrationFlags, QuantizationFlags
from moecompiler.tools.job import Job
from moecompiler.tools.quantization_options import QFormat


def smoothed(job: Job, flags: QuantizationFlags, calibration: CalibrationFlags, output_dir: Path) -> Job:
    """With ``--qformat int4_awq``, the job on weights with the scales that AWQ's search finds; they are kept in
    ``OUTPUT_DIR.calibration`` and taken from there if model, text, options and recipe are the same. Without, the job.

    Raises: UserError where options, model or text are bad, or the folder cannot be written to.
    """
    if flags.qformat is not QFormat.int4_awq or job.quantization is None:
        return job
    path = (output_dir.with_name(f"{output_dir.name}.calibration") / FILE).absolute()
    notes: list[str] = []
    dtype, mode = job.export.dtype, job.export.normalization_mode
    source, samples, header = measured_on(job.model, job.source, dtype, mode, calibration, notes)
    rules = recipe_to_json(job.quantization)["rules"]
    header["cache_key"] = fingerprint(VERSION, job.source, header["text"], header["options"], rules)
    if _key_of(path) == header["cache_key"]:
        notes.append(f"{path} is up to date: the same model, text, options and recipe")
    else:
        write_smoothing(
            path, with_progress("searching", partial(_search, job, source, samples, header, path, calibration))
        )
        notes.append(f"AWQ's scales are of {header['text']['tokens']} tokens, kept in {path}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return replace(job, source=open_smoothed(open_source(job.source, job.model), path).identity())


def _search(
    job: Job,
    source: Source,
    samples: list[list[int]],
    header: dict[str, Any],
    path: Path,
    flags: CalibrationFlags,
    progress: Callable[[int, int], None],
) -> Smoothing:
    from moecompiler.calibration.awq import search

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made: {error.strerror}") from None
    assert job.quantization is not None
    settings = settings_of(job.export.dtype, job.export.normalization_mode, flags)
    return search(job.model, source, samples, settings, job.quantization, path.parent, header, progress)


def _key_of(path: Path) -> str | None:
    """Of the search that the file is of; None where there is none."""
    try:
        return str(read_smoothing(path).header.get("cache_key"))
    except UserError:
        return None
