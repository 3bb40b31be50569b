"""How do Ray Train workers run a job? On a Ray of this run's own, or on a cluster that is there.

With ray_policies the only file that imports ray.train. Ray places the workers and starts them again; what they then
do, the run's folder says. A driver, which is the process that called `on_ray`, shows their rows and passes on requests
and warnings.
"""

import contextlib
import itertools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from thawline.cluster.errors import KINDS, LaunchError, last_line, out_of_memory
from thawline.cluster.job import job as jobs
from thawline.cluster.job.job import Job
from thawline.cluster.launch.board import Board, Row, board_at, board_name, board_of, served
from thawline.cluster.launch.forkserver import ForkServer, fork, socket_of
from thawline.cluster.launch.messages import Asked, Crashed, Message, Refused, Rows
from thawline.cluster.launch.ray_connection import connected, surroundings
from thawline.cluster.launch.room import answering, choose_device
from thawline.cluster.run.folder import Result, has_begun, hold
from thawline.cluster.run.loaded import Loaded
from thawline.cluster.run.preflight import check_recipe
from thawline.dataio.store.private import scratch

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""torch's, by device. gloo beside NCCL: ids, flags and errors are gathered on the host, so that they never make a GPU
wait."""

Show = Callable[[list[Row]], None]
_ASK_S = 1.0  # also within a validation, which asks once a batch
_WATCH_S = 0.5
_LOOK_S = 2.0
_END_S = 5.0


class MadeWay(Exception):  # noqa: N818  # nothing is wrong
    """Workers have saved and ended so that a larger group goes on: to Ray Train, a failure that costs nothing."""


class PartFailedError(Exception):
    """The process that trains has failed, or has gone; the text is its traceback, if it could send one."""


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs, after a failure too: its machine's fork server makes the process that trains."""
    import ray
    import ray.train
    from ray.train.v2._internal.execution.context import get_train_context

    board: Board = config["board"]
    if board.outcome().over:
        return
    path = socket_of(config["forks"], ray.get_runtime_context().get_node_id())
    link = fork(path, _part(config), wait_s=config["wait_s"])
    first = ray.train.get_context().get_world_rank() == 0
    barrier = get_train_context().get_synchronization_actor() if first else None
    with _passing_on(board, link) if first else contextlib.nullcontext():
        while True:
            try:
                message: Message = link.recv()
            except (EOFError, OSError):
                raise PartFailedError("the process that trained has gone: killed, or out of memory") from None
            if isinstance(message, Rows):
                board.publish(message.rows)
                if barrier is not None:  # all have met, and nobody asks it again: one process less
                    ray.kill(barrier)
                    barrier = None
            elif isinstance(message, Refused):
                board.fail(message.error)
                raise PartFailedError(message.error.text)
            elif isinstance(message, Crashed):
                raise PartFailedError(message.trace)
            else:
                if first and not board.finish(message.result):
                    raise MadeWay
                return


@contextlib.contextmanager
def _passing_on(board: Board, link: Connection) -> Iterator[None]:
    """Rank 0's: tell what the board asks of the workers, which decide together; in a thread, until the block ends."""
    ended = threading.Event()

    def pass_on() -> None:
        sent = Asked()
        # Where the board or the link has gone, the workers end too, and say why.
        with contextlib.suppress(Exception):
            while not ended.wait(_ASK_S):
                if (asked := board.asked()) != sent:
                    sent = asked
                    link.send(asked)

    threading.Thread(target=pass_on, name="thawline-pass-on", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _part(config: dict[str, Any]) -> dict[str, Any]:
    """What `part.main` needs to know, agreed on by all ranks. Collective."""
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    here = ray.train.get_context()
    rank, size = here.get_world_rank(), here.get_world_size()
    agreed = None
    if rank == 0:
        alone = here.get_local_world_size() == size
        host = "127.0.0.1" if alone else ray.util.get_node_ip_address()
        agreed = {"restarts": config["board"].begin(size), "host": host, "port": _free_port()}
    os.environ["LOCAL_WORLD_SIZE"] = str(here.get_local_world_size())
    return {
        "job": config["job"],
        "device": _device(),
        "backend": BACKENDS[config["device"]],
        "rank": rank,
        "world_size": size,
        "local_rank": here.get_local_rank(),
        **broadcast_from_rank_zero(agreed),
    }


def _device() -> str:
    """This worker's, as torch calls it: the place of its GPU among those of this machine's workers."""
    import ray

    mine = [str(each) for each in ray.get_gpu_ids()]
    return f"cuda:{os.environ['CUDA_VISIBLE_DEVICES'].split(',').index(mine[0])}" if mine else "cpu"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def on_ray(
    job: Job,
    *,
    device: str,
    show: Show,
    stopping: Callable[[Callable[[], None]], contextlib.AbstractContextManager[None]],
    address: str = "local",
    fresh: bool = False,
    loaded: Loaded | None = None,
) -> Result:
    """Train as the job's Ray Train workers, and end with the run.

    device: "cpu" or "cuda"; on a cluster "auto" as well, which takes GPUs where there are enough.
    show: takes the run's rows as they come. stopping: a context in which what it is given is called to ask for a stop.
    address: "local" starts a Ray of this run's own, which ends with it; else of a cluster, "auto" for this machine's.
    fresh: begin anew, and move what stands in the run's folder aside. The folder is held from here, through all
    restarts of workers. loaded: what this process has read of the job.

    Raises LaunchError where the cluster cannot hold the job, or it is running there; USER_ERRORS of the run.
    """
    loaded = loaded or Loaded(job)
    held = hold(job, fresh=fresh, tell=lambda text: show([{"kind": "note", "text": text}]))
    with held, scratch() as folder, surroundings(folder, local=address == "local"), connected(job, address, folder):
        if address != "local":
            device = choose_device(job, device)
            if not has_begun(job):
                check_recipe(job, loaded)  # workers would take half a minute more to tell
        loaded.forget()  # the workers read their own
        with _board(job, folder, local=address == "local") as board:
            show([{"kind": "begun", "device": device}])
            with stopping(board.request_stop):
                failure = _train(job, device, board, folder, show, local=address == "local")
            outcome = board.outcome()
    if outcome.error is not None:
        raise outcome.error.error(KINDS) or LaunchError(outcome.error.text)
    if outcome.result is None:
        raise LaunchError(
            f"the workers gave up after {job.failures} failures ({last_line(failure)}): the run stands at its last "
            f"checkpoint; start it again with the same name to go on, {_helps(failure)}"
        ) from failure
    return outcome.result


def _helps(failure: Exception | None) -> str:
    if out_of_memory(failure):
        return "with fewer workers or a smaller data.global_batch if it happens again"
    return "--debug shows the workers' tracebacks"


@contextlib.contextmanager
def _board(job: Job, folder: Path, *, local: bool) -> Iterator[Board]:
    """The run's board: it lives as long as this process, and no longer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if local:
        path = folder / "board"
        with served(Board(failures=job.failures, preemptions=job.preemptions), path):
            yield board_at(path)
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    try:
        actor = (
            ray.remote(num_cpus=0)(Board)
            .options(name=board_name(job.name), scheduling_strategy=here)
            .remote(failures=job.failures, preemptions=job.preemptions)
        )
    except ValueError as error:
        raise LaunchError(
            f"a job called {job.name!r} runs on this cluster already: two would write into one another's run; wait for "
            f"it, `thawline stop {job.name}`, or give another --name"
        ) from error
    yield board_of(actor)


def _train(job: Job, device: str, board: Board, folder: Path, show: Show, *, local: bool) -> Exception | None:
    """Let Ray Train's controller bring the run to its end; what ended it, or None.

    A controller that dies takes its workers with it: another goes on from the run's folder.
    """
    from thawline.cluster.launch.ray_policies import Trainer, controller_died, free_places

    drains = Drains(board)
    with Forks(local=local) as forks:
        config = {
            "job": jobs.to_toml(job),
            "board": board,
            "device": device,
            "forks": forks.name,
            "wait_s": job.cluster.start_s,
        }
        for number in itertools.count():
            name = f"{job.name}-{number}"
            trainer = Trainer(_worker, config, job, device, board, scratch=str(folder), name=name, can_add=not local)
            failure = _fit(trainer, board, () if local else (drains, forks), show)
            if failure is None or not controller_died(failure) or not board.again("the controller died"):
                return failure
            free_places()
    raise AssertionError


def _fit(trainer: Any, board: Board, watchers: Sequence["Drains | Forks"], show: Show) -> Exception | None:
    """Run Ray Train's controller in a thread, show rows and watch meanwhile; the exception that ended it, or None."""
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # whatever ended it: the caller decides from the board what to say
            failures.append(error)

    controller = threading.Thread(target=fit, name="thawline-ray-fit", daemon=True)
    controller.start()
    looked = time.monotonic()
    while controller.is_alive():
        controller.join(timeout=_WATCH_S)
        show(board.take())
        if time.monotonic() - looked >= _LOOK_S:
            looked = time.monotonic()
            for watcher in watchers:
                watcher.look()
    show(board.take())
    return failures[0] if failures else None


class Forks:
    """A fork server on every machine of the cluster, those that join it later too. A context."""

    def __init__(self, *, local: bool) -> None:
        """local: this machine is the cluster, so that no actor need be in between."""
        self.name = uuid.uuid4().hex[:12]
        self._local = local
        self._servers: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self._local:
            for server in self._servers.values():
                server.close()
        else:
            ends = [server.close.remote() for server in self._servers.values()]
            ray.wait(ends, num_returns=len(ends), timeout=_END_S)

    def look(self) -> None:
        """Start those that are missing."""
        for node in set(answering()) - set(self._servers):  # one that is silent for a while keeps its own
            self._servers[node] = (ForkServer if self._local else _server_on(node))(self.name, node)


def _server_on(node: str) -> Callable[[str, str], Any]:
    """`ForkServer`, as an actor on that machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    made: Callable[[str, str], Any] = ray.remote(num_cpus=0)(ForkServer).options(scheduling_strategy=there).remote
    return made


class Drains:
    """Tells the board when a machine that any worker may be on is about to be taken away."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._known: float | None = None

    def look(self) -> None:
        """Ask Ray, and say what is new."""
        import ray

        deadlines = ray._private.state.state.get_draining_nodes().values()  # node -> unix ms, 0 where none was given
        soonest = min((ms / 1000 for ms in deadlines if ms / 1000 > time.time()), default=None)
        if soonest is not None and soonest != self._known:
            self._known = soonest
            self._board.warn(soonest)
