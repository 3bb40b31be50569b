"""Is code that a file names imported only where its reader says so, and told before? Whatever file it is."""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kit.own_code import forget, write_nets
from tests.kit.runs import digits_manifest, go, result, start, write_job
from thawline import models
from thawline.cluster import driver
from thawline.cluster.cli.train import Train
from thawline.cluster.cli.verbs import parse, with_job
from thawline.cluster.errors import JobError
from thawline.cluster.job import job as jobs
from thawline.cluster.job.checks import check
from thawline.cluster.job.job import Job
from thawline.cluster.job.model import Model
from thawline.cluster.jobs import log_records

BODY, LOSS = "python:nets:body", "python:nets:loss"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which nets.py lies, and files that name it."""
    forget(monkeypatch)
    write_nets(tmp_path)
    (tmp_path / "body.toml").write_text(f'manifest = "a.parquet"\nmodel.name = "{BODY}"\n')
    (tmp_path / "loss.toml").write_text(f'manifest = "a.parquet"\nfit.loss = "{LOSS}"\n')
    (tmp_path / "runs/old").mkdir(parents=True)
    (tmp_path / "runs/old/job.toml").write_text((tmp_path / "body.toml").read_text())  # as a run leaves it
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*words: str) -> Job:
    """The job of `thawline train WORDS`."""
    return with_job(parse(Train, ["train", *words]), ["train", *words]).fields


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["body.toml"], f"model.name='{BODY}' in body.toml"),
        (["loss.toml"], f"fit.loss='{LOSS}' in loss.toml"),
        (["runs/old"], f"model.name='{BODY}' in runs/old"),
        (["runs/old", "--more", "1"], f"model.name='{BODY}' in runs/old"),
        (["body.toml", "--fit.loss", LOSS], f"model.name='{BODY}' in body.toml"),
        (["body.toml", "--name", "python-nets-body"], f"model.name='{BODY}' in body.toml"),
    ],
)
def test_what_a_file_names_is_refused_and_not_imported(words: list[str], field: str) -> None:
    with pytest.raises(JobError) as error:
        read(*words)
    assert str(error.value).startswith(f"{field} names code, which no file may have imported unasked")
    assert "--trust-code" in str(error.value)
    assert "nets" not in sys.modules


@pytest.mark.parametrize(
    "words",
    [
        ["body.toml", "--trust-code"],
        ["body.toml", "--model.name", BODY],
        ["body.toml", f"--model.name={BODY}"],
        ["runs/old", "--trust-code", "--more", "1"],
        ["loss.toml", "--trust-code", "--model.name", BODY],
    ],
)
def test_what_is_typed_or_trusted_is_told_and_can_be_imported_from_here(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(*words).model.name == BODY
    assert f"importing {BODY} from {here}/nets.py" in capsys.readouterr().err.splitlines()
    assert sys.path[-1] == str(here), "after what is installed, which it must not hide"
    assert "nets" not in sys.modules


def test_a_flag_that_takes_the_codes_place_leaves_nothing_to_trust(capsys: pytest.CaptureFixture[str]) -> None:
    assert read("body.toml", "--model.name", "tiny").model.name == "tiny"
    assert capsys.readouterr().err == ""


def test_one_of_torchruns_processes_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    read("body.toml", "--trust-code")
    assert capsys.readouterr().err == ""


def test_in_python_a_file_is_a_file_and_what_is_written_there_is_trusted(here: Path) -> None:
    with pytest.raises(JobError, match="names code"):
        jobs.load(here / "body.toml")
    with pytest.raises(JobError, match="names code"):
        jobs.from_toml(here / "body.toml", trust_code=[LOSS])
    job = jobs.load(here / "body.toml", trust_code=[BODY])
    assert check(job) == job == Job(manifest="a.parquet", model=Model(name=BODY))
    assert jobs.from_dict(tomllib.loads(jobs.to_toml(job)), trust_code=True) == job
    assert jobs.differences(job, Job(manifest="a.parquet")) == [f"model.name: {BODY} -> resnet34"]


def test_a_driver_imports_only_what_the_one_who_submitted_agreed_to(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / driver.JOB_FILE).write_text((here / "body.toml").read_text())
    monkeypatch.syspath_prepend(here)
    for trusted, said, notes in (
        ([], "names code", []),
        ([LOSS], "names code", []),
        ([BODY], "no manifest at", [f"importing {BODY} from {here}/nets.py"]),
    ):
        monkeypatch.setattr(sys, "argv", ["driver", *(driver.TRUST + name for name in trusted)])
        monkeypatch.chdir(here)  # which the driver leaves
        assert driver.main() == 1
        records = [log_records.decode(line) or {} for line in capsys.readouterr().out.split("\n")[:-1]]
        assert said in records[-1]["error"]
        assert [row["text"] for row in records[:-1]] == notes


@pytest.mark.slow
def test_a_run_with_ones_own_model_and_loss_is_resumed_and_used(here: Path) -> None:
    """Resumed it equals the unbroken one, its report and result tell of the code, and its bundle is validation's."""
    code = ["--model.name", BODY, "--fit.loss", LOSS, "--fit.label-smoothing", "0.1"]
    job = read(str(write_job(here, digits_manifest(here, count=120))), *code)
    whole, broken = (replace(job, name=name) for name in ("whole", "broken"))
    named = replace(whole, name="named", fit=replace(whole.fit, loss="cross_entropy"))
    made = go(whole)
    assert go(broken, stop_at_ask=3)["status"] == "stopped"
    assert made["metrics"] == go(broken)["metrics"] == go(named)["metrics"]
    assert made["code"].keys() == {BODY, LOSS}
    assert made["code"][BODY] in (here / "runs/whole/report.html").read_text()

    (one, about), (other, _) = (models.load(here / "runs" / name, trust_code=True) for name in ("whole", "broken"))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    assert about.code == {BODY: made["code"][BODY]}
    with pytest.raises(JobError, match="names code"):
        read("runs/whole", "--more", "1")


@pytest.mark.slow
@pytest.mark.cluster
def test_rays_workers_import_it_too(here: Path) -> None:
    job = write_job(here, digits_manifest(here, count=120), model=BODY)
    process = start("train", job, "--trust-code", "--fit.loss", LOSS, "--workers", "2", out=subprocess.PIPE)
    out, talk = process.communicate(timeout=200)
    assert process.returncode == 0, talk
    assert (result(here / "runs/run")["world_size"], json.loads(out)["run"]) == (2, str(here / "runs/run"))
