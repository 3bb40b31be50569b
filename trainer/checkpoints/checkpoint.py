"""How does a run survive being killed? Checkpoints that are either whole or not there.

They lie below a root that is a folder or a URI. Every file appears whole (see store.atomic), the manifest last: a
folder without one is an unfinished checkpoint. What a checkpoint holds, see format.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import torch

from thawline.dataio.errors import SourceError, listed
from thawline.dataio.store import files
from thawline.dataio.store.atomic import atomic_write
from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints.format import (
    FORMAT,
    MANIFEST,
    NO_ORIGIN,
    Origin,
    Parts,
    Saved,
    UnfitError,
    folder_name,
    manifest_text,
    name_of,
    read_manifest,
    step_of,
)
from thawline.trainer.errors import CheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best value of `metric` is never pruned; those without a value do not count."""

    metric: str
    higher: bool = False


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be resumed from, and why. finished: whether it was ever a complete one of this run."""

    name: str
    reason: str
    finished: bool


# Writing --------------------------------------------------------------------------------------------------


def save(
    root: str | Path | Root,
    step: int,
    parts: Parts,
    *,
    keep: int,
    metrics: Mapping[str, float] | None = None,
    best: Best | None = None,
    origin: Origin = NO_ORIGIN,
) -> str:
    """Write checkpoint `step` below `root`, whole or not at all; then remove all but the newest `keep` and the best.

    An existing checkpoint of this step is replaced in one move. Returns the checkpoint's folder.
    Raises CheckpointError when the storage refuses; what was stored before is untouched.
    """
    root = Root.of(root)
    name = name_of(step)
    consequence = "a kill now would cost the steps since the last one; make room or mend the storage"
    with _refusals(f"checkpoint {root.child(name)}", consequence):
        _write(root, name, step, parts, metrics or {}, origin)
    prune(root, step, keep=keep, best=best, origin=origin)
    return root.child(name).text


def save_model(root: str | Path | Root, name: str, parts: Parts, *, step: int = 0, origin: Origin = NO_ORIGIN) -> str:
    """Write ROOT/NAME in the format of a checkpoint, whole or not at all, and return the folder; it replaces an older
    one.

    Raises CheckpointError when the storage refuses, and for a name that no folder can have.
    """
    root = Root.of(root)
    name = folder_name(name)
    with _refusals(f"{root.child(name)}", "what stood there before is untouched; make room or give another name"):
        _write(root, name, step, parts, {}, origin)
    return root.child(name).text


def _write(root: Root, name: str, step: int, parts: Parts, metrics: Mapping[str, float], origin: Origin) -> None:
    """Write the parts beside the old ones, replace the manifest, and remove the old parts."""
    folder = root.child(name)
    old = _prepare(root, name)
    written: dict[str, dict[str, Any]] = {}
    try:
        for part, content in parts.items():
            file = next(file for file in (f"{part}.pt", f"{part}-1.pt") if file not in old)
            with atomic_write(folder, file, digest=hashlib.sha256) as sink:
                torch.save(content, cast(IO[bytes], sink))
            written[part] = {"file": file, "bytes": sink.bytes, "sha256": sink.digest.hexdigest()}
        numbers = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        about = {"format": FORMAT, "step": step, "metrics": numbers, "parts": written}
        with atomic_write(folder, MANIFEST) as sink:
            sink.write(manifest_text({**about, "run": dict(origin.run), "classes": list(origin.classes)}))
    except Exception:
        with contextlib.suppress(OSError):
            _prepare(root, name)
        raise
    for file in old:
        with contextlib.suppress(OSError):
            folder.remove(file)


def _prepare(root: Root, name: str) -> set[str]:
    """Remove from the folder all that is not of a whole checkpoint; return the files of its parts. Raises OSError."""
    folder = root.child(name)
    if _is_link(folder):
        root.remove(name)
    listing = folder.listing()
    try:
        old = {part.file for part in read_manifest(folder).parts.values()}
    except UnfitError:
        _remove(root, name)
        return set()
    for file in listing.keys() - old - {MANIFEST}:
        folder.remove(file)
    return old


@contextmanager
def _refusals(what: str, consequence: str) -> Iterator[None]:
    """Turn the storage's errors into a sentence; others pass. torch.save hides the storage's error behind its own."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError | SourceError | pa.ArrowException):
            cause = cause.__context__
        if not isinstance(cause, Exception):
            raise
        raise CheckpointError(f"{what} cannot be written ({files.why_refused(cause)}): {consequence}") from error


def prune(
    root: str | Path | Root, step: int, *, keep: int, best: Best | None = None, origin: Origin = NO_ORIGIN
) -> None:
    """Remove all checkpoints up to `step` but the newest `keep` and the best.

    Later ones, and those of another origin, belong to another run and neither count nor are removed. A damaged one is
    removed when it is older than those kept, an unfinished one at once. A storage that refuses is logged.
    """
    root = Root.of(root)
    try:
        _prune(root, keep, step, best, origin)
    except (OSError, pa.ArrowException) as error:
        log.warning("old checkpoints in %s cannot be removed (%s)", root, files.why_refused(error))


def _prune(root: Root, keep: int, step: int, best: Best | None, origin: Origin) -> None:
    folders = (name for name, size in root.listing().items() if size is None)
    steps = sorted(
        (number for name in folders if (number := step_of(name)) is not None and number <= step), reverse=True
    )
    fit, unfinished, foreign = list[Saved](), set[int](), set[int]()
    for number in steps:
        try:
            saved = read_manifest(root.child(name_of(number)))
            if origin.foreign(saved.origin):
                foreign.add(number)
            else:
                fit.append(saved)
        except UnfitError as error:
            if not error.finished:
                unfinished.add(number)
    kept = {saved.step for saved in fit[: max(1, keep)]}
    if step not in kept:
        return
    oldest = min(kept)
    if best is not None:
        kept |= _best(fit, best)
    outdated = {saved.step for saved in fit} - kept
    for number in set(steps) - foreign:
        if number in outdated or number in unfinished or (number < oldest and number not in kept):
            _remove(root, name_of(number))


def _best(saved: Iterable[Saved], best: Best) -> set[int]:
    """The step of the best, the later of two equals; none where no checkpoint has the metric."""
    sign = 1 if best.higher else -1
    ranked = [(sign * each.metrics[best.metric], each.step) for each in saved if best.metric in each.metrics]
    return {max(ranked)[1]} if ranked else set()


def _remove(root: Root, name: str) -> None:
    """Remove a checkpoint, its manifest first: what a kill leaves is unfinished, not damaged. Raises OSError.

    Of a link only the link: its target is somebody else's.
    """
    folder = root.child(name)
    if not _is_link(folder):
        folder.remove(MANIFEST)
    root.remove(name)


def _is_link(folder: Root) -> bool:
    return not folder.remote and folder.folder.is_symlink()


# Reading --------------------------------------------------------------------------------------------------


def newest(root: str | Path | Root, *, origin: Origin = NO_ORIGIN) -> tuple[Saved | None, list[Skipped]]:
    """The newest intact checkpoint of `origin`, or None; and the newer ones that were skipped.

    Raises CheckpointError when the storage does not respond: what it holds is then unknown, which is not nothing.
    """
    root = Root.of(root)
    skipped = list[Skipped]()
    try:
        names = [name for name in root.listing() if name.startswith("step_")]
        for name in sorted(names, key=lambda name: (len(name), name), reverse=True):
            try:
                return _checked(root, name, origin), skipped
            except UnfitError as error:
                skipped.append(Skipped(name, str(error), error.finished))
    except (OSError, SourceError, pa.ArrowException) as error:
        raise CheckpointError(
            f"the checkpoints in {root} cannot be listed or read ({files.why_refused(error)}): going on without them "
            "would begin the run anew; see that the storage responds, and start again"
        ) from error
    return None, skipped


def load_model(root: str | Path | Root, name: str) -> Saved:
    """What `save_model` wrote as ROOT/NAME. Raises CheckpointError when it is missing, or has changed."""
    root = Root.of(root)
    folder = root.child(folder_name(name))
    try:
        names = sorted(root.listing())
        if name not in names:
            raise UnfitError(f"it does not exist; there {f'are {listed(names)}' if names else 'is nothing'}")
        return read_manifest(folder).with_content()
    except (UnfitError, OSError, SourceError, pa.ArrowException) as error:
        why = str(error) if isinstance(error, UnfitError) else files.why_refused(error)
        raise CheckpointError(
            f"{folder} cannot be loaded ({why}): no weights were changed; give the name of what was saved"
        ) from error


def _checked(root: Root, name: str, origin: Origin) -> Saved:
    """A checkpoint with all its bytes, verified. Raises UnfitError; OSError when a store does not respond."""
    folder = root.child(name)
    try:
        if _is_link(folder):
            raise UnfitError("it is a link, and its target may be another run's")
        saved = read_manifest(folder)
        if step_of(name) is None or name != name_of(saved.step):
            raise UnfitError(f"it holds step {saved.step}")
        if foreign := origin.foreign(saved.origin):
            raise UnfitError(f"it is another run's ({foreign})", finished=False)
        return saved.with_content()
    except OSError as error:
        if root.remote and not isinstance(error, FileNotFoundError):
            raise
        raise UnfitError(f"it cannot be read ({files.why_refused(error)})") from error
