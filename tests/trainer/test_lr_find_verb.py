"""Does `thawline lr-find` search as the finder does, with the job's phases, and refuse what it cannot?"""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.kit.curves import bowl
from tests.kit.runs import digits_manifest, thawline, write_job
from thawline.cluster.cli import main
from thawline.cluster.job import job as jobs
from thawline.cluster.job.checks import check
from thawline.cluster.job.flags import override
from thawline.cluster.run.vision import job_learner
from thawline.trainer.context import LocalContext
from thawline.trainer.lr_finder import LrCurve, lr_find, read

# The verb --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    return write_job(folder, digits_manifest(folder, count=60))


PHASES = """
[[phases]]
steps = 5
freeze_to = 1
lr = {lr}
[[phases]]
epochs = 1
"""


@pytest.mark.parametrize(
    ("flags", "tables", "lr", "freeze_to", "told"),
    [
        ([], "", 1.0, 0, "lr = 0.0"),
        (["--fit.lr", "1e-6", "1e-4"], "", (0.01, 1.0), 0, "lr = ["),
        (["--fit.lr", "find"], "", 1.0, 0, "lr = 0.0"),
        (["--fit.recipe", "fine_tune"], "", slice(None, 1.0), -1, "lr = 0.0"),
        (["--fit.recipe", "fine_tune", "--fit.frozen_epochs", "0"], "", slice(0.005, 0.5), 0, "lr = 0.0"),
        ([], PHASES.format(lr="2e-3"), 1.0, 1, "lr = 0.0"),
        ([], PHASES.format(lr="[1e-5, 1e-3]"), (0.01, 1.0), 1, "lr = ["),
    ],
)
def test_the_verb_searches_under_the_first_phases_freezing_and_ratios(
    job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    tables: str,
    lr: Any,
    freeze_to: int,
    told: str,
) -> None:
    asked: dict[str, Any] = {}

    def search(learn: Any, **options: Any) -> LrCurve:
        asked.update(options)
        return read(bowl(), start=1e-7, end=10.0, steps=100)

    file = tmp_path / "job.toml"
    # beside phases nothing would read the length that [fit] gives
    file.write_text(job.read_text().replace("epochs = 2\n", "" if tables else "epochs = 2\n") + tables)
    monkeypatch.setattr(sys.modules[lr_find.__module__], "lr_find", search)
    monkeypatch.setattr(sys, "argv", ["thawline", "lr-find", str(file), *flags])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert not stop.value.code
    assert asked["freeze_to"] == freeze_to
    assert asked["lr"] == (pytest.approx(lr) if isinstance(lr, tuple) else lr)
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_the_verb_prints_what_the_finder_finds_and_leaves_only_the_plot(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "plots" / "curve.png"
    flags = ["--fit.recipe", "fine_tune", "--data.global_batch", "8"]
    ran = thawline("lr-find", job, "--out", out, *flags)
    assert ran.returncode == 0, ran.stderr
    with closing(job_learner(check(override(jobs.load(job), flags)), LocalContext())) as learn:
        found = lr_find(learn, lr=slice(1.0), freeze_to=-1)
    printed = json.loads(ran.stdout)
    assert printed.pop("phase") == "frozen"
    assert printed == pytest.approx(found.suggestions())
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["curve.png", "plots"]
    assert not (job.parent / "runs").exists()


def test_a_job_that_cannot_search_gets_a_sentence(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code, told in (
        ([str(job), "--fit.recipe", "fine_tune", "--fit.lr", "1e-6", "1e-4"], 1, "makes its own slices of one number"),
        ([], 2, "JOB"),
    ):
        monkeypatch.setattr(sys, "argv", ["thawline", "lr-find", *arguments])
        with pytest.raises(SystemExit) as stop:
            main.main()
        printed = capsys.readouterr()
        assert (stop.value.code, printed.out) == (code, "")
        assert told in printed.err
