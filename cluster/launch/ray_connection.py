"""How does a driver come to a Ray? It starts one for this run alone, which ends with it, or connects to a cluster's.

Nothing here knows Ray Train.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from thawline.cluster.errors import LaunchError, last_line
from thawline.cluster.job.job import Job
from thawline.cluster.jobs import token
from thawline.cluster.launch.board import NAMESPACE
from thawline.cluster.run.signals import ignoring_hangup
from thawline.cluster.words import quoted
from thawline.dataio.cores import usable_cores

_END_S = 5.0
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the machine unasked
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `Drains` does it, without a process of its own
}
_QUIET = {
    # Of a Ray that serves one run and that nobody looks into: its processes share the cores with those that train.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
}


@contextlib.contextmanager
def connected(job: Job, address: str, folder: Path) -> Iterator[None]:
    """With Ray, until the block ends. folder: of this run's alone. Raises LaunchError."""
    local = address == "local"
    start_s = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{job.cluster.start_s:g}"}
    for name, value in {**_SETTINGS, **(_QUIET if local else {}), **start_s}.items():
        os.environ.setdefault(name, value)
    if not local:
        token.use_token()
    with token.own_token() if local else contextlib.nullcontext():
        import ray

        if ray.is_initialized():
            raise LaunchError(
                "Ray runs in this process already (ray.init was called): a run starts and ends one of its own, or "
                "connects to a cluster; call ray.shutdown() first, or train in another process"
            )
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
        if local:
            options |= {"num_cpus": max(job.most_workers, usable_cores()), "include_dashboard": False}
        # Ray puts the folder it is started from first on its workers' path: a user's models/ would shadow ours.
        with contextlib.chdir(folder), ignoring_hangup():
            try:
                ray.init(address=address, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                if "ersion mismatch" in str(error):
                    raise LaunchError(
                        f"{sys.executable} has another Ray or Python than the cluster "
                        f"({' '.join(str(error).split())}): nothing can be trained there with it; start the head and "
                        "the nodes with the environment that jobs run in first on PATH"
                    ) from error
                raise LaunchError(
                    f"no Ray cluster answers at {quoted(address)} ({last_line(error)}): nothing can be trained there; "
                    "start one with `ray start --head`, or give its address"
                ) from error
        try:
            _hush()
            if local:
                _end_idle_processes()
            yield
        finally:
            with _none_left() if local else contextlib.nullcontext():
                ray.shutdown()


@contextlib.contextmanager
def surroundings(folder: Path, *, local: bool) -> Iterator[None]:
    """What Ray asks the environment for. Its own sockets and logs, of a Ray that this run starts, lie in `folder`.

    Where a cluster is that runs already is told by the folder that it was started with. Ray Train asks for the user's
    home when it is imported, and ends where there is none: then that is `folder`, too.
    """
    wanted = {"RAY_TMPDIR": str(folder)} if local and not os.environ.get("RAY_TMPDIR") else {}
    try:
        Path.home()
    except RuntimeError:  # no HOME, and the user has no name to look it up by
        wanted["HOME"] = str(folder)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]


def _hush() -> None:
    """What Ray says of workers that died, in yellow and on stdout, is said by the board in a sentence."""
    import ray

    worker = ray._private.worker.global_worker
    worker.threads_stopped.set()
    worker.gcs_error_subscriber.close()
    worker.listener_thread.join()
    worker.threads_stopped.clear()


def _end_idle_processes() -> None:
    """Of this run's own Ray: its log monitor and its autoscaler serve nobody."""
    import ray

    node = ray._private.worker._global_node
    node.kill_log_monitor()
    node.kill_monitor()


@contextlib.contextmanager
def _none_left() -> Iterator[None]:
    """End what is left of this run's own Ray when the block ends: its processes at times deadlock in their ends."""
    import ray

    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):  # it died, and what it had started ends with it
        started = psutil.Process(raylet).children(recursive=True)
    yield
    for each in psutil.wait_procs(started, timeout=_END_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
