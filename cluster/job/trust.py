"""May the code that a job's file names be imported? Only where the reader says so: the file may be a stranger's.

It may be any file, a run's own job.toml among them: folders of runs are shared. What somebody types, or writes into a
program, is trusted.
"""

from collections.abc import Collection, Mapping

from thawline.cluster.errors import JobError
from thawline.cluster.words import quoted

Trust = bool | Collection[str]
"""Whether code that a file names may be imported: any, none, or these `python:` names."""


def check_trusted(named: Mapping[str, str], trusted: Trust, *, source: str) -> None:
    """Raises JobError for code that nobody trusts. named: by field, see job.code_of."""
    for field, name in named.items():
        if trusted is not True and (trusted is False or name not in trusted):
            raise JobError(
                f"{field}={quoted(name)} in {source} names code, which no file may have imported unasked: read that "
                f"code, then give --trust-code, or type --{field.replace('_', '-')} {name}"
            )
