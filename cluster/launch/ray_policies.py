"""How many workers does Ray Train start, and may it start them again? The house's answers, in its controller.

Ray Train asks two policies. Its own look at the cluster every 20 s, wait for machines that have vanished, and enlarge
a group of workers by killing it. Ours take what there is room for at once, count failures on the board, and let a
group that could be larger save first.

Its processes share the cores with those that train. An actor of Ray's that waits for its next call wakes a hundred
times a second, which took a tenth of two busy cores; one that is within a call sleeps. So here the controller is within
one call for as long as it lives, and a worker that is asked how it is takes its time to answer.

Built on what Ray Train calls internal: pyproject pins Ray for it.
"""

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import RayTrainWorker, WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from thawline.cluster.errors import KINDS, HangError, LaunchError, last_line, out_of_memory
from thawline.cluster.job.job import Job
from thawline.cluster.launch.board import Board
from thawline.cluster.launch.room import answering, can_grow, needs_of, room
from thawline.trainer.step.sentences import Sentence

_LOOK_S = 0.5
_POLL_S = 0.5
_ANSWER_S = 2.0


class _Backend(Backend):
    """Sets up nothing: the process that trains does. But it sees the GPUs of its machine's other workers, for NCCL."""

    share_cuda_visible_devices = True


class _BackendConfig(BackendConfig):
    backend_cls = _Backend


class Trainer(DataParallelTrainer):
    """A Ray Train trainer with the policies of this file."""

    def __init__(
        self,
        worker: Any,
        config: dict[str, Any],
        job: Job,
        device: str,
        board: Board,
        *,
        scratch: str,
        name: str,
        can_add: bool,
    ) -> None:
        """can_add: the cluster may be able to add machines, and is asked to."""
        super().__init__(
            worker,
            train_loop_config=config,
            backend_config=_BackendConfig(),
            scaling_config=ScalingConfig(
                num_workers=job.most_workers,
                use_gpu=device == "cuda",
                resources_per_worker=needs_of(job, device),
                placement_strategy=job.cluster.placement.upper(),
                accelerator_type=job.cluster.accelerator_type or None,
            ),
            # Ray keeps only its own notes in scratch: checkpoints are the run folder's.
            run_config=RunConfig(name=name, storage_path=scratch),
        )
        places = Places(self.scaling_config, job, device, board, can_add=can_add)
        self._policies = {"scaling_policy": places, "failure_policy": Budget(board)}

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        settings = {"env_vars": get_env_vars_to_propagate()}
        actor = ray.remote(num_cpus=0)(Controller).options(scheduling_strategy=here, runtime_env=settings)
        return ray.get(actor.remote(**parts | self._policies).run.remote())

    def _create_default_callbacks(self) -> list[Any]:
        # A process each: nobody reads a Ray Dataset here, and the driver looks after a controller that died.
        needless = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, needless)]


class TrainWorker(RayTrainWorker):
    """Ray Train's worker, which answers when its part has ended, or after a while."""

    def poll_status(self) -> Any:
        """How it is."""
        thread = get_train_context().execution_context.training_thread_runner._thread
        if thread is not None:
            thread.join(timeout=_ANSWER_S)
        return super().poll_status()


class _Group(WorkerGroup):
    _worker_cls = TrainWorker

    def shutdown(self) -> None:
        """End the workers, without the question that Ray would first ask: they may be within another."""
        if self.has_started():
            for worker in self.get_workers():
                ray.kill(worker.actor)
        super().shutdown()


class _Controller(TrainController):
    worker_group_cls = _Group

    async def _poll_workers(self) -> Any:
        # No pause in between: the workers take their time, and one that dies is seen at once, or with the next poll.
        return self._worker_group.poll_status(timeout=_POLL_S)


class Controller:
    """Ray Train's controller, as an actor that runs it within one call."""

    def __init__(self, **parts: Any) -> None:
        self._controller = _Controller(**parts)

    def run(self) -> Any:
        """Bring the run to its end; what `Trainer.fit` returns."""
        asyncio.run(self._controller.run())
        return self._controller.get_result()


class Places(ScalingPolicy):
    """As many workers as there is room for on machines that answer; a larger group when the cluster has grown."""

    def __init__(self, scaling_config: ScalingConfig, job: Job, device: str, board: Board, *, can_add: bool) -> None:
        super().__init__(scaling_config)
        self._can_add = can_add
        self._job, self._device, self._board = job, device, board
        self._workers, self._ran = 0, True
        self._told, self._looked = False, time.monotonic()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start as many as there is room for; wait while that is too few. Raises LaunchError when asked to stop."""
        self._maybe_send_resource_request()
        job, most = self._job, self._job.most_workers
        if not self._ran:  # others hold what there seemed to be
            most = max(job.least_workers, self._workers - 1)
            self._tell(f"{self._workers} workers found no place within {job.cluster.start_s:g} s: again, with {most}")
        found = room(job, self._device)
        if found < job.least_workers:
            return self._wait(found)
        self._workers, self._ran, self._told = min(most, found), False, False
        return ResizeDecision(self._workers, needs_of(job, self._device))

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Ask a group that could be larger to save and to leave."""
        self._ran = True
        self._maybe_send_resource_request()
        if time.monotonic() - self._looked >= self._job.cluster.resize_s:
            self._looked = time.monotonic()
            if can_grow(self._job, self._device, self._workers):
                self._board.make_way()
        return NoopDecision()

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """Only machines that answer: Ray notices after many seconds that one has vanished."""
        return {"ray.io/node-id": f"in({','.join(answering())})"}

    def _wait(self, found: int) -> ScalingDecision:
        least = self._job.least_workers
        if self._board.asked().stop:
            error = LaunchError(
                f"asked to stop while there was room for {found} of {least} workers: nobody was training, and the run "
                "stands at its last checkpoint; start it again with the same name to go on"
            )
            self._board.fail(Sentence.of(error, KINDS))
            raise error
        if not self._told:
            self._told = True
            self._tell(f"waiting for room: {found} of {least} workers fit now")
        time.sleep(_LOOK_S)  # the controller has nothing else to do
        return NoopDecision()

    def _tell(self, text: str) -> None:
        self._board.publish([{"kind": "note", "text": text}])

    def after_controller_start(self, train_run_context: Any) -> None:
        """Tell a cluster that can grow what is needed."""
        if self._can_add:
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if self._can_add:
            super()._maybe_send_resource_request()

    def _get_num_workers_for_resource_request(self) -> int:
        return self._job.most_workers


class Budget(FailurePolicy):
    """Again, for as long as the board allows."""

    def __init__(self, board: Board) -> None:
        super().__init__(FailureConfig())
        self._board = board

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether to start the workers again after this."""
        cause = getattr(training_failed_error, "controller_failure", None)
        if cause is not None and not isinstance(cause, RETRYABLE_CONTROLLER_ERRORS):
            return FailureDecision.RAISE  # of this house or of Ray Train: the same would happen again
        placed = not isinstance(cause, WorkerGroupStartupTimeoutError)
        again = self._board.again(_why(training_failed_error, cause), placed=placed)
        return FailureDecision.RETRY if again else FailureDecision.RAISE


def _why(error: TrainingFailedError, cause: Exception | None) -> str:
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    dead = [rank for rank, failure in sorted(failures.items()) if isinstance(failure, WorkerHealthCheckFailedError)]
    if dead:  # what the others then met is only its consequence
        why = next((last_line(failures[rank]) for rank in dead if out_of_memory(failures[rank])), None)
        why = why or "killed, out of memory, or the machine is gone"
        return f"rank {' and rank '.join(map(str, dead))} died ({why})"
    if failures:
        rank = min(failures)
        told = last_line(failures[rank])
        _, hung, what = told.partition(f"{HangError.__name__}: ")
        return what.partition(";")[0] if hung else f"rank {rank} failed ({told})"  # without what to do: it is done here
    return f"the workers did not come up ({last_line(cause or error)})"


def controller_died(failure: Exception) -> bool:
    """Whether what `Trainer.fit` raised says that there is no controller any more."""
    return isinstance(failure, RayActorError)


def free_places() -> None:
    """Give back what a controller of this driver's that died had reserved for its workers."""
    job = ray.get_runtime_context().get_job_id()
    for name in placement_group_table():
        if name.endswith(job):  # a placement group's id ends with that of the job that made it
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))
