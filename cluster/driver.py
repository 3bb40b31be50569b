"""What does `thawline submit` run on a cluster? A driver: `python -m thawline.cluster.driver`, beside job.toml.

The driver prints the run's rows as records (see log_records) for whoever follows its log, and a last one with the
outcome. The folder that it is started in is Ray's, which unpacks it anew, in its place, for another node of the same
machine: torch cannot be imported from a folder that is gone. So job.toml is read, and then the driver goes to a folder
of its own, before it imports anything large.
"""

import os
import sys
import tomllib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thawline.cluster.errors import USER_ERRORS, LaunchError
from thawline.cluster.jobs import log_records
from thawline.cluster.launch.board import Row
from thawline.cluster.outputs import safe_streams
from thawline.cluster.words import quoted

if TYPE_CHECKING:
    from thawline.cluster.job.job import Job
    from thawline.cluster.observe.discovery import Directory

JOB_FILE = "job.toml"
"""What the driver reads, in the folder that it is started in."""
TRUST = "--trust="


def main() -> int:
    """Train what job.toml says. Exit 0 finished, 1 failed, 143 stopped with a checkpoint (130 by SIGINT).

    With --fresh the run begins anew, and what stands in its folder is moved aside. --trust=NAME, as often as needed, is
    the code that whoever submitted the job has agreed to; job.toml may name no other.
    """
    with safe_streams():
        return _main()


def _main() -> int:
    try:
        job = Path(JOB_FILE).read_text(encoding="utf-8")
        from thawline.dataio.store.private import scratch

        with scratch() as folder:
            os.chdir(folder)
            trusted = [word.removeprefix(TRUST) for word in sys.argv[1:] if word.startswith(TRUST)]
            result = _train(job, fresh="--fresh" in sys.argv[1:], trusted=trusted)
    except Exception as error:
        users = isinstance(error, USER_ERRORS)
        if not users:
            traceback.print_exc()
        sentence = str(error) if users else f"{type(error).__name__}: {error}"
        _tell({"kind": "end", "status": "failed", "error": sentence})
        return 1
    _tell({"kind": "end", **result})
    from thawline.cluster.run.signals import exit_status

    return exit_status() if result["status"] == "stopped" else 0


def _train(text: str, *, fresh: bool, trusted: list[str]) -> dict[str, Any]:
    from thawline.cluster.job import job as jobs
    from thawline.cluster.job.checks import check
    from thawline.cluster.job.recipes import image_spec
    from thawline.cluster.launch import ray_train
    from thawline.cluster.observe.discovery import Directory
    from thawline.cluster.run import folder as storage
    from thawline.cluster.run.loaded import Loaded
    from thawline.cluster.run.signals import stop_on_signal
    from thawline.models.code import notices

    job = check(jobs.from_dict(tomllib.loads(text), source=JOB_FILE, trust_code=trusted))
    for line in notices(jobs.code_of(job).values()):
        _tell({"kind": "note", "text": line})
    image_spec(job)
    loaded = Loaded(job)
    finished = storage.inspect(job, fresh=fresh, loaded=loaded)
    if finished is not None:
        _tell({"kind": "note", "text": f"{storage.run_dir(job)} has finished: this is its result"})
        return finished
    try:
        directory = Directory(host=job.metrics.host, port=job.metrics.sd_port)
    except OSError as error:
        raise LaunchError(
            f"metrics.host={quoted(job.metrics.host)} cannot be listened on ({error.strerror}): Prometheus could not "
            "find the workers; give an address of the cluster's head, or 0.0.0.0"
        ) from error
    with directory:
        watcher = Watcher(job, directory)
        return ray_train.on_ray(
            job,
            device=job.device,
            show=watcher.show,
            stopping=stop_on_signal,
            address="auto",
            fresh=fresh,
            loaded=loaded,
        )


class Watcher:
    """Passes rows on to the log, tells Prometheus where the workers are, and says what a failure cost."""

    def __init__(self, job: "Job", directory: "Directory") -> None:
        self._job, self._directory = job, directory
        self._step = 0

    def show(self, published: list[Row]) -> None:
        """Take the run's rows as they come."""
        for row in published:
            _tell({**row, "targets": self._directory.url} if row["kind"] == "begun" else row)
            if row["kind"] == "targets":
                from thawline.cluster.observe.discovery import entries_of

                self._directory.set(entries_of(self._job.name, str(row["endpoints"]).split()))
            elif row["kind"] == "train":
                self._step = max(self._step, int(row["step"] or 0))
            elif row["kind"] == "resumed" and self._step > (step := int(row["step"] or 0)):
                again = self._step - step
                _tell({"kind": "note", "text": f"{again} steps since that checkpoint were lost and are taken again"})
                self._step = step


def _tell(row: Row | dict[str, Any]) -> None:
    print(log_records.encode(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
