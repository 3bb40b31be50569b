"""`thawline train photos/`: is it the run of index and train, killed or not, and does it say what changed?"""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.kit.runs import fork, result, thawline, wait_for_step
from thawline.cluster.cli import photos
from thawline.cluster.cli.index import make_manifest
from thawline.cluster.cli.index_options import SourceOptions
from thawline.cluster.errors import StorageError
from thawline.cluster.job.job import Job
from thawline.dataio.table.manifest import Manifest

SMALL = [
    *("--model.name", "tiny", "--model.weights", "none", "--data.size-px", "32", "--data.presize-px", "40"),
    *("--data.global-batch", "16", "--fit.recipe", "one_cycle", "--fit.epochs", "3", "--metrics.port", "0"),
    *("--log-every", "1", "--checkpoint.every-s", "0"),
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """60 pictures in a folder a class, and a list of them."""
    folder, lines = tmp_path / "photos", ["path,kind"]
    for i in range(60):
        name = f"{('cat', 'dog')[i % 2]}/{i}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (4 * i, 200 * (i % 2), 99)).save(folder / name)
        lines.append(f"{name},{i % 3}")
    (tmp_path / "photos.csv").write_text("\n".join(lines))
    return folder


def indexed(job: Job, source: Path, **options: object) -> Manifest:
    return Manifest.load(photos.indexed(job, str(source), SourceOptions(**options), fresh=False))  # type: ignore[arg-type]


def test_a_source_is_indexed_once_into_the_run_s_folder_and_what_changed_is_told(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(name="photos", storage=str(tmp_path / "runs"))
    first = indexed(job, pictures)
    assert first.fingerprint() == make_manifest(pictures).fingerprint()
    assert "60 images: 48 train, 12 valid" in capsys.readouterr().err
    assert indexed(job, pictures).rows == first.rows
    assert f"{pictures} was indexed before: 60 images, as they are now" in capsys.readouterr().err
    (pictures / "cat/0.png").rename(pictures / "dog/new.png")
    assert indexed(job, pictures).rows == first.rows
    said = capsys.readouterr().err
    assert "has changed since it was indexed: 1 new ('dog/new.png'), 1 gone ('cat/0.png'); this run stays with" in said
    with pytest.raises(StorageError, match=r"indexed otherwise \(valid: 0\.2 -> 0\.5\): .* --name, or --fresh"):
        indexed(job, pictures, valid="0.5")
    anew = photos.indexed(job, str(pictures), SourceOptions(valid="0.5"), fresh=True)
    assert Manifest.load(anew).splits() == ["train", "valid"]
    assert len(Manifest.load(anew).subset("valid").ids) == 30


def test_a_list_s_new_labels_are_told_and_a_killed_indexing_leaves_nothing_that_counts(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, listed = Job(name="listed", storage=str(tmp_path / "runs")), pictures.parent / "photos.csv"
    listed.write_text(listed.read_text().replace("cat/", "photos/cat/").replace("dog/", "photos/dog/"))
    with monkeypatch.context() as patched:
        patched.setattr("thawline.cluster.run.folder.write_text", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            indexed(job, listed, label="column:kind")
    assert (tmp_path / "runs/listed/manifest.parquet").is_file()
    made = indexed(job, listed, label="column:kind")
    assert made.classes == ("0", "1", "2")
    listed.write_text(listed.read_text().replace("cat/0.png,0", "cat/0.png,1"))
    capsys.readouterr()
    indexed(job, listed, label="column:kind")
    assert "1 labelled otherwise ('photos/cat/0.png')" in capsys.readouterr().err
    listed.unlink()
    indexed(job, listed, label="column:kind")
    assert "cannot be compared with that now" in capsys.readouterr().err
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/other/job.toml").write_text("")
    with pytest.raises(StorageError, match="holds a run that was not made from a folder or a list"):
        indexed(replace(job, name="other"), pictures)


def test_a_point_that_an_image_does_not_show_is_no_change(pictures: Path) -> None:
    listed = pictures.parent / "points.csv"
    names = [f"photos/{path.relative_to(pictures)}" for path in sorted(pictures.rglob("*.png"))]
    listed.write_text(
        "\n".join(["path,x,y", *[f"{name},{i % 9},3" if i % 2 else f"{name},," for i, name in enumerate(names)]])
    )
    options = SourceOptions(label="points:x,y", swap=("none",))
    make_manifest(listed, **vars(options)).save(pictures.parent / "points.parquet")
    assert "60 images, as they are now" in photos.changes(str(pictures.parent / "points.parquet"), str(listed), options)


def test_a_file_that_is_another_or_gone_is_told_though_its_name_stands_as_before(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, listed = Job(name="listed", storage=str(tmp_path / "runs")), pictures.parent / "photos.csv"
    options = SourceOptions(label="mask:masks/{stem}.png", classes="ground,disc")
    masks = pictures.parent / "masks"
    masks.mkdir()
    for i in range(60):
        Image.new("L", (40, 36), i % 2).save(masks / f"{i}.png")
    listed.write_text(listed.read_text().replace("cat/", "photos/cat/").replace("dog/", "photos/dog/"))
    indexed(job, listed, **vars(options))
    for file in (*pictures.rglob("*.png"), *masks.iterdir()):
        os.utime(file, (0, 0))  # as if the index had been made long after
    os.utime(pictures / "cat/6.png")  # written anew, with what it held
    shutil.copy2(pictures / "dog/3.png", pictures / "cat/0.png")  # with its time, and another size
    (pictures / "dog/1.png").unlink()
    Image.new("L", (40, 36), 1).save(masks / "2.png")
    capsys.readouterr()
    indexed(job, listed, **vars(options))
    said = capsys.readouterr().err
    assert "1 gone ('photos/dog/1.png'), 2 replaced by other files ('photos/cat/0.png', 'photos/cat/2.png');" in said


def test_what_is_images_and_what_is_a_job(pictures: Path, tmp_path: Path) -> None:
    for given in (pictures, f"{pictures}/", pictures.parent / "photos.csv", "s3://bucket/photos", "s3://b/rows.csv"):
        assert photos.is_source(str(given)), given
        assert photos.name_of(str(given)) in ("photos", "rows")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/manifest.arrow").touch()
    for given in (
        tmp_path / "pack",
        "job.toml",
        "a.parquet",
        "s3://bucket/a.parquet",
        "s3://bucket/job.toml",
        "nothing",
    ):
        assert not photos.is_source(str(given)), given


@pytest.mark.slow
def test_killed_while_indexing_and_while_training_it_is_the_unbroken_run(pictures: Path, tmp_path: Path) -> None:
    def command(storage: str) -> list[str]:
        return ["train", str(pictures), *SMALL, "--storage", str(tmp_path / storage)]

    whole = thawline(*command("whole"))
    assert whole.returncode == 0, whole.stderr
    assert "60 images: 48 train, 12 valid" in whole.stderr
    broken = tmp_path / "broken/photos"
    first = fork(*command("broken"))
    while not (broken / "claim.json").exists():  # it holds the folder: it indexes from here on
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert not (broken / "index.json").exists()
    second = fork(*command("broken"))
    wait_for_step(broken, 3, second)
    second.kill()
    second.communicate()
    assert not (broken / "result.json").exists()
    last = thawline(*command("broken"))
    assert last.returncode == 0, last.stderr
    assert "as they are now" in last.stderr
    one, other = result(tmp_path / "whole/photos"), result(broken)
    assert (one["stream_hash"], one["metrics"]) == (other["stream_hash"], other["metrics"])
