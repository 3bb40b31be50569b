"""How is a remote cluster used? Submit, list, status, logs and stop, over Ray Jobs.

A job is identified by its name. Each submission is an attempt, which Ray calls NAME.1, NAME.2 and so on; the next one
goes on from the run's folder where the last one stopped. Ray Jobs runs shell commands: ours is always the same
(`python -m thawline.cluster.driver`), and the job is sent as TOML in a working directory that holds nothing else.
"""

import asyncio
import contextlib
import logging
import re
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from uuid import uuid4

import thawline
from thawline.cluster.driver import JOB_FILE, TRUST
from thawline.cluster.errors import SubmitError, TokenError, last_line
from thawline.cluster.job import job as jobs
from thawline.cluster.job.job import Job
from thawline.cluster.jobs import log_records, token
from thawline.cluster.messenger import NOT_RUNNING
from thawline.cluster.words import quoted
from thawline.dataio.store.private import scratch
from thawline.models import code

Package = Literal["ship", "installed"]
"""Whether the code of this machine is sent with the job, or thawline is installed on the cluster's nodes."""

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit statuses of a driver whose run stopped at a checkpoint: see signals.exit_status."""

_NEEDED = (
    *("torch", "torchvision", "torchmetrics", "ray", "pyarrow", "numpy", "PIL", "xxhash", "tyro", "tomli_w"),
    *("prometheus_client", "psutil", "rich", "matplotlib", "jinja2"),
)
_MISSING = 87
"""Exit status of an attempt whose machine has no thawline; Python never exits so."""
_NO_PYTHON = 127
"""A shell's exit status for an unknown command."""
_LACKS = (
    "{python} on {host}, which is the Python that this cluster runs jobs with, lacks {lacks}: nothing can be trained "
    "with it; start the head and the nodes with thawline's environment first on PATH, whichever `ray` starts them, or "
    "install what is missing there"
)
_PROBE = f"""
import importlib.util as u, json, os, socket, sys
spec = u.find_spec("thawline")
if not (spec and spec.origin and os.path.exists(os.path.join(os.path.dirname(spec.origin), "cluster", "driver.py"))):
    sys.exit({_MISSING})
lacks = [name for name in {_NEEDED} if not u.find_spec(name)]
if lacks:
    sentence = {_LACKS!r}.format(python=sys.executable, host=socket.gethostname(), lacks=", ".join(lacks))
    print({log_records.MARK!r} + json.dumps(dict(kind="end", status="failed", error=sentence)))
    sys.exit(1)
"""
"""Runs before the driver, with the standard library alone: which Python is this, and can it train?"""
_CONNECT_S = 5.0
_AGAIN_S = 1.0
_SILENT_S = 120.0
_KEY = "thawline"
"""The key of the job's name in the metadata of Ray's job."""


@dataclass(frozen=True)
class Attempt:
    """One submission of a job."""

    id: str
    name: str
    number: int
    state: Literal["pending", "running", "stopped", "succeeded", "failed"]
    """Ray's; and "stopped" for a driver with such an exit status, which Ray calls failed."""
    exit_code: int | None
    message: str
    began_s: float | None
    """Unix time."""
    ended_s: float | None

    @property
    def over(self) -> bool:
        """Whether the attempt has ended."""
        return self.state not in ("pending", "running")


class Cluster:
    """A Ray cluster's job server, at the URL of its dashboard such as http://127.0.0.1:8265."""

    def __init__(self, address: str) -> None:
        """Raises TokenError without the cluster's token; SubmitError when nothing responds there."""
        token.use_token()
        url = urlsplit(address)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise SubmitError(
                f"address={quoted(address)} is no URL of a Ray dashboard: there is nobody to ask; give one such as "
                "http://127.0.0.1:8265"
            )
        self.address = address.rstrip("/")
        try:
            # Ray's own client would wait for minutes where packets are dropped.
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname, port), timeout=_CONNECT_S).close()
        except OSError as error:
            raise self._silent(error.strerror or str(error)) from error
        self._client = self._open()

    def _open(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        with self._refusals():
            client = JobSubmissionClient(self.address)
        for handler in logging.getLogger("ray").handlers:  # its modules log every upload, whatever level is set
            handler.setLevel(logging.WARNING)
        return client

    def submit(self, job: Job, *, package: Package = "ship", fresh: bool = False) -> Attempt:
        """Send a job, its paths unchanged, and return the attempt that Ray has accepted.

        fresh: the run begins anew, and the content of its folder is moved aside. Code that the job names goes along
        where it lies in the working folder, and is trusted there: whoever has read the job has asked.
        Raises SubmitError when a job of that name is already running there.
        """
        before = [attempt for attempt in self.attempts() if attempt.name == job.name]
        running = [attempt for attempt in before if not attempt.over]
        if running:
            raise SubmitError(
                f"a job called {job.name!r} is {running[0].state} on {self.address} already: two would overwrite each "
                f"other's run; `thawline logs {job.name} --follow` watches it, `thawline stop {job.name}` ends it, "
                "or give another --name"
            )
        number = max((attempt.number for attempt in before), default=0) + 1
        submission = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', job.name)}.{number}"
        with scratch() as folder, self._refusals():
            environment = _environment(folder, job, package)
            trusted = [shlex.quote(f"{TRUST}{name}") for name in jobs.code_of(job).values()]
            options = " ".join(["", *(["--fresh"] if fresh else []), *trusted])
            entry = f"python -c {shlex.quote(_PROBE)} && exec python -m thawline.cluster.driver{options}"
            self._client.submit_job(
                entrypoint=entry, submission_id=submission, runtime_env=environment, metadata={_KEY: job.name}
            )
        return self.attempt(job.name)

    def attempts(self) -> list[Attempt]:
        """All attempts of thawline's jobs that the cluster remembers, in the order in which they began."""
        with self._refusals():
            parsed = [_attempt(info) for info in self._client.list_jobs()]
        return sorted(filter(None, parsed), key=lambda attempt: (attempt.began_s or 0.0, attempt.number))

    def attempt(self, name: str) -> Attempt:
        """The last attempt of the job with this name. Raises SubmitError when there is none."""
        attempts = self.attempts()
        of_job = [attempt for attempt in attempts if attempt.name == name]
        if not of_job:
            names = ", ".join(sorted({attempt.name for attempt in attempts})) or "none"
            raise SubmitError(
                f"{self.address} knows no job called {quoted(name)} (jobs there: {names}): nothing to show"
            )
        return max(of_job, key=lambda attempt: attempt.number)

    def lines(self, attempt: Attempt, *, follow: bool) -> Iterator[str]:
        """The lines of an attempt's log: those written so far, or with `follow` until the attempt is over.

        A broken connection is opened again; each line is returned once. Raises SubmitError when the cluster is silent.
        """
        if not follow:
            with self._refusals():
                yield from self._log_lines(attempt)
            return
        returned, last_response_s = 0, time.monotonic()
        while True:
            over = False
            with contextlib.suppress(SubmitError):
                over = self.attempt(attempt.name).over
                last_response_s = time.monotonic()
            try:
                for number, line in enumerate(self._log_lines(attempt) if over else self._tail(attempt)):
                    if number >= returned:
                        returned, last_response_s = number + 1, time.monotonic()
                        yield line
                if over:
                    return
            except _broken():
                pass  # the lines so far are counted
            if time.monotonic() - last_response_s > _SILENT_S:
                raise self._silent(f"it has not responded for {_SILENT_S:.0f} s; the job may still run")
            time.sleep(_AGAIN_S)

    def _log_lines(self, attempt: Attempt) -> list[str]:
        text: str = self._client.get_job_logs(attempt.id)
        return text.removesuffix("\n").split("\n")  # splitlines would split at a record's mark, too

    def _tail(self, attempt: Attempt) -> Iterator[str]:
        """Lines as they are written, from the first. Ends with the connection."""
        loop = asyncio.new_event_loop()
        chunks = self._client.tail_job_logs(attempt.id)
        unfinished = ""
        try:
            while True:
                try:
                    unfinished += loop.run_until_complete(anext(chunks))
                except StopAsyncIteration:
                    return  # an unfinished line is read again
                *lines, unfinished = unfinished.split("\n")
                yield from lines
        finally:
            loop.run_until_complete(chunks.aclose())
            loop.close()

    def stop(self, name: str, *, now: bool = False) -> Attempt:
        """Request a graceful stop, with a checkpoint; or with `now` end it within seconds, without one.

        Returns at once: the attempt ends later. Raises SubmitError when none is running.
        """
        attempt = self.attempt(name)
        if attempt.over:
            raise SubmitError(f"job {name!r} is not running ({attempt.state}): there is nothing to stop")
        with self._refusals():
            if now:
                self._client.stop_job(attempt.id)
                return attempt
            # Ray's own stop kills after three seconds: a messenger asks the driver instead.
            environment = self._client.get_job_info(attempt.id).runtime_env
            messenger = self._client.submit_job(
                entrypoint=f"exec python -m thawline.cluster.messenger {shlex.quote(name)}",
                submission_id=f"{attempt.id}.stop-{uuid4().hex[:8]}",
                runtime_env=environment,
            )
            info = self._client.get_job_info(messenger)
            while not info.status.is_terminal():
                time.sleep(0.2)
                info = self._client.get_job_info(messenger)
            exit_code = info.driver_exit_code
            self._client.delete_job(messenger)
        if exit_code == NOT_RUNNING:
            raise SubmitError(
                f"job {name!r} has no workers yet, so none can save a checkpoint: it goes on; ask again in a moment, "
                "or give --now"
            )
        if exit_code != 0:
            raise SubmitError(
                f"job {name!r} could not be asked to stop ({info.message}): it goes on; ask again, or give --now"
            )
        return attempt

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn errors of Ray's client into sentences."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise self._silent(str(error).splitlines()[0]) from error
        except (RuntimeError, AuthenticationError) as error:
            words = str(error)
            if "Authentication required" in words:
                raise TokenError(
                    f"{self.address} asks for a token and none was sent: the cluster refuses you; copy its token to "
                    f"{token.token_file()} and unset {token.MODE}=disabled"
                ) from error
            if "Authentication failed" in words:
                raise TokenError(
                    f"{self.address} does not know the token in {token.source()}: the cluster refuses you; copy the "
                    "token that it was started with there"
                ) from error
            raise SubmitError(f"{self.address} refused ({last_line(words)}): nothing was done") from error

    def _silent(self, reason: str) -> SubmitError:
        return SubmitError(
            f"no Ray cluster answers at {self.address} ({reason}): nothing was done; check the address and the tunnel "
            "to it (`ssh -L 8265:127.0.0.1:8265 HEAD`), and that the cluster is up"
        )


def outcome(attempt: Attempt, end: Mapping[str, Any] | None) -> tuple[int, str]:
    """The exit status for an attempt, and a sentence on how it ended; `end` is the last record of its log.

    0: finished. One of STOPPED: stopped with a checkpoint. 1: failed, or stopped without one.
    """
    if end is not None and end["status"] == "finished":
        return 0, f"{attempt.name} has finished"
    if end is not None and end["status"] == "stopped":
        code = attempt.exit_code if attempt.exit_code in STOPPED else STOPPED[0]
        return code, f"{attempt.name} stopped at step {end['steps']}, with a checkpoint; submit it again to go on"
    if end is not None:
        return 1, str(end["error"])
    if attempt.exit_code == _MISSING:
        return 1, (
            f"the cluster's machines have no thawline, so {attempt.name} cannot run there: install it on every one of "
            "them, or submit with --package ship"
        )
    if attempt.exit_code == _NO_PYTHON:
        return 1, (
            f"the cluster has no `python` on its PATH, so {attempt.name} cannot run there: start its head with "
            "thawline's environment first on PATH"
        )
    if attempt.state == "stopped":
        return 1, f"{attempt.name} was ended without a checkpoint; submit it again to go on from its last one"
    return 1, f"{attempt.name} ended without a word ({attempt.message}): `thawline logs {attempt.name}` shows its log"


def _environment(folder: Path, job: Job, package: Package) -> dict[str, Any]:
    """The environment of the job's processes: job.toml in the working directory, and our packages if shipped."""
    work = folder / "job"
    work.mkdir()
    (work / JOB_FILE).write_text(jobs.to_toml(job), encoding="utf-8")
    packages = [_copied(place, folder) for place in _places_here(job)]
    if package == "ship":
        left_out = shutil.ignore_patterns("__pycache__", "benchmarks")
        shutil.copytree(Path(thawline.__file__).parent, folder / "thawline", ignore=left_out)  # links are followed
        packages.append(folder / "thawline")
    environment: dict[str, Any] = {"working_dir": str(work)}
    return environment | ({"py_modules": [str(each) for each in packages]} if packages else {})


def _places_here(job: Job) -> list[Path]:
    """The modules and packages in the working folder that the job's code lies in; what is installed, the nodes have."""
    places = {code.place(name) for name in jobs.code_of(job).values()}
    return sorted(place for place in places if place is not None and place.parent == Path.cwd())


def _copied(place: Path, folder: Path) -> Path:
    """A package as Ray takes it; a module becomes one, since Ray Jobs takes no single file."""
    copy = folder / "own" / place.stem
    if place.is_dir():
        shutil.copytree(place, copy, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        copy.mkdir(parents=True)
        shutil.copyfile(place, copy / "__init__.py")
    return copy


def _attempt(info: Any) -> Attempt | None:
    name = (info.metadata or {}).get(_KEY)
    if name is None or info.submission_id is None:
        return None
    return Attempt(
        id=info.submission_id,
        name=name,
        number=int(info.submission_id.rpartition(".")[2]),
        state="stopped" if info.driver_exit_code in STOPPED else info.status.value.lower(),
        exit_code=info.driver_exit_code,
        message=last_line(info.message),
        began_s=info.start_time and info.start_time / 1000,
        ended_s=info.end_time and info.end_time / 1000,
    )


def _broken() -> tuple[type[Exception], ...]:
    """The errors of a broken connection, in Ray's client and its libraries."""
    import aiohttp
    import requests

    return OSError, RuntimeError, aiohttp.ClientError, requests.exceptions.RequestException
