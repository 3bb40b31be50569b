"""How does a run survive being killed? Checkpoints that are either whole or not there.

A checkpoint is a folder `step_00000123/` of parts (`model.pt`, `state.pt`) and `manifest.json`, below a root that is
a folder or a pyarrow.fs URI. Every file appears whole (see store.atomic), the manifest last: a folder without one is
an unfinished checkpoint. The manifest holds the size and SHA-256 of every part and of its own text, so that no change
to either goes unseen; and which run it is of, so that no other goes on from it. SHA-256 and not the faster xxh3 that
shards have: `sha256sum` is on every machine, so that weights can be compared where thawline is not, and at 1.2 GB/s,
beside the training, it costs nothing that one notices. Only tensors and plain values are read back (`weights_only`):
a checkpoint cannot carry code.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import torch

from thawline.dataio.errors import SourceError, listed, quoted
from thawline.dataio.store import files
from thawline.dataio.store.atomic import whole
from thawline.dataio.store.root import Root
from thawline.trainer.errors import CheckpointError

Parts = Mapping[str, Mapping[str, Any]]

FORMAT = 2
_MANIFEST = "manifest.json"
_MANIFEST_BYTES = 16 << 20
"""No manifest is longer; a file of that name that is, is not read."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best of `metric` is never pruned; those that do not have it take no part."""

    metric: str
    higher: bool = False


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that is not gone on from, and why. finished: whether it ever was a whole one of this run."""

    name: str
    reason: str
    finished: bool


@dataclass(frozen=True)
class Whose:
    """What a checkpoint is of. Values as JSON has them; older checkpoints say nothing of it, and are anybody's."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """By name, what a run and its continuation have in common: settings and data."""
    classes: Sequence[str] = ()
    """What the model tells apart, in the order of its outputs."""

    def foreign(self, other: "Whose") -> str:
        """In which of the values that both name the other's run differs from this, in words; "" where in none."""
        ours, theirs = json.loads(json.dumps([dict(self.run), dict(other.run)]))
        names = [name for name in ours if name in theirs and ours[name] != theirs[name]]
        differ = [f"{name} is {quoted(theirs[name])} there and {quoted(ours[name])} here" for name in names[:3]]
        return "; ".join([*differ, *([f"and {len(names) - 3} more"] if len(names) > 3 else [])])


NOBODY = Whose()


@dataclass(frozen=True)
class Part:
    """A file of a checkpoint, as its manifest knows it."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint. metrics: those that were numbers."""

    root: Root
    step: int
    metrics: Mapping[str, float]
    parts: Mapping[str, Part]
    whose: Whose = NOBODY
    content: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """The parts' bytes, read and checked once, where it is to be gone on from; of one that is only counted, nothing."""

    def load(self, part: str) -> dict[str, Any]:
        """One part, tensors on the CPU.

        Raises CheckpointError for a part that is missing, carries code or is no dictionary.
        """
        try:
            if part not in self.content:
                raise _UnfitError(f"its manifest lists no part {part}")
            content = torch.load(io.BytesIO(self.content[part]), map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise _UnfitError(f"it holds a {type(content).__name__}")
            return content
        except Exception as error:  # torch.load raises whatever foreign bytes make it stumble over
            why = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{self.root.full(f'{part}.pt')} cannot be read ({why}): nothing can go on from it; remove "
                f"{self.root} to go on from the one before it"
            ) from error

    def with_content(self) -> "Saved":
        """The same with all its bytes. Raises _UnfitError for other bytes than were written; OSError."""
        return replace(self, content={name: self._read(part) for name, part in self.parts.items()})

    def _read(self, part: Part) -> bytes:
        data = self.root.read(part.file)
        if len(data) != part.bytes or hashlib.sha256(data).hexdigest() != part.sha256:
            raise _UnfitError(f"{part.file} changed since it was written")
        return data


class _UnfitError(Exception):
    """Why a checkpoint is not gone on from. finished: see Skipped."""

    def __init__(self, reason: str, *, finished: bool = True) -> None:
        super().__init__(reason)
        self.finished = finished


# Writing --------------------------------------------------------------------------------------------------


def save(
    root: str | Path | Root,
    step: int,
    parts: Parts,
    *,
    keep: int,
    metrics: Mapping[str, float] | None = None,
    best: Best | None = None,
    whose: Whose = NOBODY,
) -> str:
    """Write checkpoint `step` below `root`, whole or not at all; then remove all but the newest `keep` and the best.

    One that stands there under this step is replaced in one move. Returns the checkpoint's folder.
    Raises CheckpointError when the storage refuses; what was there before is untouched.
    """
    root = Root.of(root)
    name = name_of(step)
    consequence = "a kill now would cost the steps since the last one; make room or mend the storage"
    with _refusals(f"checkpoint {root.child(name)}", consequence):
        _write(root, name, step, parts, metrics or {}, whose)
    prune(root, step, keep=keep, best=best, whose=whose)
    return root.child(name).text


def save_model(root: str | Path | Root, name: str, parts: Parts, *, step: int = 0, whose: Whose = NOBODY) -> str:
    """Write ROOT/NAME in the format of a checkpoint, whole or not at all, in place of what stood there; its folder.

    Raises CheckpointError when the storage refuses, or for a name that no folder can have.
    """
    root = Root.of(root)
    name = _folder_name(name)
    with _refusals(f"{root.child(name)}", "what stood there before is untouched; make room or give another name"):
        _write(root, name, step, parts, {}, whose)
    return root.child(name).text


def _write(root: Root, name: str, step: int, parts: Parts, metrics: Mapping[str, float], whose: Whose) -> None:
    """The parts beside those that stand there, the manifest over the old one, and then away with the old parts."""
    folder = root.child(name)
    old = _prepare(root, name)
    written: dict[str, dict[str, Any]] = {}
    try:
        for part, content in parts.items():
            file = next(file for file in (f"{part}.pt", f"{part}-1.pt") if file not in old)
            with whole(folder, file, digest=hashlib.sha256) as sink:
                torch.save(content, cast(IO[bytes], sink))
            written[part] = {"file": file, "bytes": sink.bytes, "sha256": sink.digest.hexdigest()}
        numbers = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        about = {"format": FORMAT, "step": step, "metrics": numbers, "parts": written}
        with whole(folder, _MANIFEST) as sink:
            sink.write(_manifest({**about, "run": dict(whose.run), "classes": list(whose.classes)}))
    except Exception:
        with contextlib.suppress(OSError):
            _prepare(root, name)
        raise
    for file in old:
        with contextlib.suppress(OSError):
            folder.remove(file)


def _prepare(root: Root, name: str) -> set[str]:
    """Remove all but a checkpoint that stands there; its parts' files. Raises OSError."""
    folder = root.child(name)
    if _is_link(folder):
        root.remove(name)
    there = folder.listing()
    try:
        old = {part.file for part in _look(folder).parts.values()}
    except _UnfitError:
        _remove(root, name)
        return set()
    for file in there.keys() - old - {_MANIFEST}:
        folder.remove(file)
    return old


@contextmanager
def _refusals(what: str, consequence: str) -> Iterator[None]:
    """Turn a storage's errors into a sentence; others pass. torch.save hides what a storage said behind its own."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError | SourceError | pa.ArrowException):
            cause = cause.__context__
        if not isinstance(cause, Exception):
            raise
        raise CheckpointError(f"{what} cannot be written ({files.why_refused(cause)}): {consequence}") from error


def _manifest(about: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest: text that is not exactly this was changed."""
    digest = hashlib.sha256(json.dumps(about, indent=1).encode()).hexdigest()
    return f"{json.dumps({**about, 'sha256': digest}, indent=1)}\n".encode()


def prune(root: str | Path | Root, step: int, *, keep: int, best: Best | None = None, whose: Whose = NOBODY) -> None:
    """Remove all up to `step` but the newest `keep` and the best. Later ones, and those that say so, are another run's:
    not ours to count or to remove.

    A damaged one goes when it is older than those kept, an unfinished one at once. A storage that refuses is logged.
    """
    root = Root.of(root)
    try:
        _prune(root, keep, step, best, whose)
    except (OSError, pa.ArrowException) as error:
        log.warning("old checkpoints in %s cannot be removed (%s)", root, files.why_refused(error))


def _prune(root: Root, keep: int, step: int, best: Best | None, whose: Whose) -> None:
    found = (name for name, size in root.listing().items() if size is None)
    steps = sorted((number for name in found if (number := _step(name)) is not None and number <= step), reverse=True)
    fit, unfinished, foreign = list[Saved](), set[int](), set[int]()
    for number in steps:
        try:
            saved = _look(root.child(name_of(number)))
            if whose.foreign(saved.whose):
                foreign.add(number)
            else:
                fit.append(saved)
        except _UnfitError as error:
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
    """The step of the best, the later of two equals; none where nobody measured."""
    sign = 1 if best.higher else -1
    ranked = [(sign * each.metrics[best.metric], each.step) for each in saved if best.metric in each.metrics]
    return {max(ranked)[1]} if ranked else set()


def _remove(root: Root, name: str) -> None:
    """Remove a checkpoint, its manifest first: what a kill leaves is unfinished, not damaged. Raises OSError.

    Of a link only itself: what lies behind it is somebody else's.
    """
    folder = root.child(name)
    if not _is_link(folder):
        folder.remove(_MANIFEST)
    root.remove(name)


def _is_link(folder: Root) -> bool:
    return not folder.remote and folder.folder.is_symlink()


# Reading --------------------------------------------------------------------------------------------------


def newest(root: str | Path | Root, *, whose: Whose = NOBODY) -> tuple[Saved | None, list[Skipped]]:
    """The newest checkpoint whose every byte is as it was written, or None; and the newer ones that are not so, or are
    of another run than `whose`.

    Raises CheckpointError when the storage does not answer: what it holds is then unknown, which is not nothing.
    """
    root = Root.of(root)
    skipped = list[Skipped]()
    try:
        names = [name for name in root.listing() if name.startswith("step_")]
        for name in sorted(names, key=lambda name: (len(name), name), reverse=True):
            try:
                return _checked(root, name, whose), skipped
            except _UnfitError as error:
                skipped.append(Skipped(name, str(error), error.finished))
    except (OSError, SourceError, pa.ArrowException) as error:
        raise CheckpointError(
            f"the checkpoints in {root} cannot be listed or read ({files.why_refused(error)}): going on without them "
            "would begin the run anew; see that the storage answers, and start again"
        ) from error
    return None, skipped


def load_model(root: str | Path | Root, name: str) -> Saved:
    """What `save_model` wrote as ROOT/NAME. Raises CheckpointError when it is not there, or has changed."""
    root = Root.of(root)
    folder = root.child(_folder_name(name))
    try:
        there = root.listing()
        if name not in there:
            raise _UnfitError(f"it does not exist; there {f'are {listed(sorted(there))}' if there else 'is nothing'}")
        return _look(folder).with_content()
    except (_UnfitError, OSError, SourceError, pa.ArrowException) as error:
        why = str(error) if isinstance(error, _UnfitError) else files.why_refused(error)
        raise CheckpointError(
            f"{folder} cannot be loaded ({why}): no weights were changed; give the name of what was saved"
        ) from error


def _checked(root: Root, name: str, whose: Whose) -> Saved:
    """A checkpoint, every byte of it read. Raises _UnfitError; OSError when a store does not answer."""
    folder = root.child(name)
    try:
        if _is_link(folder):
            raise _UnfitError("it is a link, and what lies behind it may be another run's")
        saved = _look(folder)
        if _step(name) is None or name != name_of(saved.step):
            raise _UnfitError(f"it holds step {saved.step}")
        if foreign := whose.foreign(saved.whose):
            raise _UnfitError(f"it is another run's ({foreign})", finished=False)
        return saved.with_content()
    except OSError as error:
        if root.remote and not isinstance(error, FileNotFoundError):
            raise
        raise _UnfitError(f"it cannot be read ({files.why_refused(error)})") from error


def _look(folder: Root) -> Saved:
    """A checkpoint by its manifest and its files' sizes; the parts are not read. Raises _UnfitError; OSError."""
    there = folder.listing()
    if _MANIFEST not in there:
        raise _UnfitError(f"it was not finished: there is no {_MANIFEST}", finished=False)
    size = there[_MANIFEST]
    if size is None or size > _MANIFEST_BYTES:
        raise _UnfitError(f"its {_MANIFEST} is no file" if size is None else f"its {_MANIFEST} has {size:,} bytes")
    about = _understood(folder.read(_MANIFEST))
    try:
        parts = {name: Part(**part) for name, part in about["parts"].items()}
        whose = Whose(dict(about.get("run", {})), tuple(map(str, about.get("classes", ()))))
        saved = Saved(folder, operator.index(about["step"]), about["metrics"], parts, whose)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _UnfitError(f"its {_MANIFEST} lacks what belongs there ({error})") from error
    if not parts:
        raise _UnfitError("it lists no parts")
    for part in parts.values():
        found = there.get(part.file)
        if found != part.bytes:
            raise _UnfitError(
                f"{part.file} is missing"
                if part.file not in there
                else f"{part.file} is no file"
                if found is None
                else f"{part.file} has {found:,} bytes of {part.bytes:,}"
            )
    return saved


def _understood(data: bytes) -> dict[str, Any]:
    """A manifest's content. Raises _UnfitError when its text is not exactly what a writer of this format wrote."""
    try:
        about = json.loads(data)
        wanted = about.get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise _UnfitError(f"its {_MANIFEST} cannot be understood ({type(error).__name__})") from error
    if wanted != FORMAT:
        raise _UnfitError(f"its format is {wanted}, and this thawline reads {FORMAT}")
    if _manifest({key: value for key, value in about.items() if key != "sha256"}) != data:
        raise _UnfitError(f"its {_MANIFEST} changed since it was written")
    return dict(about)


def name_of(step: int) -> str:
    """What the folder of a step's checkpoint is called."""
    return f"step_{step:08d}"


def _step(name: str) -> int | None:
    """The step of a folder that `save` would call so."""
    number = name.removeprefix("step_")
    return int(number) if number.isdecimal() and name == name_of(int(number)) else None


def _folder_name(name: str) -> str:
    if not name.strip(" .") or not name.isprintable() or {*name} & {*"/\\"}:
        raise CheckpointError(
            f"name={quoted(name)!r} cannot be a folder's: nothing was written or read; give one like 'stage-1'"
        )
    return name
