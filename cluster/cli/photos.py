"""What does `thawline train photos/` train on? A manifest in the run's folder, made once from a folder or a list.

What it was made from, and how, stands beside it, written last: a kill before leaves nothing that counts, and the next
call makes the same again.
"""

import json
import tomllib
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from thawline.cluster.cli.index_options import SourceOptions
from thawline.cluster.errors import JobError, StorageError
from thawline.cluster.job.job import Job
from thawline.cluster.launch import ranks
from thawline.cluster.words import quoted, say
from thawline.dataio.errors import DataError

if TYPE_CHECKING:
    from thawline.dataio.store.root import Root
    from thawline.dataio.table.manifest import Manifest

MANIFEST, RECORD = "manifest.parquet", "index.json"
_SHOWN = 3


def is_source(given: str) -> bool:
    """Whether JOB is images, not a job or a manifest: a folder that is no pack or run, a list, or a URI of either."""
    from thawline.dataio.table import lists  # brings pyarrow, for which `--help` need not wait

    suffix = PurePosixPath(given.partition("?")[0]).suffix
    if "://" in given:
        return suffix not in (".toml", ".parquet", ".arrow")
    path = Path(given).expanduser()
    if path.is_dir():
        return not any((path / name).is_file() for name in ("manifest.arrow", "job.toml"))
    return lists.is_known(given) and lists.ending(given) not in (".parquet", ".arrow")


def name_of(source: str) -> str:
    """What a run on a source is called, where nobody says."""
    return Path(source.partition("?")[0]).expanduser().absolute().name.partition(".")[0] or "images"


def indexed(job: Job, source: str, options: SourceOptions, *, fresh: bool) -> str:
    """The manifest of a source in the job's run folder; made there, or as an earlier call has made it.

    fresh: what stands in the folder is moved aside first.
    Raises StorageError where the folder holds a run on another source, or one that was indexed otherwise; DataError
    for whatever `thawline index` would refuse; JobError under torchrun, whose processes would all index.
    """
    from thawline.cluster.run.folder import hold, run_root

    if ranks.place() is not None:
        raise JobError(
            f"{source} under torchrun: each of its processes would index it; index it first, with `thawline index "
            f"{source} --out {job.name}.parquet`, and train on that"
        )
    folder = run_root(job)
    made = {"source": source, "options": json.loads(json.dumps(asdict(options), default=str))}
    with hold(job, fresh=fresh, tell=say):
        there = folder.listing()
        if RECORD not in there:
            _refuse_other_run(folder.text, there)
            _make(folder, source, made, options)
        elif (known := json.loads(folder.read(RECORD))) != made:
            raise StorageError(_other(folder.text, known, made))
        else:
            say(changes(_current(folder), source, options))
        return _current(folder)


def renewed(job: Job, source: str, options: SourceOptions) -> "Manifest | None":
    """A manifest of the source as it is now, or None where nothing has changed since the job's was made.

    Its splits are not those of the run, which goes on from those that it has: see growth.grow.
    """
    from thawline.cluster.cli.index import make_manifest

    return make_manifest(source, **vars(options)) if _found(job.manifest, source, options)[1] else None


def _current(folder: "Root") -> str:
    """The manifest that the run is on: the first, or a later one, where it has gone on with new images since."""
    if "job.toml" not in folder.listing():
        return folder.full(MANIFEST)
    known = PurePosixPath(tomllib.loads(folder.read("job.toml").decode()).get("manifest", MANIFEST)).name
    return folder.full(known if known in folder.listing() else MANIFEST)


def _make(folder: "Root", source: str, made: dict[str, Any], options: SourceOptions) -> None:
    from thawline.cluster.cli.index import described, make_manifest
    from thawline.cluster.run.folder import write_text

    manifest = make_manifest(source, **vars(options))
    manifest.save(folder.full(MANIFEST))
    say(described(manifest))
    write_text(folder, RECORD, json.dumps(made, indent=2) + "\n")


def changes(file: str, source: str, options: SourceOptions) -> str:
    """What of a source is not as it was when the manifest in this file was made from it, in a line.

    Of the images' files only those are read that may have been replaced: see checks.replaced.
    """
    try:
        count, found = _found(file, source, options)
    except DataError as error:
        return f"{source} was indexed before, and cannot be compared with that now: {error}"
    images = f"{count:,} images"
    parts = [f"{len(paths):,} {what} ({_some(paths)})" for what, paths in found.items()]
    if not parts:
        return f"{source} was indexed before: {images}, as they are now"
    return (
        f"WARNING: {source} has changed since it was indexed: {', '.join(parts)}; this run stays with its {images}; "
        "once it has finished, --more EPOCHS goes on with all; or give another --name, or --fresh"
    )


def _found(file: str, source: str, options: SourceOptions) -> tuple[int, dict[str, set[str]]]:
    """How many images a manifest has, and the paths of which are new, gone, replaced, labelled otherwise.

    Raises DataError.
    """
    from thawline.cluster.cli.index import labelled
    from thawline.dataio.checks.replaced import replaced
    from thawline.dataio.store.root import Root
    from thawline.dataio.table.manifest import Manifest

    manifest = Manifest.load(file)
    before, now = (
        dict(zip(rows["path"].to_pylist(), rows["label"].to_pylist(), strict=True))
        for rows in (manifest.rows, labelled(source, **vars(options)).rows)
    )
    written, name = Root.holding(file)
    missing, other = replaced(manifest, since_s=written.changed_s(name))
    found = {
        "new": now.keys() - before.keys(),
        "gone": (before.keys() - now.keys()) | missing,
        "replaced by other files": other & now.keys(),
        # As text: a point that an image does not show is NaN, which is not equal to itself.
        "labelled otherwise": {path for path in before.keys() & now.keys() if repr(before[path]) != repr(now[path])},
    }
    return manifest.rows.num_rows, {what: paths for what, paths in found.items() if paths}


def _some(paths: set[str]) -> str:
    return ", ".join(map(quoted, sorted(paths)[:_SHOWN])) + (", ..." if len(paths) > _SHOWN else "")


def _refuse_other_run(folder: str, there: Collection[str]) -> None:
    if "job.toml" in there or "result.json" in there:
        raise StorageError(
            f"{folder} holds a run that was not made from a folder or a list: its manifest is elsewhere; give "
            "another --name, or --fresh, which moves what is there aside"
        )


def _other(folder: str, known: dict[str, Any], made: dict[str, Any]) -> str:
    before, now = ({"source": each["source"], **each["options"]} for each in (known, made))
    different = [f"{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    return (
        f"{folder} holds a run on images that were indexed otherwise ({'; '.join(different)}): its result would not be "
        "this one's; give another --name, or --fresh, which moves what is there aside"
    )
