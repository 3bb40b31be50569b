"""What does a run's folder hold, and may this job use it? Read and claimed before anything heavy is imported.

The folder is STORAGE/NAME, on this machine or below a URI; both behave the same. It decides what `run` does: absent or
without a checkpoint, the run begins; with one, it goes on, if the job and the data are still the same; with a result,
it has finished.
"""

import json
import os
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from cluster import job as jobs
from cluster.errors import LaunchError, StorageError
from cluster.job import Job
from dataio import files
from dataio.atomic import whole
from dataio.errors import SourceError
from dataio.manifest import Manifest
from dataio.spec import ImageSpec

Result = dict[str, Any]
"""What `result.json` holds."""


def run_dir(job: Job) -> str:
    """Where a job's run lies: STORAGE/NAME, as dataio.files has roots. Raises SourceError for a URI with a password."""
    storage = files.normal_root(job.storage)
    return files.below(storage, quote(job.name) if files.is_remote(storage) else job.name)


def look(job: Job) -> Result | None:
    """The run's result if it has finished, else None when the job may begin or go on there. Writes nothing.

    Raises StorageError when the folder holds a run with other settings or on other data, or cannot be written;
    LaunchError when no job can train on such data; DataError when the manifest cannot be trusted.
    """
    return _look(job)[0]


def has_begun(job: Job) -> bool:
    """Whether the run has a checkpoint, so that its settings are known to work. Raises StorageError."""
    folder = run_dir(job)
    with _refusals(folder):
        return any(name.startswith("step_") for name in files.listing(files.below(folder, "checkpoints")))


def _look(job: Job) -> tuple[Result | None, str]:
    """`look`'s answer, and unless it is a result, the fingerprint of the job's manifest."""
    folder = run_dir(job)
    with _refusals(folder):
        there = files.listing(folder) if has_begun(job) else {}
        known = _parsed(folder, "job.toml", tomllib.loads) if "job.toml" in there else None
        result = _parsed(folder, "result.json", json.loads) if "result.json" in there else None
        same_data = files.read(folder, "manifest.hash").decode().strip() if "manifest.hash" in there else ""
    before = job if known is None else jobs.from_dict(known, source=files.below(folder, "job.toml"))
    different = jobs.differences(before, job)
    if different:
        raise StorageError(
            f"{folder} holds a run with other settings ({'; '.join(different)}): going on would mix the two; "
            "give another --name, or remove the folder"
        )
    if result is not None:
        _check_weights(folder, result)
        return result, ""
    with _refusals(folder):
        _check_writable(folder)
    manifests = load_manifests(job)
    if manifests[0].task not in ("single_label", "multi_label"):
        raise LaunchError(
            f"{job.manifest} is for task {manifests[0].task}, and a job trains single_label and multi_label: there is "
            "no model for it; look at it with `thawline show`, or train a model of your own from Python on "
            "dataio.loaders"
        )
    for manifest in filter(None, manifests):
        manifest.check_paths(allowed=job.data.max_quarantined)
    fingerprint = " ".join(manifest.fingerprint() for manifest in manifests if manifest)
    if same_data and same_data != fingerprint:
        raise StorageError(
            f"{folder} holds a run on another manifest than {job.manifest} is now: the stream would change in the "
            "middle; give another --name, or remove the folder"
        )
    return None, fingerprint


def _check_weights(folder: str, result: Result) -> None:
    """Raises StorageError where the checkpoint that a result describes is not there, while another is."""
    step = result.get("steps")
    described = result.get("checkpoint") or (f"checkpoints/step_{step:08d}" if isinstance(step, int) else "")
    with _refusals(folder):
        there = [name for name in files.listing(files.below(folder, "checkpoints")) if name.startswith("step_")]
    if described and there and files.last(described) not in there:
        raise StorageError(
            f"{folder}/result.json describes the weights of {described}, which is not there (the newest is "
            f"{max(there)}): it would be taken for theirs; remove result.json, and the same command goes on from there"
        )


def load_manifests(job: Job) -> tuple[Manifest, Manifest | None]:
    """The job's manifest, and the other one to validate on, if it names one. Raises ManifestError."""
    manifest = Manifest.load(job.manifest, root=job.data.root or None)
    if not job.data.valid:
        return manifest, None
    other = Manifest.load(job.data.valid)
    manifest.check_vocabulary(other, name=job.data.valid)
    return manifest, other


def open_run(job: Job) -> Result | None:
    """`look`, and unless the run has finished, claim its folder: `job.toml` says what runs. Raises as `look` does."""
    folder = run_dir(job)
    finished, fingerprint = _look(job)
    if finished is None:
        with _refusals(folder):
            write_text(folder, "manifest.hash", fingerprint + "\n")
            write_text(folder, "job.toml", jobs.to_toml(job))
    return finished


def _parsed(folder: str, name: str, parse: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What a file of the run says. Raises StorageError when it cannot be understood; OSError."""
    try:
        told = parse(files.read(folder, name).decode())
        if not isinstance(told, dict):
            raise ValueError(f"it holds a {type(told).__name__}")
        return told
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{files.below(folder, name)} cannot be understood ({error}): what runs there is not known; remove the "
            "folder, or give another --name"
        ) from error


def _check_writable(folder: str) -> None:
    """Raises PermissionError. What a store lets one write is found out by writing."""
    if files.is_remote(folder):
        return
    standing = next(place for place in (Path(folder), *Path(folder).parents) if place.exists())
    if not (standing.is_dir() and os.access(standing, os.W_OK)):
        raise PermissionError(f"{standing} is no folder that this user may write")


@contextmanager
def _refusals(folder: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SourceError, pa.ArrowException) as error:
        raise StorageError(
            f"{folder} cannot be written ({files.why_refused(error)}): checkpoints and results would be lost; "
            "give another --storage"
        ) from error


def image_spec(job: Job) -> ImageSpec:
    """The ImageSpec that a job's [data] and [augment] describe, its defaults where they say None. Raises SpecError."""
    known = {f.name for f in fields(ImageSpec)}
    values = {**asdict(job.data), **asdict(job.augment)}
    return ImageSpec(**{name: value for name, value in values.items() if name in known and value is not None})


def write_text(folder: str, name: str, text: str) -> None:
    """Replace a small file as a whole. Raises OSError."""
    with whole(folder, name) as sink:
        sink.write(text.encode())
