"""What a cluster holds, and what a driver passes on: without Ray."""

import json
import tomllib
from types import SimpleNamespace
from typing import Any

import pytest

from thawline.cluster.driver import Watcher
from thawline.cluster.errors import JobError, LaunchError
from thawline.cluster.job import job as jobs
from thawline.cluster.job.checks import check
from thawline.cluster.job.flags import override
from thawline.cluster.job.job import Job
from thawline.cluster.jobs import log_records
from thawline.cluster.launch.room import choose_device, places
from thawline.cluster.launch.settings import Cluster

GPU_NODE = {"CPU": 16.0, "GPU": 4.0, "accelerator_type:H100": 1.0}


@pytest.mark.parametrize(
    ("nodes", "needs", "kind", "room"),
    [
        ([], {"CPU": 1.0}, "", 0),
        ([{"CPU": 3.0}, {"CPU": 2.0}], {"CPU": 2.0}, "", 2),  # not 5 // 2: a worker is on one machine
        ([GPU_NODE, {"CPU": 64.0}], {"CPU": 1.0, "GPU": 1.0}, "", 4),
        ([GPU_NODE, GPU_NODE], {"CPU": 5.0, "GPU": 1.0}, "", 6),
        ([GPU_NODE, {"CPU": 64.0, "GPU": 8.0}], {"CPU": 1.0, "GPU": 1.0}, "H100", 4),
        ([GPU_NODE], {"CPU": 1.0, "fast_disk": 0.5}, "", 0),
        ([{"CPU": 1.0}], {"CPU": 0.25}, "", 4),
    ],
)
def test_a_worker_needs_all_of_its_resources_on_one_machine(
    nodes: list[dict[str, float]], needs: dict[str, float], kind: str, room: int
) -> None:
    assert places(nodes, needs, accelerator_type=kind) == room


@pytest.mark.parametrize(
    ("cluster", "device", "sentence"),
    [
        ({}, "cpu", "workers=9 of 1 CPU each, .* of 2 machines has room for 5: .*; give --workers 5 or fewer, let"),
        (
            {"cpus_per_worker": 4.0},
            "cpu",
            "room for 0: .*; not one machine has that: give less as .*cpus_per_worker, let",
        ),
        (
            {"resources": {"disk": 1.0}},
            "cpu",
            "room for 0: .* give less as .*cpus_per_worker or cluster.resources, let",
        ),
        ({}, "cuda", "room for 0: .* or --device cpu, let the cluster grow"),
    ],
)
def test_what_to_ask_for_instead_is_what_there_is_room_for(
    cluster: dict[str, Any], device: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thawline.cluster.launch.room._nodes", lambda: {"a": {"CPU": 3.0}, "b": {"CPU": 2.0}})
    job = Job(manifest="a.parquet", workers=9, cluster=Cluster(wait_s=0.0, **cluster))
    with pytest.raises(LaunchError, match=sentence):
        choose_device(job, device)


def test_workers_may_be_a_number_or_two() -> None:
    for given, least, most in (("workers = 3", 3, 3), ("workers = [1, 4]", 1, 4)):
        job = check(jobs.from_dict({"manifest": "a.parquet"} | tomllib.loads(given)))
        assert (job.least_workers, job.most_workers) == (least, most)
        assert jobs.from_dict(tomllib.loads(jobs.to_toml(job))) == job
    parsed = override(Job(manifest="a.parquet"), ["--workers", "2", "6"])
    assert parsed.workers == (2, 6)
    for pair in ((3, 2), (0, 2)):
        with pytest.raises(JobError, match="workers="):
            check(Job(manifest="a.parquet", workers=pair))
    with pytest.raises(JobError, match=r"workers=\(1, 40\)|global_batch=64 over workers=40"):
        check(Job(manifest="a.parquet", workers=(1, 40)))


def test_custom_resources_are_numbers_above_zero() -> None:
    job = jobs.from_dict({"manifest": "a.parquet", "cluster": {"resources": {"fast_disk": 1}}})
    assert check(job).cluster.resources == {"fast_disk": 1.0}
    assert jobs.from_dict(tomllib.loads(jobs.to_toml(job))) == job
    with pytest.raises(JobError, match=r"cluster\.resources"):
        check(jobs.from_dict({"manifest": "a.parquet", "cluster": {"resources": {"fast_disk": 0}}}))
    with pytest.raises(JobError, match="names with numbers in"):
        jobs.from_dict({"manifest": "a.parquet", "cluster": {"resources": {"fast_disk": "1"}}})


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Any:
    """The rows that have been printed since it was last called."""
    return lambda: [log_records.decode(line) for line in capsys.readouterr().out.split("\n") if line]


def test_the_driver_says_where_workers_are_and_what_a_failure_cost(told: Any) -> None:
    seen: list[Any] = []
    directory = SimpleNamespace(url="http://head:9399/targets", set=seen.append)
    watcher = Watcher(Job(name="a", manifest="m.parquet"), directory)  # type: ignore[arg-type]
    watcher.show([{"kind": "begun", "device": "cpu"}, {"kind": "targets", "endpoints": "h:1 i:2"}])
    assert told()[0] == {"kind": "begun", "device": "cpu", "targets": "http://head:9399/targets"}
    assert [entry["targets"] for entry in seen[0]] == [["h:1"], ["i:2"]]
    watcher.show([{"kind": "train", "step": 30}, {"kind": "train", "step": 40}])
    watcher.show([{"kind": "train", "step": 30}, {"kind": "resumed", "step": 30}])  # a resumed run shows its old rows
    assert "10 steps since that checkpoint were lost and are taken again" in json.dumps(told()[-1])
    watcher.show([{"kind": "train", "step": 40}, {"kind": "resumed", "step": 40}])
    assert [row["kind"] for row in told()] == ["train", "resumed"]
