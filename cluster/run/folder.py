"""What does a run's folder hold, and may this job use it? Read and claimed before anything heavy is imported.

The folder is STORAGE/NAME, on this machine or below a URI; both behave the same. It decides what `run` does: without a
checkpoint, the run begins; with one, it goes on, if the job and the data are the same; with a result, it has finished.
"""

import json
import os
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from thawline.cluster.errors import LaunchError, StorageError
from thawline.cluster.job import job as jobs
from thawline.cluster.job.checks import batch_of
from thawline.cluster.job.job import Job
from thawline.cluster.run import claim
from thawline.cluster.run.loaded import Loaded
from thawline.dataio.checks.census import check_splits
from thawline.dataio.errors import SourceError
from thawline.dataio.store import files
from thawline.dataio.store.atomic import atomic_write, sweep
from thawline.dataio.store.root import Root
from thawline.dataio.table.tasks import TASKS

Result = dict[str, Any]
"""What `result.json` holds."""

_OTHERWISE = "give another --name, or --fresh, which moves what is there aside"


def run_root(job: Job) -> Root:
    """The folder of a job's run: STORAGE/NAME. Raises SourceError for a URI with a password."""
    return Root.of(job.storage).child(job.name)


def run_dir(job: Job) -> str:
    """`run_root` as a text, for contexts and other processes."""
    return run_root(job).text


def inspect(job: Job, *, fresh: bool = False, loaded: Loaded | None = None) -> Result | None:
    """The run's result if it has finished, else None when the job may begin or go on there. Writes nothing.

    fresh: the folder's content will be moved aside, so that only the job's data and the storage matter.
    loaded: the job's, where the caller goes on with it.
    Raises StorageError when the folder holds a run with other settings or on other data, or cannot be written;
    LaunchError when no job can train on such data; DataError when the manifest cannot be trusted.
    """
    return _inspect(job, loaded or Loaded(job), fresh=fresh)[0]


def appended(job: Job) -> Job:
    """The job with the phases that were appended to its run, where the run's folder knows more of them than the job.

    Raises StorageError.
    """
    folder = run_root(job)
    with _refusals(folder):
        if "job.toml" not in folder.listing():
            return job
        table = _parsed(folder, "job.toml", tomllib.loads)
        phases = jobs.from_dict(table, source=folder.full("job.toml"), trust_code=True).appended  # phases name no code
    return replace(job, appended=phases) if len(phases) > len(job.appended) else job


class Recorded(NamedTuple):
    """The data of a run: its manifest, and the fingerprints."""

    manifest: str
    fingerprint: str


def recorded(job: Job) -> Recorded | None:
    """The data that the run's folder records; None where no run has begun. Raises StorageError."""
    folder = run_root(job)
    with _refusals(folder):
        if not {"job.toml", "manifest.hash"} <= folder.listing().keys():
            return None
    contents = _read(job, folder)
    return Recorded(contents.job.manifest, contents.fingerprint)


def is_shorter(result: Result | None, job: Job) -> bool:
    """Whether a result is older than the last of the job's appended phases."""
    return result is not None and result.get("appended", 0) < len(job.appended)


def read_result(job: Job) -> Result | None:
    """What `result.json` of the job's run holds, if there is one. Raises StorageError."""
    return _read(job, run_root(job)).result


def has_begun(job: Job) -> bool:
    """Whether the run has a checkpoint, so that its settings are known to work. Raises StorageError."""
    folder = run_root(job)
    with _refusals(folder):
        return any(name.startswith("step_") for name in folder.child("checkpoints").listing())


@contextmanager
def hold(job: Job, *, fresh: bool = False, tell: Callable[[str], None]) -> Iterator[None]:
    """Be the only launch that writes into the run's folder, until the block ends.

    fresh: move its content aside first. tell: takes a sentence on either.
    Raises StorageError when another launch holds the folder, or it cannot be written.
    """
    folder = run_root(job)
    with ExitStack() as stack:
        with _refusals(folder):
            stack.enter_context(claim.claimed(folder, tell=tell))
            sweep(folder)
            if fresh:
                _move_aside(job, tell)
        yield


def _move_aside(job: Job, tell: Callable[[str], None]) -> None:
    """Put all but the claim into a folder beside, named by the date. Raises OSError."""
    folder = run_root(job)
    names = [name for name in folder.listing() if name != claim.FILE]
    if not names:
        return
    dest = run_root(replace(job, name=f"{job.name}.{datetime.now():%Y-%m-%d_%H%M%S}"))
    # A kill in between leaves no result without its settings, nor checkpoints without their manifest's hash.
    last = ("checkpoints", "manifest.hash", "job.toml")
    for name in sorted(names, key=lambda name: (last.index(name) + 1 if name in last else 0, name != "result.json")):
        folder.move(name, dest)
    tell(f"what was in {folder} is now in {dest}")


class _Contents(NamedTuple):
    """What a run's folder holds: its job, its result, and the fingerprints of its manifests ("" where it has none)."""

    job: Job
    result: Result | None
    fingerprint: str


def _inspect(job: Job, loaded: Loaded, *, fresh: bool) -> tuple[Result | None, str]:
    """The result of `inspect`, and unless there is one, the fingerprints of the job's manifests."""
    folder = run_root(job)
    contents = _Contents(job, None, "") if fresh else _read(job, folder)
    if is_shorter(contents.result, job if fresh else appended(job)):
        contents = contents._replace(result=None)
    _check_settings(folder, contents, job)
    if contents.result is not None:
        if contents.fingerprint and not _data_gone(contents.job, job):
            _check_data(folder, contents, job, loaded.fingerprint)
        _check_weights(folder, contents.result)
        return contents.result, ""
    with _refusals(folder):
        _check_writable(folder)
    manifest = loaded.manifest
    _check_task(job, manifest.task)
    check_splits(manifest, loaded.valid, names=[job.manifest, job.data.valid or job.manifest])
    batch_of(job, samples=len(manifest.subset("train")))
    for checked in loaded.manifests:
        checked.check_paths(allowed=job.data.max_quarantined)
    _check_data(folder, contents, job, loaded.fingerprint)
    return None, loaded.fingerprint


def _check_weights(folder: Root, result: Result) -> None:
    """Raises StorageError where the checkpoint that a result describes is missing, while there are others."""
    step = result.get("steps")
    described = result.get("checkpoint") or (f"checkpoints/step_{step:08d}" if isinstance(step, int) else "")
    with _refusals(folder):
        names = [name for name in folder.child("checkpoints").listing() if name.startswith("step_")]
    if described and names and described.rpartition("/")[2] not in names:
        raise StorageError(
            f"{folder}/result.json describes the weights of {described}, which is not there (the newest is "
            f"{max(names)}): it would count as theirs; remove result.json, and the same command goes on from there"
        )


def _read(job: Job, folder: Root) -> _Contents:
    """What the folder holds. Raises StorageError."""
    with _refusals(folder):
        listing = folder.listing()
        if not ("result.json" in listing or has_begun(job)):
            return _Contents(job, None, "")
        table = _parsed(folder, "job.toml", tomllib.loads) if "job.toml" in listing else None
        result = _parsed(folder, "result.json", _as_result) if "result.json" in listing else None
        # If it was overwritten it may be no text, and no fingerprint: the data then count as others.
        hashed = folder.read("manifest.hash") if "manifest.hash" in listing else b""
        fingerprint = hashed.decode(errors="backslashreplace").strip()
    if table is None:
        return _Contents(job, result, fingerprint)
    # It is compared with the job that runs: nothing that it names is imported.
    before = jobs.from_dict(table, source=folder.full("job.toml"), trust_code=True)
    return _Contents(before, result, fingerprint)


def _check_settings(folder: Root, contents: _Contents, job: Job) -> None:
    different = jobs.differences(contents.job, job)
    if different:
        mixed = "going on would mix the two" if contents.result is None else "its result is not this job's"
        raise StorageError(f"{folder} holds a run with other settings ({'; '.join(different)}): {mixed}; {_OTHERWISE}")


def _check_data(folder: Root, contents: _Contents, job: Job, fingerprint: str) -> None:
    """Raises StorageError unless the run in the folder used data with this fingerprint."""
    if contents.fingerprint in ("", fingerprint):
        return
    (was, *was_valid), (now, *now_valid) = contents.fingerprint.split(), fingerprint.split()
    different = []
    if was != now:
        different.append(_change("its manifest", contents.job.manifest, job.manifest))
    if was_valid != now_valid:
        different.append(_change("data.valid", contents.job.data.valid, job.data.valid))
    mixed = "the stream would change in the middle" if contents.result is None else "its result is not this job's"
    raise StorageError(f"{folder} holds a run on other data ({'; '.join(different)}): {mixed}; {_OTHERWISE}")


def _change(name: str, before: str, now: str) -> str:
    if before == now:
        return f"{name} {now} was made anew since"
    if before and now:
        return f"{name} was {before}, and {now} has other images, labels or splits"
    return f"{name}: {before or 'none'} -> {now or 'none'}"


def _data_gone(before: Job, job: Job) -> bool:
    """Whether the run's own manifests are missing, so that nothing can be compared. Raises StorageError."""
    names = [(job.manifest, before.manifest), (job.data.valid, before.data.valid)]
    with _refusals(run_root(job)):
        return all(now == was for now, was in names) and any(
            root.missing([name]) for root, name in (Root.holding(now) for now, _ in names if now)
        )


def epochs_of(folder: Root) -> str:
    """The epoch table of a run that has finished, or a sentence where its rows cannot be read."""
    from thawline.cluster.observe.console import epoch_table  # brings rich, which inspecting does not need

    try:
        return epoch_table(files.as_table(folder.read("rows.parquet")).to_pylist())
    except (OSError, pa.ArrowException, SourceError, KeyError, TypeError, ValueError) as error:
        why = files.why_refused(error)
        return f"{folder.full('rows.parquet')} cannot be read ({why}): the result stands without its epochs"


def _check_task(job: Job, task: str) -> None:
    """Raises LaunchError for a task without a model, or whose targets do not mix; RecipeError for a wrong loss."""
    from thawline.models.heads import TASKS as HEADS  # brings torch, for which `thawline status` need not wait
    from thawline.trainer.losses.named import named_loss

    if HEADS.get(task) is None:
        tasks = " and ".join(name for name, head in HEADS.items() if head)
        raise LaunchError(
            f"{job.manifest} is for task {task}, and a job trains {tasks}: there is no model for it; look at it with "
            "`thawline show`, or train a model of your own from Python on dataio.loaders"
        )
    for mixing in ("mixup", "cutmix"):
        if (alpha := getattr(job.augment, mixing)) and mixing not in TASKS[task].mixes:
            others = " or ".join(name for name, record in TASKS.items() if mixing in record.mixes)
            raise LaunchError(
                f"augment.{mixing}={alpha} with task {task}: the targets of two images do not mix as the images do; "
                f"give augment.{mixing} = 0 (it is for {others})"
            )
    named_loss(job.fit.loss, task=task, label_smoothing=job.fit.label_smoothing)


def spare_images(out: Path | None, loaded: Loaded) -> None:
    """Raises StorageError where a picture would be written over one of the job's own images or masks."""
    if out is None or not out.exists():
        return
    for manifest in loaded.manifests:
        names = [path.as_posix().removeprefix(f"{manifest.root}/") for path in (out.absolute(), out.resolve())]
        for column in ("path", "label") if TASKS[manifest.task].masks else ("path",):
            rows = manifest.rows[column]
            if pc.any(pc.is_in(rows, pa.array(names, rows.type))).as_py():
                raise StorageError(f"--out {out} is one of the job's images: it would be lost; give another file")


def open_run(
    job: Job,
    holding: ExitStack | None = None,
    *,
    fresh: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    loaded: Loaded | None = None,
) -> Result | None:
    """`inspect`, and unless the run has finished, begin or go on there: `job.toml` says what runs. Raises as it does.

    holding: the stack that holds the folder, see `hold`; None where the launching process holds it.
    """
    folder = run_root(job)
    finished, fingerprint = _inspect(job, loaded or Loaded(job), fresh=fresh)
    if finished is not None:
        return finished
    if holding is not None:
        holding.enter_context(hold(job, fresh=fresh, tell=tell))
        contents = _read(job, folder)  # another launch may have written there before it was held
        _check_settings(folder, contents, job)
        _check_data(folder, contents, job, fingerprint)
    with _refusals(folder):
        write_text(folder, "manifest.hash", fingerprint + "\n")
        write_text(folder, "job.toml", jobs.to_toml(appended(job)))
    return None


_REQUIRED: dict[str, tuple[type, ...]] = {
    "metrics": (dict,),
    "images_per_s": (int, float),
    "data_wait_fraction": (int, float),
    "wall_s": (int, float),
    "stream_hash": (str,),
    "notes": (list, NoneType),
    "checkpoint": (str, NoneType),
}
"""What other code reads of a result; None: older results lack it."""


def _as_result(text: str) -> Result:
    """The result in a result.json. Raises ValueError where something of `_REQUIRED` is missing."""
    result: Result = json.loads(text)
    if not isinstance(result, dict) or result.get("status") != "finished":
        raise ValueError("it does not say that the run has finished")
    for name, kinds in _REQUIRED.items():
        if not isinstance(result.get(name), kinds):
            raise ValueError(f"it has no {name}")
    return result


def _parsed(folder: Root, name: str, parse: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The content of a file of the run. Raises StorageError when it cannot be parsed; OSError."""
    try:
        table = parse(folder.read(name).decode())
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}")
        return table
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{folder.full(name)} cannot be understood ({error}): what runs there is not known; {_OTHERWISE}"
        ) from error


def _check_writable(folder: Root) -> None:
    """Raises PermissionError for a local folder that cannot be written; a store shows that only by a write."""
    if folder.remote:
        return
    existing = next(path for path in (folder.folder, *folder.folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise PermissionError(f"{existing} is no folder that this user may write")


@contextmanager
def _refusals(folder: Root) -> Iterator[None]:
    try:
        yield
    except (OSError, SourceError, pa.ArrowException) as error:
        raise StorageError(
            f"{folder} cannot be written ({files.why_refused(error)}): checkpoints and results would be lost; "
            "give another --storage"
        ) from error


def write_text(root: Root, name: str, text: str) -> None:
    """Replace a small file atomically. Raises OSError."""
    with atomic_write(root, name) as sink:
        sink.write(text.encode())
