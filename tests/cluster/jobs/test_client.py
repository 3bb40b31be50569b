"""A client of Ray Jobs, against a stand-in for Ray's: names and attempts, tails that break, how an end is told."""

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from thawline.cluster.errors import SubmitError, TokenError
from thawline.cluster.job.job import Job
from thawline.cluster.jobs import client as jobs
from thawline.cluster.jobs import log_records
from thawline.cluster.jobs.client import Attempt, Cluster, outcome
from thawline.cluster.machine.provenance import HOME

LINES = [f"line {i}" for i in range(4)] + ['\x1e{"kind": "note"}', "", "last"]
JOB = Job(name="pets 2", manifest="/data/pets.parquet")


def info(known: str, status: str, *, name: str | None, exit_code: int | None = None) -> Any:
    """What Ray's client tells of a job."""
    state = SimpleNamespace(value=status, is_terminal=lambda: status not in ("PENDING", "RUNNING"))
    return SimpleNamespace(
        submission_id=known,
        status=state,
        metadata={} if name is None else {"thawline": name},
        driver_exit_code=exit_code,
        message="because",
        start_time=1000 * int(known.rpartition(".")[2] or 0) if known[-1].isdigit() else None,
        end_time=None,
        runtime_env={},
    )


@dataclass
class FakeClient:
    """Ray's JobSubmissionClient, as far as it is used. cuts: after how many chunks each tail breaks, and with what."""

    known: list[Any] = field(default_factory=list)
    cuts: list[tuple[int, Exception | None]] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    failure: Exception | None = None

    def list_jobs(self) -> list[Any]:
        if self.failure is not None:
            raise self.failure
        return self.known

    def submit_job(self, **request: Any) -> str:
        self.submitted.append(request)
        folder = request["runtime_env"]["working_dir"]
        request["files"] = sorted(file.name for file in Path(folder).rglob("*"))
        request["own"] = {
            file.relative_to(Path(each).parent).as_posix(): file.read_text()
            for each in request["runtime_env"].get("py_modules", [])
            for file in Path(each).rglob("*.py")
            if Path(each).name != "thawline"
        }
        self.known.append(info(request["submission_id"], "PENDING", name=request["metadata"]["thawline"]))
        return str(request["submission_id"])

    def get_job_logs(self, known: str) -> str:
        return "\n".join(LINES) + "\n"

    async def tail_job_logs(self, known: str) -> AsyncIterator[str]:
        text = "\n".join(LINES) + "\n"
        chunks = [text[i : i + 5] for i in range(0, len(text), 5)]  # cut within lines, as Ray may
        last, failure = self.cuts.pop(0)
        for chunk in chunks[:last]:
            yield chunk
        if not self.cuts:
            self.known[-1] = info(self.known[-1].submission_id, "SUCCEEDED", name="pets 2")
        if failure is not None:
            raise failure


def cluster(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr("thawline.cluster.jobs.token.use_token", lambda: None)
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(Cluster, "_open", lambda self: client)
    monkeypatch.setattr(jobs, "_AGAIN_S", 0.0)
    return Cluster("http://127.0.0.1:8265/")


def test_each_submission_of_a_name_is_its_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient([info("raysubmit_x", "RUNNING", name=None), info("pets-2.9", "FAILED", name="pets 2")])
    made = cluster(client, monkeypatch).submit(JOB, package="installed")
    assert (made.id, made.name, made.number, made.state) == ("pets-2.10", "pets 2", 10, "pending")
    (request,) = client.submitted
    assert request["files"] == ["job.toml"], "neither code nor data nor .git"
    assert "py_modules" not in request["runtime_env"]
    with pytest.raises(SubmitError, match=r"a job called 'pets 2' is pending on http://127.0.0.1:8265 already"):
        cluster(client, monkeypatch).submit(JOB)
    cluster(client, monkeypatch).submit(replace(JOB, name="other"))
    assert client.submitted[-1]["entrypoint"].endswith("python -m thawline.cluster.driver")
    cluster(client, monkeypatch).submit(replace(JOB, name="anew"), fresh=True)
    assert client.submitted[-1]["entrypoint"].endswith("python -m thawline.cluster.driver --fresh")
    shipped = client.submitted[-1]["runtime_env"]["py_modules"]
    assert [folder.rpartition("/")[2] for folder in shipped] == ["thawline"]


def test_code_in_the_working_folder_goes_along_and_what_is_installed_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets/deep.py").write_text("def body(): ...")
    (tmp_path / "own_loss.py").write_text("def loss(): ...")
    named = ("python:own_nets.deep:body", "python:own_loss:loss")
    job = replace(JOB, model=replace(JOB.model, name=named[0]), fit=replace(JOB.fit, loss=named[1]))
    client = FakeClient()
    cluster(client, monkeypatch).submit(job, package="installed")
    (request,) = client.submitted
    assert request["entrypoint"].endswith(f"driver --trust={named[0]} --trust={named[1]}")
    assert request["own"] == {"own_loss/__init__.py": "def loss(): ...", "own_nets/deep.py": "def body(): ..."}
    other = replace(job, name="other", model=replace(JOB.model, name="python:torch.nn:Identity"), fit=JOB.fit)
    cluster(client, monkeypatch).submit(other, package="installed")
    assert "py_modules" not in client.submitted[-1]["runtime_env"]


@pytest.mark.parametrize(("code", "state"), [(143, "stopped"), (130, "stopped"), (1, "failed")])
def test_a_job_that_stopped_says_so(monkeypatch: pytest.MonkeyPatch, code: int, state: str) -> None:
    client = FakeClient([info("a.1", "FAILED", name="a", exit_code=code)])  # as Ray calls whatever is not 0
    assert cluster(client, monkeypatch).attempt("a").state == state


@pytest.mark.parametrize("break_with", [None, RuntimeError("closed unexpectedly"), ConnectionResetError("gone")])
def test_a_tail_that_breaks_is_taken_up_and_each_line_comes_once(
    monkeypatch: pytest.MonkeyPatch, break_with: Exception | None
) -> None:
    client = FakeClient([info("pets-2.1", "RUNNING", name="pets 2")], [(n, break_with) for n in (0, 3, 4, 2, 8, 9)])
    there = cluster(client, monkeypatch)
    attempt = there.attempt("pets 2")
    assert list(there.lines(attempt, follow=True)) == LINES
    assert list(there.lines(attempt, follow=False)) == LINES


def test_a_cluster_that_falls_silent_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient([info("pets-2.1", "RUNNING", name="pets 2")], [(3, ConnectionResetError("gone"))] * 99)
    there = cluster(client, monkeypatch)
    attempt = there.attempt("pets 2")
    client.failure = ConnectionError("refused")
    seconds = iter(range(0, 10_000, 30))
    monkeypatch.setattr("thawline.cluster.jobs.client.time.monotonic", lambda: float(next(seconds)))
    with pytest.raises(SubmitError, match="has not responded for 120 s; the job may still run"):
        list(there.lines(attempt, follow=True))


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (AuthenticationError("Authentication required: x\n\nToken"), TokenError, "asks for a token and none was sent"),
        (AuthenticationError("Authentication failed: x\n\nToken"), TokenError, "does not know the token in"),
        (RuntimeError("Request failed with status code 500: boom."), SubmitError, r"refused \(Request failed .*boom"),
        (ConnectionError("Failed to connect"), SubmitError, r"no Ray cluster answers at .* \(Failed to connect\)"),
    ],
)
def test_what_ray_says_becomes_a_sentence(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception], said: str
) -> None:
    there = cluster(FakeClient(failure=raised), monkeypatch)
    with pytest.raises(kind, match=said):
        there.attempts()


ENDED = Attempt("a.1", "a", 1, "failed", 1, "killed", None, None)


@pytest.mark.parametrize(
    ("attempt", "end", "code", "said"),
    [
        (ENDED, {"status": "finished"}, 0, "a has finished"),
        (ENDED, {"status": "stopped", "steps": 7}, 143, "stopped at step 7, with a checkpoint; submit it again"),
        (replace(ENDED, exit_code=130), {"status": "stopped", "steps": 7}, 130, "stopped at step 7, with a checkpoint"),
        (ENDED, {"status": "failed", "error": "no such file"}, 1, "no such file"),
        (replace(ENDED, exit_code=87), None, 1, "the cluster's machines have no thawline"),
        (replace(ENDED, exit_code=127), None, 1, "the cluster has no `python` on its PATH"),
        (replace(ENDED, state="stopped"), None, 1, "ended without a checkpoint"),
        (ENDED, None, 1, r"ended without a word (killed)"),
    ],
)
def test_how_an_attempt_ended_is_told(attempt: Attempt, end: dict[str, Any] | None, code: int, said: str) -> None:
    told = outcome(attempt, end)
    assert told[0] == code
    assert said in told[1]


@pytest.mark.slow
def test_a_python_that_lacks_packages_says_which_it_is_and_what_to_do() -> None:
    isolated = ["-S", "-c"]  # without site-packages, as the python of another environment
    words = [sys.executable, *isolated, jobs._PROBE]
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(HOME)}, timeout=60)
    row = log_records.decode(done.stdout.strip("\n"))
    assert row is not None
    code, said = outcome(ENDED, row)
    assert (code, done.returncode) == (1, 1)
    assert re.match(rf"{sys.executable} on .*, which is the Python .*lacks torch, .*, tomli_w.*: .*first on PATH", said)


@pytest.mark.slow
@pytest.mark.parametrize("theirs", ["", "thawline.py", "thawline/__init__.py"])
def test_a_python_without_thawline_or_with_somebody_elses_is_known(theirs: str, tmp_path: Path) -> None:
    if theirs:
        (tmp_path / theirs).parent.mkdir(exist_ok=True)
        (tmp_path / theirs).write_text("raise RuntimeError('foreign code ran')")
    words = [sys.executable, "-S", "-c", jobs._PROBE]
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, cwd="/", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (87, "", "")


@pytest.mark.slow
def test_a_python_that_has_everything_goes_on_without_a_word() -> None:
    done = subprocess.run([sys.executable, "-c", jobs._PROBE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
