"""What do the verbs have in common? The options of all of them, and how a job is read from its file and its flags.

A verb is a dataclass whose fields are what can be typed, and whose `run` does it. tyro makes the parser and the help.
"""

import io
import os
import re
import shlex
import sys
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, dataclass, field, fields, replace
from inspect import getsource
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from thawline.cluster.errors import JobError
from thawline.cluster.job import job as jobs
from thawline.cluster.job.checks import check
from thawline.cluster.job.flags import on_top, plain_flags
from thawline.cluster.job.job import Job, PhaseJob
from thawline.cluster.job.trust import check_trusted
from thawline.cluster.words import cut, say
from thawline.models.code import look_here, notices

Flag = FlagCreatePairsOff[bool]
"""An option without a value, and without a --no- twin."""


@dataclass(frozen=True, kw_only=True)
class Verb(ABC):
    """What can be typed behind `thawline VERB`."""

    debug: Flag = False
    """Show the traceback of an error, and log more."""

    @abstractmethod
    def run(self) -> int:
        """Do it; the exit status. Raises one of USER_ERRORS."""


@dataclass(frozen=True, kw_only=True)
class JobVerb(Verb):
    """A verb on a job, whose fields are flags."""

    job: Annotated[Positional[str], arg(metavar="JOB")]
    """A job (.toml), or a manifest (.parquet, .arrow), which is a job with all defaults. The flags go on top."""
    trust_code: Flag = False
    """Import the code that JOB names by python:MODULE:NAME; what is typed as a flag is trusted anyway."""
    fields: Annotated[Job, arg(name="")] = field(default_factory=Job)
    """The job itself: its file's, with the flags on top, its paths absolute."""

    def load(self, verb: str) -> Job:
        """The job of the file that JOB names; who asks whether its code is trusted is with_job. verb: as it is typed.

        Raises JobError.
        """
        _check_indexed(self.job, verb)
        return jobs.load(self.job, trust_code=True)


V = TypeVar("V", bound=Verb)


def parse(kind: type[V], words: Sequence[str], *, default: V | None = None) -> V:
    """The verb that these words make, the first of which is its name.

    Misuse prints its reason on stderr and exits 2; --help prints and exits 0.
    """
    args, prog = plain_flags(words[1:]), f"thawline {words[0]}"
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, args=args, prog=prog)
            return tyro.cli(kind, args=args, prog=prog, default=default)
    except SystemExit as ended:
        sys.stderr.write(re.sub(r"\[/?bold\]", "", said.getvalue()))  # tyro does not render what it quotes
        if not ended.code and issubclass(kind, JobVerb) and {"-h", "--help"} & {*args}:
            print(_phases_help())
        raise


def with_job(verb: V, words: Sequence[str], *, file: Job | None = None) -> V:
    """The verb with its job read and checked, if it is one on a job: the file, with the flags among `words` on top.

    file: what to take the job's file to hold, unread. Misuse prints its reason and exits 2. Raises JobError.
    """
    if not isinstance(verb, JobVerb):
        return verb
    if file is None:
        file = verb.load(words[0])
    kind = type(verb)
    required: dict[str, Any] = {
        f.name: tyro.MISSING for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
    }

    def flags(job: Job) -> Job:
        return parse(kind, words, default=kind(**required, fields=job)).fields

    job = jobs.resolved(check(on_top(file, flags)))
    _consent(verb, job, words)
    return replace(verb, fields=job)


def _consent(verb: JobVerb, job: Job, words: Sequence[str]) -> None:
    """Tell what code will be imported. Raises JobError for code that JOB names, unless it is trusted, or typed here."""
    code = jobs.code_of(job)
    if not code:
        return
    typed = {each for each in code.values() if any(word == each or word.endswith(f"={each}") for word in words)}
    check_trusted(code, verb.trust_code or typed, source=verb.job)
    look_here()
    if os.environ.get("RANK", "0").strip() in ("", "0"):  # of torchrun's processes, one tells
        for line in notices(code.values()):
            say(line)


def _phases_help() -> str:
    """The keys of [[phases]], which are a job's but no flags, as their comments describe them."""
    comments = re.findall(r'^    (\w+): .+\n    """(.+)"""$', getsource(PhaseJob), re.MULTILINE)
    width = 2 + max(len(name) for name, _ in comments)
    lines = ["[[phases]] in JOB, not flags: tables of phases that run one after another,"]
    lines += ["each with exactly one of epochs, steps and samples"]
    for name, comment in comments:
        lines += textwrap.wrap(f"  {name:<{width}}{comment}", 80, subsequent_indent=" " * (width + 2))
    return "\n".join(lines)


def _check_indexed(given: str, verb: str) -> None:
    """Raises JobError, saying what to give, for a folder or a list of images where a job is wanted."""
    from thawline.dataio.table import lists

    path = Path(given)
    try:
        folder, packed, run = path.is_dir(), (path / "manifest.arrow").is_file(), (path / "job.toml").is_file()
    except (OSError, ValueError) as error:  # too long, or with a NUL
        raise JobError(
            f"{cut(given)} cannot be the name of a file ({cut(str(error))}): give a job (.toml) or a manifest"
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
