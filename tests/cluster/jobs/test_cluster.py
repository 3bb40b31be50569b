"""A job on a real cluster: a head and two worker nodes on this machine, each a raylet of its own, with a token."""

import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.clusters import BIN, RayCluster, free_port, ray_cluster
from tests.kit.own_code import write_nets
from tests.kit.runs import digits_manifest, planned_hash, result, wait_for_step, write_job

pytestmark = pytest.mark.slow

WORKERS = ("--workers", "2")
EPOCHS, STEPS = 6, 60


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_manifest(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(1, 1, shared=True) as made:  # two nodes of one host, as Ray has them there by default
        yield made


@pytest.fixture(scope="module")
def small() -> Iterator[RayCluster]:
    """For what is refused before anything runs."""
    with ray_cluster(1) as made:
        yield made


def last_json(text: str) -> Any:
    return json.loads(text.strip().splitlines()[-1])


@pytest.mark.cluster
def test_a_job_is_submitted_followed_asked_stopped_and_taken_up_again(
    cluster: RayCluster, tmp_path: Path, manifest: Path
) -> None:
    job, run, at = (
        write_job(tmp_path, manifest, model="resnet18"),
        tmp_path / "runs/run",
        ("--address", cluster.address),
    )
    command = ("submit", str(job), *at, *WORKERS, "--fit.epochs", str(EPOCHS), "--follow")
    following = cluster.start(*command)
    wait_for_step(run, 4, following)
    # All at once: the run does not wait for them.
    asked, taken, stopped = cluster.together(("status", "run", *at), ("submit", str(job), *at), ("stop", "run", *at))
    assert asked.returncode == 3, asked.stderr
    told = last_json(asked.stdout)
    assert (told["name"], told["attempt"], told["state"]) == ("run", 1, "running")
    assert 4 <= told["step"] <= STEPS
    assert taken.returncode == 1
    assert f"a job called 'run' is running on {cluster.address} already" in taken.stderr
    assert stopped.returncode == 0, stopped.stderr
    step = newest(run)
    assert f"run stopped at step {step}, with a checkpoint" in stopped.stderr
    _, talk = following.communicate(timeout=60)
    assert following.returncode == 143
    assert "submitted as run.1" in talk
    assert f"stopped at step {step}" in talk
    assert not (run / "result.json").exists()

    again = cluster.run(*command)
    assert again.returncode == 0, again.stderr
    assert "submitted as run.2" in again.stderr
    assert f"resumed at step {step}" in again.stderr
    assert last_json(again.stdout)["stream_hash"] == planned_hash(manifest, STEPS) == result(run)["stream_hash"]
    assert cluster.run("status", "run", *at).returncode == 0
    listed = cluster.run("list", *at).stdout
    assert [line.split()[:3] for line in listed.splitlines()] == [
        ["name", "attempt", "state"],
        ["run", "2", "succeeded"],
    ]
    assert "resumed at step" in cluster.run("logs", "run", *at).stdout


@pytest.mark.cluster
def test_a_run_goes_on_from_here_to_the_cluster_and_back(cluster: RayCluster, tmp_path: Path, manifest: Path) -> None:
    job, run, at = (
        write_job(tmp_path, manifest, model="resnet18"),
        tmp_path / "runs/travels",
        ("--address", cluster.address),
    )
    length = ("--name", "travels", "--fit.epochs", str(EPOCHS))
    here = cluster.start("train", str(job), *length)
    wait_for_step(run, 6, here)
    here.send_signal(signal.SIGTERM)
    _, talk = here.communicate(timeout=60)
    assert "the same command resumes it" in talk

    there = cluster.run("submit", str(job), *at, *WORKERS, *length)
    assert there.returncode == 0, there.stderr
    before = newest(run)
    while newest(run) == before:
        time.sleep(0.1)
    assert cluster.run("stop", "travels", *at).returncode == 0
    assert not (run / "result.json").exists()

    back = cluster.run("train", str(job), *length)
    assert back.returncode == 0, back.stderr
    assert last_json(back.stdout)["stream_hash"] == planned_hash(manifest, STEPS)


@pytest.mark.cluster
def test_ones_own_code_goes_along_where_it_was_agreed_to(cluster: RayCluster, tmp_path: Path, manifest: Path) -> None:
    """No node can find nets.py but by the submission: they were started elsewhere."""
    write_nets(tmp_path)
    job = write_job(tmp_path, manifest, model="python:nets:body")
    words = [str(BIN / "thawline"), "submit", str(job), "--address", cluster.address, *WORKERS, "--name", "own"]

    def submit(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*words, *more], cwd=tmp_path, env=cluster.env, capture_output=True, text=True, timeout=120, check=False
        )

    unasked = submit()
    assert unasked.returncode == 1
    assert "names code, which no file may have imported unasked" in unasked.stderr
    done = submit("--trust-code", "--fit.loss", "python:nets:loss", "--follow")
    assert done.returncode == 0, done.stderr
    made = result(tmp_path / "runs/own")
    assert (made["world_size"], made["code"].keys()) == (2, {"python:nets:body", "python:nets:loss"})
    assert "importing python:nets:loss from" in cluster.run("logs", "own", "--address", cluster.address).stdout


def newest(run: Path) -> int:
    """The step of the last checkpoint that has begun to be written."""
    return max(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step_*"))


def refused(cluster: RayCluster, *words: str, **env: str) -> str:
    began = time.monotonic()
    done = cluster.run(*words, timeout_s=120, **env)
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("thawline: ") == 1, done.stderr
    assert "INFO" not in done.stderr  # of Ray's client
    print(f"{time.monotonic() - began:.1f} s: {done.stderr.strip().splitlines()[-1]}")
    return done.stderr


@pytest.mark.cluster
def test_two_jobs_at_once_do_not_disturb_each_other(cluster: RayCluster, tmp_path: Path, manifest: Path) -> None:
    job, ports = write_job(tmp_path, manifest, model="resnet18"), (str(free_port()), str(free_port()))
    both = [
        cluster.start(
            *("submit", str(job), "--address", cluster.address, "--follow", "--name", name, "--fit.epochs", "4"),
            *("--metrics.port", ports[0], "--metrics.sd_port", ports[1]),
        )
        for name in ("one", "two")
    ]
    endpoints: dict[str, str] = {}
    for name, process in zip(("one", "two"), both, strict=True):
        wait_for_step(tmp_path / "runs" / name, 2, process)
        (target,) = json.loads((tmp_path / f"runs/{name}.targets.json").read_text())
        (endpoints[name],) = target["targets"]
        with urllib.request.urlopen(f"http://{endpoints[name]}/metrics", timeout=10) as answer:
            assert set(re.findall(r'run="([^"]+)"', answer.read().decode())) == {name}
    assert endpoints["one"] != endpoints["two"]
    ends = [process.communicate(timeout=240) for process in both]
    for name, (out, talk), process in zip(("one", "two"), ends, both, strict=True):
        assert process.returncode == 0, talk
        assert (
            last_json(out)["stream_hash"]
            == planned_hash(manifest, 40)
            == result(tmp_path / "runs" / name)["stream_hash"]
        )
    told = [cluster.run("logs", name, "--address", cluster.address).stdout for name in ("one", "two")]
    directories = [re.findall(r"targets=(\S+)", text) for text in told]
    assert all(len(urls) == 1 for urls in directories)
    assert directories[0] != directories[1]


def test_what_cannot_be_is_told_in_a_sentence(small: RayCluster, tmp_path: Path, manifest: Path) -> None:
    job, at = str(write_job(tmp_path, manifest)), ("--address", small.address)
    submit = ("submit", job, *at, "--name")
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("0" * 64)
    assert "does not know the token in" in refused(small, *submit, "a", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert "asks for a token and none was sent" in refused(small, *submit, "b", RAY_AUTH_MODE="disabled")
    assert "does not exist and RAY_AUTH_TOKEN is not set" in refused(
        small, *submit, "c", RAY_AUTH_TOKEN_PATH=str(tmp_path / "none")
    )
    wrong.chmod(0o644)
    assert "can be read by others (mode 0644)" in refused(small, *submit, "d", RAY_AUTH_TOKEN_PATH=str(wrong))
    for flag, word in (("--model.name", "resnt18"), ("--fit.metrics", "accurcy")):
        assert f"'{word}'" in refused(small, *submit, "g", flag, word)
    nobody = f"http://127.0.0.1:{free_port()}"
    assert f"no Ray cluster answers at {nobody}" in refused(small, "submit", job, "--address", nobody)
    assert "is no URL of a Ray dashboard" in refused(small, "submit", job, "--address", "auto")
    full = refused(small, *submit, "e", "--workers", "2")
    assert "workers=2 of 1 CPU each, but this cluster of 2 machines has room for 1" in full
    assert "knows no job called 'nobody' (jobs there: " in refused(small, "status", "nobody", *at)
    lost = refused(small, "submit", job, *at, "--name", "f", "--manifest", "/nowhere/digits.parquet")
    assert "/nowhere/digits.parquet" in lost
    assert "there is nothing to stop" in refused(small, "stop", "f", *at)


def test_a_cluster_without_thawline_is_told_apart(small: RayCluster, tmp_path: Path, manifest: Path) -> None:
    job, at = str(write_job(tmp_path, manifest)), ("--address", small.address)
    said = refused(small, "submit", job, *at, "--name", "bare", "--package", "installed")
    assert "the cluster's machines have no thawline, so bare cannot run there" in said
