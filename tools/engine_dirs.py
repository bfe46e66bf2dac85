"""The engine directory of each rank: one for all, or one for each rank or host; and whether they hold the same engines."""

from __future__ import annotations

from pathlib import Path

from moecompiler.artifact import Artifact
from moecompiler.atomic import fingerprint
from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.places import Place, gather_places
from moecompiler.tools.together import together


def directory_of(engine_dir: Path, place: Place) -> Path:
    """``engine_dir`` with this rank's number, its number on its host, and its host in place of ``{rank}``, ``{local_rank}`` and
    ``{host}``."""
    text = str(engine_dir)
    values = {"{rank}": str(place.rank), "{local_rank}": str(place.local_rank), "{host}": place.host}
    for name, value in values.items():
        text = text.replace(name, value)
    return Path(text)


def open_engines(engine_dir: Path, communicator: Communicator) -> tuple[Artifact, Place]:
    """This rank's engines, which are of the same compile as every other rank's, and where this rank runs.

    Called by all ranks together. Raises: UserError, on every rank, where a rank cannot open its directory, or what two of them
    hold differs in the options they were compiled with or in what this rank's files were made from.
    """
    places = gather_places(communicator)
    rank = communicator.rank
    artifact = together(communicator, lambda: Artifact.open(directory_of(engine_dir, places[rank]), ("engine",)))
    manifest = artifact.manifest
    keys = {number: record.key for number, record in manifest.ranks.items()}
    own = manifest.header_fingerprint, keys.get(rank), keys if rank == 0 else {}
    said = communicator.gather_objects(own)
    different = [other for other, (header, _, _) in enumerate(said) if header != said[0][0]]
    if different:
        parts = {"ranks": str(artifact.world_size)} | {
            key: fingerprint(value) for key, value in artifact.header.items()
        }
        headers = communicator.gather_objects((str(artifact.directory), parts))
        raise UserError(_differ(places, different[0], headers))
    directories = communicator.gather_objects(str(artifact.directory))
    for other, (_, key, _) in enumerate(said):
        wanted = said[0][2].get(other)
        if key is not None and wanted is not None and key != wanted:
            raise UserError(
                f"{places[other]}: its engine in {directories[other]} is of another compile than {places[0]} has of it in"
                f" {directories[0]}: copy one of the directories over the other, or compile again"
            )
    return artifact, places[rank]


def _differ(places: list[Place], other: int, headers: list[tuple[str, dict[str, str]]]) -> str:
    (first_dir, first), (other_dir, second) = headers[0], headers[other]
    names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    return (
        f"{places[other]} has engines in {other_dir} that do not fit those of {places[0]} in {first_dir}: their manifests differ"
        f" in {', '.join(names)}; give every rank engines of one compile"
    )
