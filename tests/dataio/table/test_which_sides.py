"""Which of train, valid and test do a job's images have to be on, for which verb; and what if it names no manifest?"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from thawline.cluster.cli.index import make_manifest
from thawline.cluster.cli.main import VERBS
from thawline.cluster.cli.verbs import parse, with_job
from thawline.cluster.errors import JobError, StorageError
from thawline.cluster.job.job import Job, from_toml
from thawline.cluster.run import run, vision
from thawline.cluster.run.folder import inspect, spare_images
from thawline.cluster.run.loaded import Loaded
from thawline.dataio.errors import ManifestError, SourceError
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.show import explain
from thawline.dataio.stream.loader import loaders
from thawline.trainer.context import LocalContext


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cats and four dogs, no two alike."""
    root = tmp_path_factory.mktemp("in")
    for i in range(8):
        file = root / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * i, 0, 99)).save(file)
    return root


def job_on(folder: Path, name: str, **words: Any) -> Job:
    make_manifest(folder / "photos", **words).save(folder / name)
    return Job(name=name, manifest=str(folder / name), storage=str(folder / "runs"))


def test_a_manifest_of_test_images_is_explained_and_training_says_what_it_lacks(folder: Path) -> None:
    job = job_on(folder, "test.parquet", test="all")
    (loader,) = vision.split_loaders(job, LocalContext())
    assert explain(loader).startswith("test sample: position 0, id 0\n")
    assert [len(batch.ids) for batch in loader.stream()] == [8]
    with pytest.raises(
        ManifestError, match=r"test\.parquet has images for test alone, and training needs some for train"
    ):
        inspect(job)
    both = job_on(folder, "both.parquet", valid="0.25", test="0.25")
    sides = [explain(loader).partition(":")[0] for loader in vision.split_loaders(both, LocalContext())]
    assert sides == ["training sample", "validation sample", "test sample"]


def test_training_says_which_classes_one_side_lacks(folder: Path) -> None:
    made = make_manifest(folder / "photos", valid="folder:dog", classes="cat,dog,owl")
    train, valid = loaders(made, ImageSpec(size_px=32, presize_px=32), batch=4, engine="reference")
    for rank, told in ((0, 2), (1, 0)):
        learner: Any = SimpleNamespace(train=train, valid=valid, context=SimpleNamespace(rank=rank))
        lines = run._class_warnings(learner)
        assert len(lines) == told
    learner.context.rank = 0
    trained, measured = run._class_warnings(learner)
    assert trained.startswith("WARNING: no training images of 2 of 3 classes (dog, owl): they cannot be learned")
    assert measured.startswith(
        "WARNING: no validation images of 2 of 3 classes (cat, owl): they are measured by no metric"
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda at: at.mkdir(),
            JobError,
            r"no manifest, .*: index it first: thawline index '.*/my x' --out 'my x\.parquet'",
        ),
        (
            lambda at: at.with_suffix(".csv.gz").touch(),
            JobError,
            r"is a list and .* --label column:NAME --out 'my x\.parquet'",
        ),
        (
            lambda at: at.with_suffix(".xlsx").touch(),
            SourceError,
            "is a workbook, which is not read: save its sheet as CSV",
        ),
        (lambda at: (at / "manifest.arrow").mkdir(parents=True), JobError, "is a folder and no manifest"),
        (
            lambda at: write(at / "manifest.arrow"),
            JobError,
            r"takes the manifest\.arrow in it; give .*/my x/manifest\.arrow",
        ),
        (lambda at: write(at / "job.toml"), JobError, r"takes the job\.toml in it; give .*/my x/job\.toml"),
    ],
    ids=["folder", "list", "workbook", "folder of folders", "pack", "run"],
)
def test_what_is_to_be_indexed_first_is_told(
    tmp_path: Path, make: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    make(tmp_path / "my x")
    (given,) = tmp_path.iterdir()
    packed = (given / "manifest.arrow").is_file()
    for verb in ("train", "show") if packed else ("show",):  # `train` indexes the others, or trains the run's job
        with pytest.raises(error, match=message):
            read_job(str(given), verb)


def read_job(given: str, verb: str) -> None:
    words = [verb, given, "--out", "x.png"] if verb == "show" else [verb, given]
    with_job(parse(VERBS[verb], words), words)


def write(file: Path) -> None:
    file.parent.mkdir()
    file.touch()


def test_a_name_that_no_file_can_have_is_told() -> None:
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(JobError, match=r"cannot be the name of a file|cannot be read as a job") as caught:
            read_job(name, "train")
        assert len(str(caught.value)) < 300


def test_a_job_and_classes_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    (folder / "job.toml").write_text('manifest = "a.parquet"\n', encoding="utf-8-sig")
    assert from_toml(folder / "job.toml").manifest == "a.parquet"
    (folder / "classes.txt").write_text("dog\ncat\n", encoding="utf-8-sig")
    assert make_manifest(folder / "photos", classes=str(folder / "classes.txt")).classes == ("dog", "cat")


def test_a_picture_is_never_written_over_one_of_the_jobs_images(folder: Path, tmp_path: Path) -> None:
    job = job_on(folder, "own.parquet", valid="0.25")
    linked = tmp_path / "linked.png"
    linked.symlink_to(folder / "photos" / "cat" / "0.png")
    for out in (folder / "photos" / "cat" / "0.png", linked):
        with pytest.raises(StorageError, match="is one of the job's images: it would be lost"):
            spare_images(out, Loaded(job))
    for i in range(8):
        mask = Image.new("L", (40, 40), 1)
        mask.putpixel((i, 0), 2)
        mask.save(folder / f"{i}.png")
    masked = job_on(folder, "masked.parquet", label=f"mask:{folder}/{{stem}}.png", values="1,2", valid="0.25")
    with pytest.raises(StorageError, match="is one of the job's images"):
        spare_images(folder / "3.png", Loaded(masked))
    (tmp_path / "batch.png").touch()
    for other in (tmp_path / "batch.png", tmp_path / "none.png", None):
        spare_images(other, Loaded(job))
