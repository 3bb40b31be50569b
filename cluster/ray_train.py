"""How do Ray Train workers run a job? On a Ray of this run's own, or on a cluster that is there.

The one file that imports ray.train. Ray places the workers and starts them again; what they then do, the run's folder
says. A driver, which is the process that called `on_ray`, shows their rows and passes on requests and warnings.
"""

import contextlib
import itertools
import logging
import os
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster import job as jobs
from cluster import token
from cluster.board import NAMESPACE, Board, Row, board_name
from cluster.errors import LaunchError
from cluster.job import Job
from cluster.room import can_grow, choose_device, needs_of, room
from cluster.storage import Result, run_dir
from dataio.cores import usable_cores

# "cpu:gloo" beside NCCL: ids, flags and errors are gathered on the host, so that they never make a GPU wait.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

Show = Callable[[list[Row]], None]
_ASK_S = 0.5  # also within a validation, which asks once a batch
_WATCH_S = 0.2
_DRAINS_S = 1.0
_SETTINGS = {
    # Ray's own defaults notice a dead worker after seconds; half a second costs nothing measurable.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the machine unasked
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}


@dataclass
class RayContext:
    """A Ray Train worker. See trainer.context.RunContext."""

    run_dir: str | Path
    device: Any
    rank: int
    world_size: int
    local_rank: int
    board: Any
    restarts: int = 0
    _answer: Any = None
    _asked: float = 0.0
    _stop: bool = False
    _taken_at: float | None = None

    def should_stop(self) -> bool:
        """The board's last answer, if it has come: never waits, and asks again at most every `_ASK_S`."""
        self._ask()
        return self._stop

    def taken_at(self) -> float | None:
        """As `should_stop`."""
        self._ask()
        return self._taken_at

    def publish(self, rows: list[Row]) -> None:
        """Send rows on their way."""
        self.board.publish.remote(rows)

    def _ask(self) -> None:
        import ray

        if self._answer is None and time.monotonic() - self._asked >= _ASK_S:
            self._answer, self._asked = self.board.asked.remote(), time.monotonic()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            (self._stop, self._taken_at), self._answer = ray.get(self._answer), None


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs, also after a failure: the run's folder says where to go on."""
    import ray
    import ray.train
    import ray.train.torch

    from cluster.run import USER_ERRORS, run
    from trainer import world

    board, job = config["board"], jobs.from_dict(tomllib.loads(config["job"]))
    result, error = ray.get(board.outcome.remote())
    if result is not None or error is not None:
        return
    here = ray.train.get_context()
    os.environ["LOCAL_WORLD_SIZE"] = str(here.get_local_world_size())
    rank = here.get_world_rank()
    context = RayContext(
        run_dir=run_dir(job),
        device=ray.train.torch.get_device(),
        rank=rank,
        world_size=here.get_world_size(),
        local_rank=here.get_local_rank(),
        board=board,
        restarts=world.gather(ray.get(board.begin.remote()) if rank == 0 else 0)[0],
    )
    try:
        result = run(job, context)
    except USER_ERRORS as failure:
        ray.get(board.fail.remote(failure))
        raise
    if context.rank == 0:
        ray.get(board.finish.remote(result))


def on_ray(
    job: Job,
    *,
    device: str,
    show: Show,
    stopping: Callable[[Callable[[], None]], contextlib.AbstractContextManager[None]],
    address: str = "local",
) -> Result:
    """Train as the job's Ray Train workers, and end with the run.

    device: "cpu" or "cuda"; on a cluster "auto" as well, which takes GPUs where there are enough.
    show: takes the run's rows as they come. stopping: a context in which what it is given is called to ask for a stop.
    address: "local" starts a Ray of this run's own, which ends with it; else of a cluster, "auto" for this machine's.

    Raises LaunchError where the cluster cannot hold the job, or it is running there; USER_ERRORS of the run.
    """
    scratch = tempfile.TemporaryDirectory(prefix="thawline-ray-train-", ignore_cleanup_errors=True)
    with scratch as folder, _connected(job, address, folder):
        import ray

        if address != "local":
            device = choose_device(job, device)
        board = _board(job)
        show([{"kind": "begun", "device": device}])
        with stopping(lambda: board.request_stop.remote()):
            failure = _groups(job, device, board, folder, show)
        result, error = ray.get(board.outcome.remote())
    if error is not None:
        raise error
    if result is None:
        raise LaunchError(
            f"the workers gave up after {job.failures} failures ({_last_line(failure)}): the run stands at its last "
            "checkpoint; start it again with the same name to go on, --debug shows the workers' tracebacks"
        ) from failure
    return result


@contextlib.contextmanager
def _connected(job: Job, address: str, scratch: str) -> Iterator[None]:
    """With Ray, until the block ends."""
    for name, value in {**_SETTINGS, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{job.cluster.start_s:g}"}.items():
        os.environ.setdefault(name, value)
    local = address == "local"
    if not local:
        token.use_token()
    with token.own_token() if local else contextlib.nullcontext():
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
        if local:
            options |= {"num_cpus": max(job.most_workers, usable_cores()), "include_dashboard": False}
        # Ray puts the folder it is started from first on its workers' path: a user's models/ would shadow ours.
        with contextlib.chdir(scratch):
            try:
                ray.init(address=address, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise LaunchError(
                    f"no Ray cluster answers at {address!r} ({_last_line(error)}): nothing can be trained there; start "
                    "one with `ray start --head`, or give its address"
                ) from error
        try:
            yield
        finally:
            ray.shutdown()


def _board(job: Job) -> Any:
    """The run's board, on this machine: it shall live as long as this process, and no longer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    try:
        return ray.remote(num_cpus=0)(Board).options(name=board_name(job.name), scheduling_strategy=here).remote()
    except ValueError as error:
        raise LaunchError(
            f"a job called {job.name!r} runs on this cluster already: two would write into one another's run; wait for "
            f"it, `thawline stop {job.name}`, or give another --name"
        ) from error


def _trainer(job: Job, device: str, board: Any, scratch: str, *, workers: int, group: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _worker,
        train_loop_config={"job": jobs.to_toml(job), "board": board},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=device == "cuda",
            resources_per_worker=needs_of(job, device),
            placement_strategy=job.cluster.placement.upper(),
            accelerator_type=job.cluster.accelerator_type or None,
        ),
        torch_config=TorchConfig(backend=BACKENDS[device], timeout_s=round(job.cluster.first_step_s)),
        run_config=RunConfig(
            name=f"{job.name}-{group}",
            storage_path=scratch,  # Ray keeps only its own notes there: checkpoints are the run folder's
            # How often to try again, and with how many workers, is decided here: see `_groups`.
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )


def _groups(job: Job, device: str, board: Any, scratch: str, show: Show) -> Exception | None:
    """Start groups of workers, one after another, until one has brought the run to its end, or too many have failed.

    Ray Train can do so itself, but looks at the cluster every 20 s only and knows nothing of checkpoints: it waits a
    minute for a machine that has vanished, and enlarges a group by killing it. Here the next group has as many workers
    as there is room for at once, and a group that could be larger is asked to save and to leave.
    Returns the exception that ended the last group, or None.
    """
    import ray

    failures, preemptions, most = job.failures, job.preemptions, job.most_workers
    for group in itertools.count():
        workers = min(most, _wait_for_room(job, device, board, show))
        trainer = _trainer(job, device, board, scratch, workers=workers, group=group)
        failure = _one_group(
            trainer, board, show, grow=partial(can_grow, job, device, workers), every_s=job.cluster.resize_s
        )
        if any(each is not None for each in ray.get(board.outcome.remote())):
            return failure
        most = job.most_workers
        if _not_placed(failure):
            most = max(job.least_workers, workers - 1)  # others hold what there seemed to be
            show(
                [{"kind": "note", "text": f"{workers} workers found no place within {job.cluster.start_s:g} s: again"}]
            )
        elif failure is not None and ray.get(board.warned.remote()):
            if preemptions == 0:
                return failure
            preemptions -= 1
        elif failure is not None:
            if failures == 0:
                return failure
            failures -= 1
    raise AssertionError


def _one_group(trainer: Any, board: Any, show: Show, *, grow: Callable[[], bool], every_s: float) -> Exception | None:
    """Run Ray Train's controller in a thread and show rows meanwhile; the exception that ended it, or None.

    grow: whether the group should make way for a larger one; asked every `every_s`.
    """
    import ray

    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # whatever ended the group: the caller decides from the board what to say
            failures.append(error)

    controller = threading.Thread(target=fit, name="thawline-ray-fit", daemon=True)
    controller.start()
    drains, looked = Drains(board), time.monotonic()
    while controller.is_alive():
        controller.join(timeout=_WATCH_S)
        show(ray.get(board.take.remote()))
        drains.look()
        if time.monotonic() - looked >= every_s:
            looked = time.monotonic()
            if grow():
                board.make_way.remote()
    show(ray.get(board.take.remote()))
    return failures[0] if failures else None


def _wait_for_room(job: Job, device: str, board: Any, show: Show) -> int:
    """How many workers there is room for now, once there is for the fewest. Raises LaunchError when asked to stop."""
    import ray

    told = False
    while True:
        found = room(job, device)
        if found >= job.least_workers:
            return found
        if ray.get(board.asked.remote())[0]:
            raise LaunchError(
                f"asked to stop while there was room for {found} of {job.least_workers} workers: nobody was training, "
                "and the run stands at its last checkpoint; start it again with the same name to go on"
            )
        if not told:
            told = True
            show([{"kind": "note", "text": f"waiting for room: {found} of {job.least_workers} workers fit now"}])
        time.sleep(1)


def _not_placed(failure: Exception | None) -> bool:
    """Whether the workers were not even started."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

    cause = getattr(failure, "controller_failure", None)
    return isinstance(cause, WorkerGroupStartupFailedError | WorkerGroupStartupTimeoutError)


class Drains:
    """Tells the board when a machine that any worker may be on is about to be taken away."""

    def __init__(self, board: Any) -> None:
        self._board, self._looked, self._known = board, 0.0, None

    def look(self) -> None:
        """Ask Ray, at most every `_DRAINS_S`."""
        if time.monotonic() - self._looked < _DRAINS_S:
            return
        self._looked = time.monotonic()
        import ray

        deadlines = ray._private.state.state.get_draining_nodes().values()  # node -> unix ms, 0 where none was given
        soonest = min((ms / 1000 for ms in deadlines if ms), default=None)
        if soonest is not None and soonest != self._known:
            self._known = soonest
            self._board.warn.remote(soonest)


def _last_line(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] if error else []
    return lines[-1] if lines else "no reason was given"
