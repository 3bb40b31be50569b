"""What comes before a job's own fields on a command line? The file, and the few options that are a verb's own."""

import shlex
import sys
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cluster.errors import JobError
from cluster.job import Job
from cluster.words import cut, quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
"""Endings of what matplotlib can write, and people look at."""


def read_job(arguments: list[str], verb: str, *, file: Job | None = None) -> Job:
    """The job that comes first among the arguments, with the flags after it on top, its paths absolute.

    file: what to take the job's file to hold, unread. Misuse prints its reason and exits 2. Raises JobError.
    """
    from cluster import job as jobs

    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            jobs.override(jobs.Job(), ["--help"])  # prints every field and exits
        print(f"usage: thawline {verb} JOB [--field VALUE ...]; JOB is a .toml or a manifest", file=sys.stderr)
        sys.exit(2)
    if file is None:
        _check_indexed(arguments[0], verb)
    return jobs.resolved(jobs.check(jobs.override(file or jobs.load(arguments[0]), arguments[1:])))


def _check_indexed(given: str, verb: str) -> None:
    """Raises JobError, saying what to give, for a folder or a list of images where a job is wanted."""
    from dataio import lists

    path = Path(given)
    try:
        folder, packed, run = path.is_dir(), (path / "manifest.arrow").is_file(), (path / "job.toml").is_file()
    except (OSError, ValueError) as error:  # too long, or with a NUL
        raise JobError(
            f"{cut(given)} is no name of a file ({cut(str(error))}): give a job (.toml) or a manifest"
        ) from None
    if packed or run:
        what = "manifest.arrow" if packed else "job.toml"
        raise JobError(f"{given} is a folder: {verb} takes the {what} in it; give {path / what}")
    if folder or (lists.is_known(given) and lists.ending(given) not in (".parquet", ".arrow")):
        if not folder:
            lists.check_kind(given)
        how = "" if folder else "--label column:NAME "
        out = f"{path.name.partition('.')[0] or 'images'}.parquet"
        raise JobError(
            f"{given} is a {'folder' if folder else 'list'} and no manifest, so {verb} cannot know its classes and "
            f"splits: index it first: thawline index {shlex.quote(given)} {how}--out {shlex.quote(out)}"
        )


def take(option: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--option VALUE` or `--option=VALUE`, if it is there; and the other arguments."""
    for at, argument in enumerate(arguments):
        if argument == option and at + 1 < len(arguments):
            return arguments[at + 1], arguments[:at] + arguments[at + 2 :]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2], arguments[:at] + arguments[at + 1 :]
    return None, arguments


def take_flag(option: str, arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether `--option` is there; and the other arguments."""
    return option in arguments, [argument for argument in arguments if argument != option]


def take_out(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The picture to write, if there is `--out FILE`: as it will be called, its folder made; and the other arguments.

    Raises JobError for a file that cannot be written, or be a picture by its ending: before the work, not after it.
    """
    given, rest = take("--out", arguments)
    if given is None:
        return None, arguments
    out = Path(given) if Path(given).suffix else Path(f"{given}.png")
    if out.suffix.lower() not in PICTURES:
        raise JobError(
            f"--out {quoted(given)} ends in {out.suffix}, which is no kind of picture: nothing could be drawn; give "
            f"one of {', '.join(PICTURES)}"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        there = out.exists()
        with out.open("ab"):
            pass
        if not there:
            out.unlink()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise JobError(
            f"--out {quoted(given)} cannot be written ({why}): the picture would be lost; give another file"
        ) from error
    return out, rest


def write(figure: "Figure", to: Path | IO[bytes], kind: str | None = None) -> None:
    """Write a figure; a letter of a class's name that the font lacks is drawn as a box, without matplotlib's word.

    kind: such as "png", where `to` has no ending. Raises: OSError.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(to, format=kind, dpi=110)


def save_picture(figure: "Figure", out: Path) -> None:
    """Write it. Raises JobError where the place has become unusable since `take_out` looked."""
    try:
        write(figure, out)
    except OSError as error:
        raise JobError(
            f"{out} cannot be written ({getattr(error, 'strerror', None) or error}): the picture is lost"
        ) from error
