"""How do Ray Train workers run a job? On a Ray of this run's own, or on a cluster that is there.

The one file that imports ray.train. Ray places the workers and starts them again; what they then do, the run's folder
says. A driver, which is the process that called `on_ray`, shows their rows and passes on requests and warnings.
"""

import contextlib
import logging
import os
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import job as jobs
from cluster import token
from cluster.board import NAMESPACE, Board, Row, board_name
from cluster.errors import LaunchError
from cluster.job import Job
from cluster.storage import Result, run_dir
from dataio.cores import usable_cores

# "cpu:gloo" beside NCCL: ids, flags and errors are gathered on the host, so that they never make a GPU wait.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

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
    show: Callable[[list[Row]], None],
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
            device = _room(job, device)
        board = _board(job)
        show([{"kind": "begun", "device": device}])
        with stopping(lambda: board.request_stop.remote()):
            failure = _fit_and_watch(job, device, board, folder, show)
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


def _needs(job: Job, device: str) -> dict[str, float]:
    """What Ray sets aside for one worker."""
    needs = {"CPU": job.cluster.cpus_per_worker, **job.cluster.resources}
    return needs | ({"GPU": 1.0} if device == "cuda" else {})


def _room(job: Job, device: str) -> str:
    """The device to train on, once the cluster has grown large enough for it. Raises LaunchError when it does not."""
    import ray

    deadline = time.monotonic() + job.cluster.wait_s
    while True:
        nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        gpus = sum(node.get("GPU", 0.0) for node in nodes)
        chosen = device if device != "auto" else "cuda" if gpus >= job.least_workers else "cpu"
        found = places(nodes, _needs(job, chosen), accelerator_type=job.cluster.accelerator_type)
        if found >= job.least_workers:
            return chosen
        if time.monotonic() >= deadline:
            break
        time.sleep(1)
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in _needs(job, chosen).items())
    kind = f" on machines with {job.cluster.accelerator_type}" if job.cluster.accelerator_type else ""
    raise LaunchError(
        f"workers={job.workers} of {wanted} each{kind}, but this cluster of {len(nodes)} machines has room for "
        f"{found}: the rest would never start; give --workers {max(found, 1)} or fewer, let the cluster grow "
        "(cluster.wait_s), or look at `ray status`"
    )


def places(nodes: list[dict[str, float]], needs: Mapping[str, float], *, accelerator_type: str = "") -> int:
    """How many workers that need so much each fit onto empty machines with such resources, by Ray's names."""
    mark = f"accelerator_type:{accelerator_type}"
    fitting = [node for node in nodes if not accelerator_type or mark in node]
    return sum(int(min(node.get(name, 0.0) // amount for name, amount in needs.items())) for node in fitting)


def _trainer(job: Job, device: str, board: Any, scratch: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = job.cluster
    return TorchTrainer(
        _worker,
        train_loop_config={"job": jobs.to_toml(job), "board": board},
        scaling_config=ScalingConfig(
            num_workers=job.workers,
            use_gpu=device == "cuda",
            resources_per_worker=_needs(job, device),
            placement_strategy=cluster.placement.upper(),
            accelerator_type=cluster.accelerator_type or None,
            elastic_resize_monitor_interval_s=cluster.resize_s,
        ),
        torch_config=TorchConfig(backend=BACKENDS[device], timeout_s=round(cluster.first_step_s)),
        run_config=RunConfig(
            name=job.name,
            storage_path=scratch,  # Ray keeps only its own notes there: checkpoints are the run folder's
            failure_config=FailureConfig(max_failures=job.failures, max_preemption_failures=job.preemptions),
        ),
    )


def _fit_and_watch(
    job: Job, device: str, board: Any, scratch: str, show: Callable[[list[Row]], None]
) -> Exception | None:
    """Run the Ray Train controller in a thread and show rows meanwhile; the exception that ended it, or None."""
    import ray

    trainer = _trainer(job, device, board, scratch)
    failures: list[Exception] = []

    def fit() -> None:
        for _ in range(job.failures + 1):
            try:
                trainer.fit()
                return
            except Exception as error:  # whatever ended the group: the caller decides from the board what to say
                failures.append(error)
                if not isinstance(error, ray.exceptions.RayActorError):
                    return
                # The controller itself died, and its workers with it: another takes up where the run stands.

    controller = threading.Thread(target=fit, name="thawline-ray-fit", daemon=True)
    controller.start()
    drains = Drains(board)
    while controller.is_alive():
        controller.join(timeout=_WATCH_S)
        show(ray.get(board.take.remote()))
        drains.look()
    show(ray.get(board.take.remote()))
    return failures[-1] if failures else None


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
        if soonest != self._known:
            self._known = soonest
            self._board.warn.remote(soonest)


def _last_line(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] if error else []
    return lines[-1] if lines else "no reason was given"
