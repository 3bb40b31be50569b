"""What can be typed about jobs on a cluster? submit, list, status, logs, stop, token.

Data goes to stdout, everything else to stderr. Exit 0: done, or finished; 143 (130 by Ctrl-C): the job stopped with a
checkpoint; 1: it failed, or ended without one; 2: misuse; and from `status`, 3: still under way.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from thawline.cluster.cli.verbs import Flag, JobVerb, Verb
from thawline.cluster.words import as_json, printable, say

if TYPE_CHECKING:
    from thawline.cluster.jobs.client import Attempt, Cluster

_ADDRESS = "RAY_API_SERVER_ADDRESS"
_BEGIN_S = 30.0
_UNDER_WAY = 3

Address = Annotated[str, arg(metavar="URL")]


@dataclass(frozen=True, kw_only=True)
class _NamedJob(Verb):
    """A verb on a job that was submitted."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """The job's name."""
    address: Address = ""
    """The cluster's dashboard; $RAY_API_SERVER_ADDRESS if not given."""


@dataclass(frozen=True, kw_only=True)
class Submit(JobVerb):
    """Train a job on a Ray cluster, or resume it there."""

    address: Address = ""
    """The cluster's dashboard, such as http://127.0.0.1:8265; $RAY_API_SERVER_ADDRESS if not given."""
    follow: Flag = False
    """Show the epoch table until the job is over; the exit status is then the job's."""
    fresh: Flag = False
    """Start over; what is in the run's folder is moved aside."""
    package: Literal["ship", "installed"] = "ship"
    """ship: send this machine's thawline along. installed: use the one on the cluster's machines."""

    def run(self) -> int:
        """Print the result as JSON where the job has ended."""
        from thawline.cluster.job.recipes import image_spec

        image_spec(self.fields)
        cluster = _cluster(self.address)
        attempt = cluster.submit(self.fields, package=self.package, fresh=self.fresh)
        say(f"submitted as {attempt.id} to {cluster.address}")
        if self.follow:
            return _follow(cluster, attempt)
        return _wait_until_begun(cluster, attempt)


@dataclass(frozen=True, kw_only=True)
class List(Verb):
    """List the jobs of a cluster, running and past: the last attempt of each."""

    address: Address = ""
    """The cluster's dashboard, such as http://127.0.0.1:8265; $RAY_API_SERVER_ADDRESS if not given."""

    def run(self) -> int:
        """Print a table."""
        latest = {attempt.name: attempt for attempt in _cluster(self.address).attempts()}
        log_records = [("name", "attempt", "state", "began", "lasted"), *map(_listed, latest.values())]
        widths = [max(len(row[column]) for row in log_records) for column in range(5)]
        for row in log_records:
            print(printable("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()))
        return 0


@dataclass(frozen=True, kw_only=True)
class Status(_NamedJob):
    """Show a job's progress as a line of JSON. Exit 0 finished, 143 stopped (130 by Ctrl-C), 1 failed, 3 under way."""

    def run(self) -> int:
        """Print it."""
        cluster = _cluster(self.address)
        from thawline.cluster.jobs.client import outcome

        attempt = cluster.attempt(self.name)
        records = _records(cluster, attempt)
        shown: dict[str, Any] = {"name": self.name, "attempt": attempt.number, "state": attempt.state}
        for kind, columns in (("train", ("step", "epoch", "loss", "images_per_s")), ("valid", None)):
            last = next((row for row in reversed(records) if row["kind"] == kind), None)
            if last is not None:
                from thawline.cluster.observe.console import metric_names

                names = columns or ("valid_loss", *metric_names(last))
                shown |= {column: last[column] for column in names if column in last}
        if not attempt.over:
            print(as_json(shown))
            return _UNDER_WAY
        code, sentence = outcome(attempt, _end(records))
        print(as_json(shown | {"outcome": sentence}))
        return code


@dataclass(frozen=True, kw_only=True)
class Logs(_NamedJob):
    """Show what a job has printed: its rows, and everything else."""

    follow: Flag = False
    """Show new lines until the job is over; the exit status is then the job's."""

    def run(self) -> int:
        """Print it."""
        cluster = _cluster(self.address)
        attempt = cluster.attempt(self.name)
        if self.follow:
            return _follow(cluster, attempt, everything=True)
        from thawline.cluster.jobs import log_records

        for line in cluster.lines(attempt, follow=False):
            row = log_records.decode(line)
            print(printable(line if row is None else _plain(row)))
        return 0


@dataclass(frozen=True, kw_only=True)
class Stop(_NamedJob):
    """Stop a job at the end of its window, with a checkpoint; submitted again, it goes on from there."""

    now: Flag = False
    """Stop it within seconds, without a checkpoint."""

    def run(self) -> int:
        """0 where it stopped as asked."""
        cluster = _cluster(self.address)
        from thawline.cluster.jobs.client import STOPPED, outcome

        attempt = cluster.stop(self.name, now=self.now)
        say(f"asked {attempt.id} to stop{'' if self.now else ' at the end of its window, with a checkpoint'}")
        while not attempt.over:
            time.sleep(0.2)
            attempt = cluster.attempt(self.name)
        code, sentence = outcome(attempt, _end(_records(cluster, attempt)))
        say(sentence)
        return 0 if self.now or code in STOPPED else code


@dataclass(frozen=True, kw_only=True)
class Token(Verb):
    """Show where this user's token for clusters comes from."""

    create: Flag = False
    """Make one, readable by this user alone, where there is none."""

    def run(self) -> int:
        """Print it."""
        from thawline.cluster.jobs import token

        if self.create:
            print(token.create_token())
            return 0
        token.use_token()
        print(token.source())
        return 0


# What they share ------------------------------------------------------------------------------------------------


def _cluster(address: str) -> "Cluster":
    """The cluster that is meant. Raises TokenError, SubmitError."""
    from thawline.cluster.errors import SubmitError
    from thawline.cluster.jobs.client import Cluster

    url = address or os.environ.get(_ADDRESS)
    if not url:
        raise SubmitError(f"no cluster is named: there is nobody to ask; give --address URL, or set {_ADDRESS}")
    return Cluster(url)


def _records(cluster: "Cluster", attempt: "Attempt") -> list[dict[str, Any]]:
    from thawline.cluster.jobs import log_records

    return [row for line in cluster.lines(attempt, follow=False) if (row := log_records.decode(line)) is not None]


def _end(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((row for row in reversed(records) if row["kind"] == "end"), None)


def _wait_until_begun(cluster: "Cluster", attempt: "Attempt") -> int:
    """Wait until the job's driver has checked the job and the cluster, so that a mistake is reported here."""
    deadline = time.monotonic() + _BEGIN_S
    while time.monotonic() < deadline:
        records = _records(cluster, attempt)
        attempt = cluster.attempt(attempt.name)
        if attempt.over:
            return _ended(attempt, _end(_records(cluster, attempt)))
        if any(row["kind"] == "begun" for row in records):
            break
        time.sleep(0.5)
    watch = f"thawline logs {attempt.name} --address {cluster.address} --follow"
    say(f"it runs there; `{watch}` watches")
    return 0


def _follow(cluster: "Cluster", attempt: "Attempt", *, everything: bool = False) -> int:
    """Show an attempt's rows until it is over; with `everything`, all else that it prints, too."""
    from thawline.cluster.jobs import log_records
    from thawline.cluster.observe.console import Console

    console, end = Console(), None
    try:
        for line in cluster.lines(attempt, follow=True):
            row = log_records.decode(line)
            if row is not None:
                console.show([row])
                end = row if row["kind"] == "end" else end
            elif everything:
                console.say(line)
    except KeyboardInterrupt:
        say(
            f"\n{attempt.name} goes on without you; `thawline logs {attempt.name} --follow` watches again, "
            f"`thawline stop {attempt.name}` ends it"
        )
        return 130
    finally:
        console.close()
    while not attempt.over:
        attempt = cluster.attempt(attempt.name)
        time.sleep(0.1)
    return _ended(attempt, end)


def _ended(attempt: "Attempt", end: Mapping[str, Any] | None) -> int:
    """Say how an attempt ended, by the last record of its log. Returns the exit status."""
    from thawline.cluster.jobs.client import outcome

    code, sentence = outcome(attempt, end)
    say(f"{'thawline: ' if code else ''}{sentence}")
    if end is not None and end["status"] == "finished":
        print(as_json({"run": attempt.name, **end["metrics"], "stream_hash": end["stream_hash"]}))
    return code


def _plain(row: Mapping[str, Any]) -> str:
    """A row as a line of text."""
    if row["kind"] == "note":
        return str(row["text"])
    cells = [f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()]
    return " ".join(cells)


def _listed(attempt: "Attempt") -> tuple[str, str, str, str, str]:
    began = "" if attempt.began_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.began_s))
    seconds = 0.0 if attempt.began_s is None else (attempt.ended_s or time.time()) - attempt.began_s
    return attempt.name, str(attempt.number), attempt.state, began, f"{seconds:.0f} s"
