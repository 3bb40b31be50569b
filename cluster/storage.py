"""What does a run's folder hold, and may this job use it? Read and claimed before anything heavy is imported.

The folder is STORAGE/NAME. It decides what `run` does: absent or without a checkpoint, the run begins; with one, it
goes on, if the job and the data are still the same; with a result, it has finished.
"""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from cluster import job as jobs
from cluster.errors import LaunchError, StorageError
from cluster.job import Job
from dataio.manifest import Manifest
from dataio.spec import ImageSpec

Result = dict[str, Any]
"""What `result.json` holds."""


def run_dir(job: Job) -> Path:
    """Where a job's run lies: STORAGE/NAME. Raises StorageError for what is not a local folder."""
    if "://" in job.storage:
        raise StorageError(
            f"storage={job.storage!r} is not a folder of this machine: checkpoints cannot be renamed into place "
            "there; give a folder, a network file system if there are several machines"
        )
    return Path(job.storage) / job.name


def look(job: Job) -> Result | None:
    """The run's result if it has finished, else None when the job may begin or go on there. Writes nothing.

    Raises StorageError when the folder holds a run with other settings or on other data, or cannot be written;
    LaunchError when no job can train on such data; DataError when the manifest cannot be trusted.
    """
    return _look(job)[0]


def _look(job: Job) -> tuple[Result | None, str]:
    """`look`'s answer, and unless it is a result, the fingerprint of the job's manifest."""
    folder = run_dir(job)
    begun = any((folder / "checkpoints").glob("step_*"))
    if begun and (folder / "job.toml").exists():
        different = jobs.differences(jobs.from_toml(folder / "job.toml"), job)
        if different:
            raise StorageError(
                f"{folder} holds a run with other settings ({'; '.join(different)}): going on would mix the two; "
                "give another --name, or remove the folder"
            )
    if begun and (folder / "result.json").exists():
        result: Result = json.loads((folder / "result.json").read_text())
        return result, ""
    standing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (standing.is_dir() and os.access(standing, os.W_OK)):
        raise _unwritable(folder, f"{standing} is no folder that this user may write")
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
    same_data = folder / "manifest.hash"
    if begun and same_data.exists() and same_data.read_text().strip() != fingerprint:
        raise StorageError(
            f"{folder} holds a run on another manifest than {job.manifest} is now: the stream would change in the "
            "middle; give another --name, or remove the folder"
        )
    return None, fingerprint


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
    try:
        finished, fingerprint = _look(job)
        if finished is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "manifest.hash", fingerprint + "\n")
            write_text(folder / "job.toml", jobs.to_toml(job))
        return finished
    except OSError as error:
        raise _unwritable(folder, str(error.strerror)) from error


def _unwritable(folder: Path, why: str) -> StorageError:
    return StorageError(
        f"{folder} cannot be written ({why}): checkpoints and results would be lost; give another --storage"
    )


def image_spec(job: Job) -> ImageSpec:
    """The ImageSpec that a job's [data] and [augment] describe, its defaults where they say None. Raises SpecError."""
    known = {f.name for f in fields(ImageSpec)}
    values = {**asdict(job.data), **asdict(job.augment)}
    return ImageSpec(**{name: value for name, value in values.items() if name in known and value is not None})


def write_text(file: Path, text: str) -> None:
    """Replace a small file as a whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
