"""The command line: does a mistake become one sentence, the right exit code, and nothing half-written?"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kit.runs import digits_manifest, environment, write_job
from thawline.cluster.cli import main
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest
from thawline.models.classifier import Classifier, create

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_manifest(tmp_path_factory.mktemp("digits"), count=60)


@pytest.fixture
def thawline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, stdout, stderr) of `thawline ARGUMENTS`, in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["thawline", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def pictures(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (90, 120, 40)).save(folder / name)
    return folder


def one_sentence(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("thawline: ")
    return lines[0]


def test_a_missing_folder(thawline: Run, tmp_path: Path) -> None:
    code, _, err = thawline("index", tmp_path / "nowhere", "--out", tmp_path / "out.parquet")
    assert code == 1
    assert str(tmp_path / "nowhere") in one_sentence(err)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder(thawline: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = thawline("index", tmp_path / "empty", "--out", tmp_path / "out.parquet")
    assert code == 1
    assert "no images" in one_sentence(err)
    assert not (tmp_path / "out.parquet").exists()


def test_a_pattern_that_matches_nothing_names_what_it_tried(thawline: Run, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", ["cat-1.jpg", "dog-2.jpg"])
    code, _, err = thawline("index", folder, "--label", r"regex:^(.+)_\d+\.jpg$", "--out", tmp_path / "out.parquet")
    sentence = one_sentence(err)
    assert code == 1
    assert "cat-1.jpg" in sentence
    assert "dog-2.jpg" in sentence
    assert not (tmp_path / "out.parquet").exists()


def test_one_class_only(thawline: Run, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", [f"cat/{i}.png" for i in range(10)])
    code, _, err = thawline("index", folder, "--out", tmp_path / "out.parquet")
    assert code == 1
    assert "cat" in one_sentence(err)
    assert not (tmp_path / "out.parquet").exists()


def test_index_words_that_mean_nothing(thawline: Run, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", ["a/1.png", "b/1.png"])
    for words in (["--label", "parents"], ["--valid", "some"], ["--delimiter", ";"], ["--valid", "1.5"]):
        code, _, err = thawline("index", folder, *words, "--out", tmp_path / "out.parquet")
        assert code == 1
        assert words[0] in one_sentence(err) or words[1] in one_sentence(err)
    assert not (tmp_path / "out.parquet").exists()


def test_more_workers_than_the_machine_can_hold(thawline: Run, tmp_path: Path, manifest: Path) -> None:
    code, _, err = thawline("train", write_job(tmp_path, manifest), "--workers", "12")
    sentence = one_sentence(err)
    assert code == 1
    assert f"{len(os.sched_getaffinity(0))} CPU cores" in sentence
    assert not (tmp_path / "runs").exists()


def test_an_unknown_field_names_the_nearest(thawline: Run, tmp_path: Path, manifest: Path) -> None:
    job = write_job(tmp_path, manifest)
    job.write_text(job.read_text().replace("epochs = 2", "epoch = 2"))
    code, _, err = thawline("train", job)
    assert code == 1
    assert "did you mean fit.epochs?" in one_sentence(err)
    assert not (tmp_path / "runs").exists()


def test_a_manifest_whose_files_moved(thawline: Run, tmp_path: Path) -> None:
    made = digits_manifest(tmp_path, count=30)
    (tmp_path / "digits").rename(tmp_path / "elsewhere")
    job = write_job(tmp_path, made)
    code, _, err = thawline("train", job)
    sentence = one_sentence(err)
    assert code == 1
    assert "--data.root" in sentence
    assert str(tmp_path / "digits") in sentence
    assert not (tmp_path / "runs").exists()
    code, out, _ = thawline("explain", job, "--data.root", tmp_path / "elsewhere")
    assert code == 0, "the remedy that the sentence gives works"
    assert str(tmp_path / "elsewhere") in out


def test_storage_that_cannot_be_written(thawline: Run, tmp_path: Path, manifest: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    code, _, err = thawline("train", write_job(tmp_path, manifest), "--storage", tmp_path / "taken" / "runs")
    assert code == 1
    assert str(tmp_path / "taken") in one_sentence(err)


def test_contradicting_sizes_backbones_and_devices(thawline: Run, tmp_path: Path, manifest: Path) -> None:
    job = write_job(tmp_path, manifest)
    for flags, words in (
        (["--data.presize_px", "20"], "presize_px=20 is smaller than size_px=32"),
        (["--augment.max_zoom", "0.5"], "max_zoom=0.5"),
        (["--model.name", "resnet19"], "resnet18"),
        (["--fit.precision", "fp16", "--device", "cpu"], "fp16"),
        (["--data.global_batch", "1"], "global_batch"),
        (["--fit.recipe", "fine_tune", "--fit.lr", "1e-6", "1e-4"], "fine_tune"),
        (["--model.weights", str(tmp_path / "none.pt")], "none.pt"),
        (["--fit.metrics", "accurcy"], "metric 'accurcy' is not known"),
        (["--fit.metrics", "mse"], "'mse' is for task number or points and this one is single_label"),
        (["--label", "column:x"], "--label with"),
        (["--checkpoint.best", "recall"], "best='recall' is not measured"),
        (["--fit.patience", "1", "--fit.monitor", "recall"], "monitor='recall' is not measured"),
        (
            ["--fit.metrics", "MulticlassSpecificity", "--checkpoint.best", "multiclass_specificity"],
            "whether a higher 'multiclass_specificity' is better is not known: the worst might count as the best",
        ),
    ):
        code, _, err = thawline("train", job, *flags)
        assert code == 1, flags
        assert not (tmp_path / "runs").exists()
        assert words in err.strip().splitlines()[-1]
        assert "Traceback" not in err


@pytest.mark.slow
def test_a_run_reads_each_manifest_and_makes_its_model_once(
    thawline: Run, tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copy(manifest, tmp_path / "other.parquet"))
    torch.save(create("tiny", 10).state_dict(), tmp_path / "tiny.pt")
    read: list[str] = []
    made: list[str] = []
    load, init = Manifest.load, Classifier.__init__

    def counted(file: str, **options: Any) -> Manifest:
        read.append(Path(file).name)
        return load(file, **options)

    def counted_init(*args: Any, **options: Any) -> None:
        made.append(options["name"])
        init(*args, **options)

    monkeypatch.setattr(Manifest, "load", counted)
    monkeypatch.setattr(Classifier, "__init__", counted_init)
    flags = ["--data.valid", other, "--fit.metrics", "accuracy", "--fit.epochs", "1"]
    model = ["--model.name", "tiny", "--model.weights", tmp_path / "tiny.pt"]
    code, out, err = thawline("train", write_job(tmp_path, manifest), *flags, *model)
    assert code == 0, err
    assert json.loads(out)["accuracy"] >= 0
    assert (sorted(read), made) == (["digits.parquet", "other.parquet"], ["tiny"])


def test_misuse_exits_2(thawline: Run, tmp_path: Path) -> None:
    assert thawline()[0] == 2
    code, _, err = thawline("trian", "x.toml")
    assert code == 2
    assert "did you mean train?" in err
    assert thawline("train")[0] == 2
    assert thawline("sample", "cats", tmp_path / "cats")[0] == 2
    assert thawline("show", "x.toml")[0] == 2
    assert not (tmp_path / "cats").exists()


def test_help_names_every_verb(thawline: Run) -> None:
    code, out, _ = thawline("--help")
    assert code == 0
    assert re.findall(r"^\W +• ([\w-]+) ", out, re.MULTILINE) == list(main.VERBS)


def test_index_by_parent_by_column_and_by_several_labels(thawline: Run, tmp_path: Path) -> None:
    from thawline.dataio.table.manifest import Manifest

    folder = pictures(tmp_path / "in", [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(5)])
    code, out, _ = thawline("index", folder, "--valid", "0.2", "--out", tmp_path / "parent.parquet")
    assert (code, out.strip()) == (0, str(tmp_path / "parent.parquet"))
    made = Manifest.load(tmp_path / "parent.parquet")
    assert made.classes == ("cat", "dog")
    assert len(made.subset("valid").ids) == 2

    rows = [f"{name}/{i}.png,{name};{'big' if i else 'small'},{i == 0}" for name in ("cat", "dog") for i in range(5)]
    (folder / "labels.csv").write_text("\n".join(["file,what,valid", *rows]))
    code, _, err = thawline(
        *("index", folder / "labels.csv", "--label", "column:what", "--delimiter", ";"),
        *("--valid", "column:valid", "--out", tmp_path / "column.parquet"),
    )
    assert code == 0, err
    made = Manifest.load(tmp_path / "column.parquet")
    assert (made.task, made.classes) == ("multi_label", ("big", "cat", "dog", "small"))
    assert made.subset("valid").take(np.arange(2)).labels.to_pylist() == [["cat", "small"], ["dog", "small"]]


def test_explain_show_and_doctor(thawline: Run, tmp_path: Path, manifest: Path) -> None:
    job = write_job(tmp_path, manifest)
    code, out, _ = thawline("explain", job)
    assert code == 0
    assert "(24, 3, 32, 32) float32 channels_last" in out
    code, out, _ = thawline("show", job, "--out", tmp_path / "deep" / "show.png")
    assert code == 0
    with Image.open(tmp_path / "deep" / "show.png") as picture:
        assert picture.width > 800
    code, out, _ = thawline("explain", manifest)
    assert code == 0, "a manifest is a job with all defaults"
    assert "(48, 3, 224, 224)" in out, "no more than there are for training"
    code, out, _ = thawline("doctor", "--storage", tmp_path / "runs")
    assert "engine dali" in out
    assert code == 0


def test_a_picture_is_looked_for_a_place_before_the_work(
    thawline: Run, tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the work comes after")

    job = write_job(tmp_path, manifest)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr("thawline.cluster.run.vision.job_loaders", work)
        patch.setattr("thawline.cluster.run.vision.split_loaders", work)
        for verb in ("show", "lr-find"):
            for out, said in (
                ("a.exe", "not a kind of picture"),
                ("folder.png", "Is a dir"),
                ("file/a.png", "File exists"),
            ):
                code, _, err = thawline(verb, job, "--out", tmp_path / out)
                assert code == 1
                assert said in one_sentence(err)
    code, out, _ = thawline("show", job, "--out", tmp_path / "batch")
    assert (code, out.strip()) == (0, str(tmp_path / "batch.png")), "the name that was written"
    assert (tmp_path / "batch.png").exists()


def test_what_was_found_is_printed_before_it_is_drawn(
    thawline: Run, tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thawline.trainer.lr_finder import LrCurve

    found = LrCurve(tuple(1e-5 * 2**i for i in range(40)), tuple(4.0 - i / 10 for i in range(40)), (1.0,) * 40)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules[LrCurve.__module__], "lr_find", lambda *_, **__: found)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: fail())
    code, out, err = thawline("lr-find", write_job(tmp_path, manifest), "--out", tmp_path / "lr.png")
    assert code == 1
    assert json.loads(out)["valley"] == found.valley
    assert "lr.png cannot be written (No space left on device)" in err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_run_that_was_stopped_is_not_taken_for_finished(
    thawline: Run, tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = {"status": "stopped", "steps": 3}
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143), (0, 143)):

        def launch(*_: object, number: int = number, **__: object) -> dict[str, object]:
            monkeypatch.setattr("thawline.cluster.run.signals._stop_signal", number)
            return stopped

        monkeypatch.setattr("thawline.cluster.launch.launch.launch", launch)
        code, out, err = thawline("train", write_job(tmp_path, manifest))
        assert (code, out) == (status, "")
        assert "stopped at step 3; the same command resumes it" in err
        assert "size_px = 32" in err, "what the job sets"
        assert "cpus_per_worker" not in err, "no field that has its default"
    assert "cpus_per_worker = 1.0" in thawline("train", write_job(tmp_path, manifest), "--print-job")[2]


def test_a_finished_run_without_its_rows_still_has_its_result(thawline: Run, tmp_path: Path, manifest: Path) -> None:
    from thawline.cluster.job import job as jobs
    from thawline.cluster.run import folder as storage

    file = write_job(tmp_path, manifest)
    job = jobs.resolved(jobs.load(file))
    storage.open_run(job)
    folder = Path(storage.run_dir(job))
    numbers = {"images_per_s": 1.0, "data_wait_fraction": 0.0, "wall_s": 2.0, "stream_hash": "ab", "notes": ["a note"]}
    text = json.dumps({"status": "finished", "metrics": {"accuracy": None}, **numbers})
    storage.write_text(Root.of(folder), "result.json", text)
    for rows in (b"", b"PAR1 and then nothing", None):
        (folder / "rows.parquet").unlink(missing_ok=True)
        if rows is not None:
            (folder / "rows.parquet").write_bytes(rows)
        code, out, err = thawline("train", file)
        assert code == 0
        assert json.loads(out)["accuracy"] is None
        assert "rows.parquet cannot be read" in err
        assert "a note" in err
        assert "report.html was not written" in err
    (folder / "report.html").touch()
    assert f"see {folder / 'report.html'}" in thawline("train", file)[2]
    (folder / "result.json").write_text("{}")
    code, _, err = thawline("train", file)
    assert code == 1
    assert "result.json cannot be understood" in one_sentence(err)


def test_a_real_process_shows_no_traceback_and_debug_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thawline.cluster.cli", "train", str(tmp_path / "none.toml")]
    quiet = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert quiet.returncode == 1
    assert quiet.stdout == ""
    one_sentence(quiet.stderr)
    loud = subprocess.run([*command, "--debug"], capture_output=True, text=True, env=environment(), check=False)
    assert "Traceback" in loud.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("train j.toml --workers 2 8 --address auto", None),
        ("submit j.toml --address http://h:8265 --name a --follow --package installed --fit.lr 1e-3", None),
        ("stop a --address http://h:8265 --now", None),
        ("logs a --follow", None),
        ("list", None),
        ("token --create", None),
        ("index photos --out a.parquet", None),
        ("status --help", 0),
        ("submit j.toml --fit.epoch 3", 2),
        ("status", 2),
        ("stop a b", 2),
        ("sumbit j.toml", 2),
        ("submit", 2),
    ],
)
def test_a_command_line_can_be_checked_without_running_it(words: str, status: int | None) -> None:
    if status is None:
        main.check_arguments(words.split())
        return
    with pytest.raises(SystemExit) as ended:
        main.check_arguments(words.split())
    assert ended.value.code == status
