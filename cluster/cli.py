"""What can be typed? `thawline VERB ...`: the verbs, and how their errors reach a person.

Data goes to stdout, talk to stderr; exit 0 done, 1 failed, 2 misuse; of `train`, 143 or 130 where SIGTERM or Ctrl-C
stopped it at a checkpoint. Heavy imports wait inside their verb, so that `thawline --help` answers at once.
"""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from cluster import cli_jobs, outputs, ranks, signals
from cluster.arguments import read_job, save_picture, take, take_flag, take_out
from cluster.job import Job
from cluster.words import Plain, as_json, printable, quoted, say

_EPILOGUE = """\
verbs:
  sample digits|pets DIR            scikit-learn's handwritten digits as JPEGs; the Oxford-IIIT Pet photos
  index SOURCE --out FILE.parquet   a folder, CSV or table of images, here or at a URI -> a manifest
  pack MANIFEST DEST                its images into shards: Arrow files that are read at the speed of memory
  explain JOB                       one sample through every step, with shapes
  show JOB --out FILE.png           a batch as the model sees it
  lr-find JOB [--out FILE.png] ...  which learning rate suits its first phase: four suggestions, and the curve
  train JOB [--workers N] ...       train, or resume, or show a finished run's result; --address auto: on this cluster;
                                    --fresh: begin anew, and move what is in the run's folder aside
  submit JOB --address URL ...      the same on a Ray cluster: [--follow] [--package ship|installed]
  list, status NAME, logs NAME      what runs there, how far it is, what it says: [--follow]
  stop NAME                         end it with a checkpoint; --now: within seconds, without one
  token [--create]                  where this user's token for clusters lies; make one
  doctor                            versions, devices, engines: what works here and what does not

JOB is a TOML file or a manifest. `thawline VERB --help` tells more; --debug shows tracebacks.
"""


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with outputs.forgiving() as stdout, signals.ending_when_interrupted():
        verb, rest = _verb(arguments)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Plain("%(message)s"))
        logging.basicConfig(level=logging.INFO if debug else logging.WARNING, handlers=[handler])
        status = _guarded(lambda: _run_verb(verb, rest), debug=debug)
        if verb != "train":  # a run has ended as it has, whoever hears of it
            status = status or _unheard(verb, stdout)
    sys.exit(status)


def _run_verb(verb: str, arguments: list[str]) -> int:
    from cluster.doctor import shadowed
    from cluster.errors import LaunchError

    intruders = [] if verb == "doctor" else shadowed()  # doctor lists them itself
    if intruders:
        raise LaunchError("; ".join(intruders))
    if verb in _TYPED:
        return int(tyro.cli(_TYPED[verb], args=arguments, prog=f"thawline {verb}"))
    return _ON_JOBS[verb][0](arguments)


def _guarded(action: Callable[[], int], *, debug: bool) -> int:
    """Run a verb; a user's mistake becomes one sentence on stderr and exit code 1."""
    try:
        return action()
    except KeyboardInterrupt:
        print("thawline: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug or not _is_users(error):
            raise
        say(f"thawline: {error}")
        return 1


def _unheard(verb: str, stdout: outputs.Talk) -> int:
    """1 where what a verb had to say is lost, which it tells unless its reader has left."""
    stdout.flush()
    if stdout.why is None:
        return 0
    if not outputs.reader_left(stdout):
        print(
            f"thawline: stdout cannot be written ({outputs.reason(stdout.why)}): what `thawline {verb}` has to say is "
            "lost; send it elsewhere",
            file=sys.stderr,
        )
    return 1


def _is_users(error: Exception) -> bool:
    from cluster.errors import ClusterError, HangError
    from dataio.errors import DataError

    if isinstance(error, ClusterError | DataError | HangError):
        return True
    from cluster.run import USER_ERRORS

    return isinstance(error, USER_ERRORS)


# The verbs ------------------------------------------------------------------------------------------------


def _sample(what: Positional[str], folder: Positional[Path]) -> int:
    """Write sample images to train on.

    Args:
        what: digits: scikit-learn's 1,797 handwritten digits, 96 px. pets: the Oxford-IIIT Pet photos, 0.8 GB to
            fetch; what was interrupted is continued.
        folder: Where to write them: digits as 7_0123.jpg and so on, pets below oxford-iiit-pet.
    """
    from dataio.samples import fetch_pets, write_digits

    if what == "digits":
        count = write_digits(folder)
        say(f"{count} images in {folder}")
        return 0
    if what != "pets":
        say(f"thawline: sample {quoted(what)} is not known: give digits or pets")
        return 2
    with _transfer() as progress:
        images = fetch_pets(folder, progress=progress)
    label = r"--label 'regex:(.+)_\d+\.jpg$'"
    say(f"next: thawline index {shlex.quote(str(images))} {label} --out pets.parquet")
    print(images)
    return 0


@contextmanager
def _transfer() -> Iterator[Callable[[str, int, int | None], None]]:
    """Show how far files have come: a bar on a terminal, a line every tenth elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    known: dict[str, Any] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:

        def show(name: str, done: int, total: int | None) -> None:
            if console.is_terminal:
                if name not in known:
                    known[name] = bar.add_task(name)
                bar.update(known[name], completed=done, total=total)
            elif total and (tenth := 10 * done // total) != known.get(name):
                known[name] = tenth
                say(f"{name}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

        yield show


def _index(
    source: Positional[str],
    *,
    out: str,
    label: str = "parent",
    delimiter: str | None = None,
    classes: str | None = None,
    values: str | None = None,
    swap: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    valid: str = "0.2",
    test: str | None = None,
    seed: int = 42,
    root: str | None = None,
    path_column: str | None = None,
    folder: str = "",
    suffix: str = "",
    column_names: tuple[str, ...] = (),
    folders: tuple[str, ...] = (),
    extensions: tuple[str, ...] = (),
    recursive: bool = True,
    max_bad: float = 0.01,
    separator: str | None = None,
    skip_unlabelled: bool = False,
    max_pixels: int = 120_000_000,
) -> int:
    """Make a manifest: which images there are, what each shows, which are for validation and test.

    Args:
        source: A folder of images, or a CSV, TSV, JSON-lines, Parquet or Arrow file with a column of paths, also
            gzipped; or the URI of one (s3://, gs://, hdfs://).
        out: The manifest to write: .parquet, or .arrow, which opens at once however large.
        label: parent (the folder's name), regex:R (its first group, on the file's name), path-regex:R (on the
            path), column:C (of the CSV or table), mask:TEMPLATE (such as masks/{stem}.png; {parent} and {name} too)
            or mask-column:C, points:x0,y0,x1,y1 (columns) or points-column:C.
        delimiter: Splits a column's value into several labels (multi-label).
        classes: The vocabulary: a,b,c, a .txt file with a class a line, or another manifest, whose classes these
            are; the sorted labels if not given.
        values: The pixel values of a mask's classes, such as 0,255; those that occur if not given.
        swap: Two points that change places in a mirror image, such as left_eye,right_eye, once for each pair; none
            where no point has a side. If not given, images with points are not mirrored.
        valid: A fraction drawn at random, stratified:F, fold:I/K (0/5 to 4/5), stratified-fold:I/K, column:C (true
            or valid, test), or folder:N (a folder of that name).
        test: The same for the test, but no folds; or all. Fractions are of all images; but where one of the two is
            no fraction, the test is picked first and --valid divides the rest.
        seed: Of what is drawn.
        root: Where the paths of a CSV or table start; its own folder if not given.
        path_column: The column of paths; the first if not given.
        folder: Put before every path.
        suffix: Put behind every path, such as .jpg.
        column_names: Of a CSV that does not begin with them.
        folders: Of a folder, look only into these.
        extensions: What images end in, such as png.
        recursive: Look into folders of the folder too.
        max_bad: The share of files that may be unusable; 1 for any.
        separator: Between the columns of a CSV, such as ';' or tab; found if not given.
        skip_unlabelled: Leave out, and count, the images that --label finds no label for.
        max_pixels: Images and masks of more pixels are unusable, and not decoded: 120 megapixels take 360 MB of memory
            each. At most 178,956,970, from where Pillow refuses.
    """
    from cluster.index import described, make_manifest
    from dataio.outputs import check_output

    check_output(out, read=[source, *([classes] if classes else [])])  # before minutes of decoding
    manifest = make_manifest(
        source,
        label=label,
        delimiter=delimiter,
        classes=classes,
        values=values,
        swap=swap,
        valid=valid,
        test=test,
        seed=seed,
        root=root,
        path_column=path_column,
        folder=folder,
        suffix=suffix,
        column_names=column_names,
        folders=folders,
        extensions=extensions,
        recursive=recursive,
        max_bad=max_bad,
        separator=separator,
        skip_unlabelled=skip_unlabelled,
        max_pixels=max_pixels,
    )
    manifest.save(out)
    say(described(manifest))
    print(out)
    return 0


def _pack(
    manifest: Positional[str],
    dest: Positional[str],
    *,
    max_side_px: int | None = None,
    quality: int = 92,
    shard_mib: int = 512,
    max_bad: float = 0.01,
    check: bool = False,
) -> int:
    """Put a manifest's images into shards: large Arrow files that training maps into memory, or fetches once a
    machine from an object store. An interrupted pack goes on when it is started again.

    Args:
        manifest: The manifest, as thawline index made it.
        dest: A folder, or a URI such as s3://bucket/photos; manifest.arrow in it is what to train on.
        max_side_px: Make larger images smaller, so that their longer side has this many pixels.
        quality: Of the JPEGs that become smaller.
        shard_mib: Size of a shard, about.
        max_bad: Share of the images that may turn out missing or changed since they were indexed.
        check: Write nothing: read what was packed there and report damage (exit 1).
    """
    from cluster.pack import MANIFEST, check_shards, pack_shards
    from dataio import files

    if check:
        damages = check_shards(manifest, dest)
        say("\n".join([*damages, f"{len(damages)} damages" if damages else "whole"]))
        return 1 if damages else 0
    packed = pack_shards(manifest, dest, max_side_px=max_side_px, quality=quality, shard_mib=shard_mib, max_bad=max_bad)
    say(packed.summary())
    print(files.below(packed.home, MANIFEST))
    return 0


def _explain(arguments: list[str]) -> int:
    from cluster.run import side_loaders
    from dataio.explanation import explain

    job = read_job(arguments, "explain")
    print("\n\n".join(printable(explain(loader)) for loader in side_loaders(job, _alone(job))))
    return 0


def _show(arguments: list[str]) -> int:
    from cluster.run import side_loaders
    from cluster.storage import spare_images
    from dataio.explanation import show_batch

    out, rest = take_out(arguments)
    if out is None:
        say("thawline show: give --out FILE.png")
        return 2
    job = read_job(rest, "show")
    spare_images(out, job)
    first, *_ = side_loaders(job, _alone(job))
    save_picture(show_batch(first, rows=4, cols=8), out)
    print(out)
    return 0


def _lr_find(arguments: list[str]) -> int:
    out, rest = take_out(arguments)
    job = read_job(rest, "lr-find")
    from cluster.phases import phases
    from cluster.run import job_learner
    from cluster.storage import spare_images
    from trainer.lr_find import lr_find
    from trainer.schedule import Find

    spare_images(out, job)
    given = job.phases[0].lr if job.phases and job.phases[0].lr is not None else job.fit.lr
    # Of two rates the ratio stays and the higher one is looked for; a single one is replaced, whatever it is.
    lr: tuple[float, float] | Literal["find"] = (given[0] / given[1], 1.0) if isinstance(given, tuple) else "find"
    tables = (replace(job.phases[0], lr=lr), *job.phases[1:]) if job.phases else ()
    first = phases(replace(job, phases=tables, fit=replace(job.fit, lr=lr)))[0]
    say(f"training in phase {first.name!r} while lr grows, and taking it back")
    with closing(job_learner(job, _alone(job))) as learner:
        ratios = first.lr.rate if isinstance(first.lr, Find) else first.lr
        found = lr_find(learner, lr=ratios, freeze_to=first.freeze_to)
    pair = f"[{lr[0] * found.valley:.2g}, {found.valley:.2g}]" if isinstance(lr, tuple) else f"{found.valley:.2g}"
    say(f"in the job, by the valley: lr = {pair}")
    print(as_json({"phase": first.name, **found.suggestions()}), flush=True)
    if out is not None:
        save_picture(found.plot(), out)
        say(f"the curve is in {out}")
    return 0


def _train(arguments: list[str]) -> int:
    address, rest = take("--address", arguments)
    fresh, rest = take_flag("--fresh", rest)
    # What torchrun starts again is the run that --fresh began.
    fresh = fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    job = read_job(rest, "train")
    from cluster.job import to_toml
    from cluster.preflight import preflight

    place = None if address else ranks.place()
    first = place is None or place.rank == 0
    finished = preflight(job, here=not address, fresh=fresh)
    if finished is not None:
        if first:
            _print_result(job, finished, already=True)
        return 0
    if first:
        say(to_toml(job))
    from cluster.launch import launch

    result = launch(job, address=address or "", fresh=fresh)
    if first:
        _print_result(job, result, already=False)
    return signals.exit_status() if result["status"] == "stopped" else 0


def _print_result(job: Any, result: dict[str, Any], *, already: bool) -> None:
    from cluster.storage import epochs_of, run_dir
    from dataio import files

    folder = run_dir(job)
    if result["status"] == "stopped":
        say(f"stopped at step {result['steps']}; the same command resumes it")
        return
    if already:
        say(f"{folder} has finished: this is its result")
        say("\n".join([epochs_of(folder), *result.get("notes", [])]))
    say(
        f"{result['images_per_s']:,.0f} images/s, {result['data_wait_fraction']:.1%} of the time waiting for data, "
        f"{result['wall_s']:.0f} s in all; see {files.below(folder, 'report.html')}"
    )
    print(as_json({"run": folder, **result["metrics"], "stream_hash": result["stream_hash"]}))


def _doctor(*, storage: str = "runs") -> int:
    """Versions, devices, engines: what works here, what does not, and what to do.

    Args:
        storage: The folder that runs would be written to.
    """
    from cluster.doctor import collect

    checks = collect(storage=storage)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(printable(f"{'ok ' if check.ok else '!! '} {check.name:<{width}}  {check.value}"))
        if check.remedy and not check.ok:
            print(printable(f"    {'':<{width}}  -> {check.remedy}"))
    return 0 if all(check.ok for check in checks) else 1


_TYPED: dict[str, Callable[..., int]] = {
    "sample": _sample,
    "index": _index,
    "pack": _pack,
    "doctor": _doctor,
    "list": cli_jobs.list_jobs,
    "status": cli_jobs.status,
    "logs": cli_jobs.logs,
    "stop": cli_jobs.stop,
    "token": cli_jobs.token,
}
"""Verbs whose signature says what can be typed."""

_ON_JOBS: dict[str, tuple[Callable[[list[str]], int], tuple[str, ...], tuple[str, ...]]] = {
    "explain": (_explain, (), ()),
    "show": (_show, ("--out",), ()),
    "lr-find": (_lr_find, ("--out",), ()),
    "train": (_train, ("--address",), ("--fresh",)),
    "submit": (cli_jobs.submit, ("--address", "--package"), ("--follow", "--fresh")),
}
"""Verbs on a job, whose fields are flags; with options of their own that take a value, and that take none."""


def check_arguments(words: list[str]) -> None:
    """See whether `thawline WORDS` can be understood, and run nothing: for documents that hold such lines.

    Raises SystemExit for misuse (status 2) and for --help (0), and JobError for values out of range.
    """
    verb, rest = _verb(words)
    if verb in _TYPED:

        @wraps(_TYPED[verb])  # tyro reads the signature, and calls this
        def nothing(*_: object, **__: object) -> int:
            return 0

        tyro.cli(nothing, args=rest, prog=f"thawline {verb}")
        return
    _, options, flags = _ON_JOBS[verb]
    for option in options:
        _, rest = take(option, rest)
    for flag in flags:
        _, rest = take_flag(flag, rest)
    read_job(rest, verb, file=Job(manifest="a.parquet"))


def _verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb that comes first, and the rest. Misuse and --help end the process."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: thawline VERB ...\n\n{_EPILOGUE}", end="", file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else 2)
    verb, known = words[0], [*_TYPED, *_ON_JOBS]
    if verb not in known:
        from difflib import get_close_matches

        near = get_close_matches(verb, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(known)}"
        print(f"thawline: {quoted(verb)} is not a verb; {hint}", file=sys.stderr)
        sys.exit(2)
    return verb, words[1:]


def _alone(job: Any) -> Any:
    """The context of a verb that looks at data in this process."""
    from cluster.launch import local_device
    from trainer.context import LocalContext

    return LocalContext(device=local_device(job))


if __name__ == "__main__":
    main()
