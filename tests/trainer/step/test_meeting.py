"""Where ranks meet: torchrun's words are checked, and ranks of one machine are heard on loopback alone."""

import multiprocessing
import socket
from datetime import timedelta
from multiprocessing.connection import Connection

import psutil
import pytest
import torch
import torch.distributed as dist

from thawline.cluster.errors import JobError, LaunchError
from thawline.cluster.job.job import Data, Job
from thawline.cluster.launch import ranks
from thawline.cluster.launch.ranks import Place
from thawline.cluster.launch.worker_part import meet
from thawline.cluster.run.preflight import preflight

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*WHOLE, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ({}, None),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"RANK": "3"}, None),  # left over: nobody says that there are others
        (WHOLE, Place(1, 2, 1, 2, "10.0.0.7:29500")),
        (WHOLE | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Place(1, 2, 0, 1, "10.0.0.7:29500")),
    ],
)
def test_what_torchrun_says_is_understood(
    words: dict[str, str], place: Place | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert ranks.place() == place


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 is set, but not RANK or MASTER_ADDR or MASTER_PORT: .*unset WORLD_SIZE",
        ),
        (WHOLE | {"RANK": ""}, "WORLD_SIZE=2 is set, but not RANK: "),
        (WHOLE | {"RANK": "2"}, "RANK=2 with WORLD_SIZE=2: ranks end at 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number from 1 on: "),
        (WHOLE | {"MASTER_PORT": "x"}, "MASTER_PORT='x' is not a whole number"),
        (WHOLE | {"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' is not a whole number from 0 on"),
    ],
)
def test_half_of_it_is_told_in_a_sentence(
    words: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=sentence):
        ranks.place()


def test_a_rank_with_one_image_is_found_by_the_ranks_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(manifest="none.parquet", data=Data(global_batch=3))
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(JobError, match="global_batch=3 over workers=2 leaves one with fewer than 2 images a step"):
        preflight(job)


def one_rank(rank: int, port: int, link: Connection) -> None:
    part = {"backend": "gloo", "host": "127.0.0.1", "port": port, "rank": rank, "world_size": 2}
    meet(part, timeout=timedelta(seconds=60))
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    listening = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    link.send((int(total), listening))
    link.recv()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_of_one_machine_listen_on_loopback_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    links = []
    for rank in (0, 1):
        ours, theirs = spawn.Pipe()
        spawn.Process(target=one_rank, args=(rank, port, theirs), daemon=True).start()
        links.append(ours)
    heard = []
    for link in links:
        assert link.poll(90)
        heard.append(link.recv())
    for link in links:
        link.send("end")
    assert [total for total, _ in heard] == [3, 3]
    assert set().union(*(listening for _, listening in heard)) == {"127.0.0.1"}
