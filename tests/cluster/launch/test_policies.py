"""How many workers Ray Train is told to start, and whether again: without Ray, its board a plain object."""

from dataclasses import replace

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from thawline.cluster.errors import LaunchError
from thawline.cluster.job.job import Job
from thawline.cluster.launch import ray_policies
from thawline.cluster.launch.board import Board
from thawline.cluster.launch.ray_policies import Budget, Places
from thawline.cluster.launch.settings import Cluster


class World:
    """A policy, and the cluster that it sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
        self.room, self.grows = 0, False
        self.board = Board(failures=job.failures)
        monkeypatch.setattr(ray_policies, "room", lambda job, device: self.room)
        monkeypatch.setattr(ray_policies, "can_grow", lambda job, device, workers: self.grows)
        monkeypatch.setattr(ray_policies, "_LOOK_S", 0.0)
        self.policy = Places(ScalingConfig(num_workers=job.most_workers), job, "cpu", self.board, can_add=False)

    def start(self, room: int) -> int:
        """How many workers are started where there is room for so many; 0: it waits."""
        self.room = room
        decision = self.policy.make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            return 0
        assert isinstance(decision, ResizeDecision)
        return int(decision.num_workers)

    def run(self) -> None:
        """The workers run, and are looked at."""
        assert isinstance(self.policy.make_decision_for_running_worker_group(None, None), NoopDecision)


@pytest.fixture
def elastic() -> Job:
    return Job(manifest="a.parquet", workers=(2, 4), cluster=Cluster(resize_s=0.0))


def test_as_many_as_there_is_room_for_within_the_jobs_bounds(monkeypatch: pytest.MonkeyPatch, elastic: Job) -> None:
    world = World(monkeypatch, elastic)
    for room, started in ((9, 4), (3, 3), (2, 2), (1, 0), (0, 0), (4, 4)):
        assert world.start(room) == started
        world.run()
    notes = [row["text"] for row in world.board.take()]
    assert notes == ["waiting for room: 1 of 2 workers fit now"]  # once, not at every look


def test_workers_that_found_no_place_are_started_again_as_fewer(monkeypatch: pytest.MonkeyPatch, elastic: Job) -> None:
    world = World(monkeypatch, elastic)
    assert [world.start(4) for _ in range(4)] == [4, 3, 2, 2]  # never fewer than the least
    assert "4 workers found no place within" in str(world.board.take()[0]["text"])
    world.run()
    assert world.start(4) == 4  # they ran: what ended them was something else


def test_a_group_that_could_be_larger_is_asked_to_make_way(monkeypatch: pytest.MonkeyPatch, elastic: Job) -> None:
    world = World(monkeypatch, elastic)
    world.start(2)
    world.run()
    assert world.board.asked().stop is False
    world.grows = True
    world.run()
    assert world.board.asked().stop is True


def test_and_not_before_its_time(monkeypatch: pytest.MonkeyPatch, elastic: Job) -> None:
    world = World(monkeypatch, replace(elastic, cluster=Cluster(resize_s=3600.0)))
    world.grows = True
    world.start(2)
    world.run()
    assert world.board.asked().stop is False


def test_who_is_asked_to_stop_while_waiting_says_so(monkeypatch: pytest.MonkeyPatch, elastic: Job) -> None:
    world = World(monkeypatch, elastic)
    world.board.request_stop()
    with pytest.raises(LaunchError, match="room for 1 of 2 workers: nobody was training"):
        world.start(1)
    error = world.board.outcome().error
    assert error is not None
    assert error.kind == "LaunchError"  # the driver's user reads it


def test_workers_go_where_machines_answer(monkeypatch: pytest.MonkeyPatch, elastic: Job) -> None:
    world = World(monkeypatch, elastic)
    monkeypatch.setattr(ray_policies, "answering", lambda: ["aa", "bb"])
    chosen = world.policy.on_controller_start_worker_group(scaling_config=ScalingConfig(), num_workers=2)
    assert chosen == {"ray.io/node-id": "in(aa,bb)"}


def test_what_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(failures=2)
    budget = Budget(board)
    lost = WorkerGroupError("a worker died", {0: RuntimeError("killed")})
    no_place = ControllerError(WorkerGroupStartupTimeoutError(2))
    not_started = ControllerError(WorkerGroupStartupFailedError("it died while it started"))
    ours = ControllerError(LaunchError("asked to stop"))
    for error, decision in (
        (no_place, FailureDecision.RETRY),  # costs nothing
        (lost, FailureDecision.RETRY),
        (not_started, FailureDecision.RETRY),
        (no_place, FailureDecision.RETRY),
        (lost, FailureDecision.RAISE),
    ):
        assert budget.make_decision(error) is decision
    assert Budget(Board(failures=9)).make_decision(ours) is FailureDecision.RAISE
    assert [str(row["text"]).partition(":")[0] for row in board.take()] == [
        "rank 0 failed (killed)",
        "the workers did not come up (it died while it started)",
    ]


def test_of_several_failures_that_of_a_dead_worker_is_told() -> None:
    board = Board(failures=-1)
    dead = WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError("the actor died"))
    others = RuntimeError("Traceback ...\nRuntimeError: Connection closed by peer")
    assert Budget(board).make_decision(WorkerGroupError("", {0: others, 2: dead})) is FailureDecision.RETRY
    assert Budget(board).make_decision(WorkerGroupError("", {1: others})) is FailureDecision.RETRY
    hung = RuntimeError("...\ncluster.errors.HangError: rank 0 waited in vain: rank 1 has gone; give more time")
    assert Budget(board).make_decision(WorkerGroupError("", {0: hung})) is FailureDecision.RETRY
    advice = RuntimeError("Ray killed 1 worker(s)\nRefer to ... how to address the out of memory issue: https://docs")
    evicted = WorkerHealthCheckFailedError("A worker health check failed.", advice)
    assert Budget(board).make_decision(WorkerGroupError("", {1: evicted})) is FailureDecision.RETRY
    assert [row["text"] for row in board.take()] == [
        "rank 2 died (killed, out of memory, or the machine is gone): going on from the last checkpoint",
        "rank 1 failed (RuntimeError: Connection closed by peer): going on from the last checkpoint",
        "rank 0 waited in vain: rank 1 has gone: going on from the last checkpoint",
        "rank 1 died (a machine ran out of memory, and Ray ended a worker there): going on from the last checkpoint",
    ]
