"""Does `thawline.load(RUN).predict` say of the validation files what the run's own validation said of them?"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import thawline
from tests.cluster.run.test_tasks import job_of, spoken_by_the_bundle
from tests.kit.hostile import pictures
from tests.kit.runs import environment
from thawline import ImageSpec, by_folder, by_function, from_folder, label, models, split, split_loader
from thawline.cluster.errors import PredictError
from thawline.cluster.launch.launch import in_process
from thawline.cluster.serve.predictor import Predictor
from thawline.dataio.errors import EngineError
from thawline.dataio.shapes import SETS
from thawline.dataio.stream.render import Item, rendered
from thawline.dataio.stream.renderer import Choice, EngineName, Renderer
from thawline.dataio.table.manifest import Manifest
from thawline.models.bundle import Description
from thawline.trainer.errors import RecipeError

pytestmark = pytest.mark.slow  # trains a run of each task, once


class Trained:
    """A run, its validation files in the order of their rows, and what it says of them."""

    def __init__(self, folder: Path, task: str, engine: str) -> None:
        self.job = job = job_of(folder, task, data={"engine": engine}, fit={"epochs": 1})
        in_process(job)
        self.run = folder / "runs" / task
        self.manifest = Manifest.load(job.manifest)
        self.rows = pq.read_table(self.run / "valid.parquet").to_pylist()
        paths = dict(zip(*(self.manifest.rows[name].to_pylist() for name in ("id", "path")), strict=True))
        self.files = [Path(self.manifest.root, paths[row["id"]]) for row in self.rows]
        self.predictor: Predictor = thawline.load(self.run)


ABOUT: dict[str, Any] = {
    "model": "tiny",
    "outputs": 2,
    "task": "single_label",
    "classes": ("even", "odd"),
    "precision": "fp32",
    "step": 0,
}
ENGINES = {"single_label": "dali", "multi_label": "reference"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Trained]]:
    """By task; one with DALI, which the others need not start."""
    folder = tmp_path_factory.mktemp("predict")
    trained = {task: Trained(folder, task, ENGINES.get(task, "reference")) for task in SETS}
    with ExitStack() as opened:
        for run in trained.values():
            opened.enter_context(run.predictor)
        yield trained


@pytest.mark.parametrize("task", ["single_label", "multi_label", "number"])
def test_what_is_predicted_is_what_validation_wrote(runs: dict[str, Trained], task: str) -> None:
    """Bitwise in validation's batches, to 1e-5 in others."""
    trained = runs[task]
    for batch, tolerance in ((10, 0.0), (3, 1e-5)):
        said = trained.predictor.predict(trained.files, batch=batch)
        assert [each.name for each in said] == [str(file) for file in trained.files]
        for each, row in zip(said, trained.rows, strict=True):
            if task == "number":
                assert each.prediction == pytest.approx(row["prediction"], rel=tolerance, abs=0)
                continue
            assert each.prediction == row["prediction"]
            assert each.probability == pytest.approx(row["probability"], rel=tolerance, abs=0)
            assert each.probability == max(each.probabilities.values())
            assert each.probabilities.keys() == set(trained.manifest.classes)


def test_points_lie_in_the_images_own_pixels(runs: dict[str, Trained]) -> None:
    """The pictures are squares of 64 px; a run says where points lie between -1 and 1."""
    trained = runs["points"]
    for each, row in zip(trained.predictor.predict(trained.files), trained.rows, strict=True):
        expected = (np.array(row["prediction"]) + 1) / 2 * 64
        np.testing.assert_allclose(each.points, expected, rtol=1e-5)
        assert list(each.prediction) == list(trained.manifest.classes)
        np.testing.assert_allclose(list(each.prediction.values()), expected, rtol=1e-5)


def test_masks_have_the_size_of_their_images(runs: dict[str, Trained]) -> None:
    """The model sees 32 px of 64: each of its pixels is four of the image's."""
    trained = runs["mask"]
    ids, outputs, _ = spoken_by_the_bundle(trained.job, trained.run)
    assert ids == [row["id"] for row in trained.rows]
    squares = outputs.argmax(1).numpy()
    for each, row, square in zip(trained.predictor.predict(trained.files), trained.rows, squares, strict=True):
        assert each.prediction == row["prediction"]
        np.testing.assert_array_equal(each.mask, square.repeat(2, 0).repeat(2, 1))


def test_an_image_may_be_given_in_any_form_alone_or_among_others(runs: dict[str, Trained], tmp_path: Path) -> None:
    """Files, bytes, arrays and pictures of Pillow that hold the same pixels get the same answer."""
    trained = runs["multi_label"]
    file = trained.files[0]
    pixels = np.array(Image.open(file).convert("RGB"))
    forms: list[Any] = [str(file), file, file.read_bytes(), pixels, Image.open(file), file.as_uri()]
    alone = trained.predictor.predict(file)
    assert alone.name == str(file)
    more: list[Any] = [tmp_path / "none.png", b"text", np.dstack([pixels, pixels[..., :1]])]
    said = trained.predictor.predict(iter([*forms, *more]))
    assert [each.name for each in said[2:5]] == ["image 2", "image 3", "image 4"]
    assert [each.error for each in said] == [*[None] * 6, "missing", "not an image", None]
    used = [*said[:6], said[8]]
    assert all(each.probabilities == pytest.approx(alone.probabilities, abs=1e-5) for each in used)
    assert all(each.prediction == alone.prediction for each in used)
    with pytest.raises(EngineError, match=r"none.png cannot be used \(missing\): nothing is said of it"):
        trained.predictor.predict(tmp_path / "none.png")
    unfit: tuple[Any, ...] = (7, pixels / 255)
    for wrong in unfit:
        with pytest.raises(PredictError, match=r"image 0 is a .*: a model sees nothing in it; give a path, bytes"):
            trained.predictor.predict(wrong)


def test_thresholds_and_the_most_probable_are_a_plain_count(runs: dict[str, Trained]) -> None:
    trained = runs["multi_label"]
    plain = trained.predictor.predict(trained.files)
    middle = float(np.median([p for each in plain for p in each.probabilities.values()]))
    for each, cut in zip(plain, trained.predictor.predict(trained.files, threshold=middle, top_k=2), strict=True):
        above = {name for name, p in each.probabilities.items() if p > middle}
        assert cut.prediction == [name for name in trained.manifest.classes if name in above]
        assert list(cut.probabilities.items()) == sorted(each.probabilities.items(), key=lambda pair: -pair[1])[:2]
    with pytest.raises(PredictError, match=r"threshold=0.5 with task single_label: it is for images with several"):
        runs["single_label"].predictor.predict([], threshold=0.5)
    with pytest.raises(PredictError, match=r"threshold=2 is no probability"):
        trained.predictor.predict([], threshold=2)
    with pytest.raises(PredictError, match=r"top_k=2 with task number: it has no probabilities of classes"):
        runs["number"].predictor.predict([], top_k=2)
    with pytest.raises(RecipeError, match=r"tta with task='mask'"):
        runs["mask"].predictor.predict([], tta=2)
    with pytest.raises(PredictError, match=r"tta=-1, top_k=0, batch=64"):
        trained.predictor.predict([], tta=-1)


def test_a_device_that_is_not_there_is_told(runs: dict[str, Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PredictError, match=r"device='cuda:3', but torch sees 0 GPUs here.*give device='cpu'"):
        thawline.load(runs["number"].run, device="cuda:3")
    with pytest.raises(PredictError, match=r"device='gpu' is not known: give cpu, cuda, or cuda:1"):
        thawline.load(runs["number"].run, device="gpu")


def test_views_are_averaged_as_the_learner_averages_them(runs: dict[str, Trained]) -> None:
    """By hand, from what is rendered; the views are those of the run's own augmentation."""
    trained = runs["multi_label"]
    predictor = trained.predictor
    assert not predictor.spec.flip
    predictor.spec = replace(predictor.spec, rotate_deg=30.0)  # the run's own leaves every view as it is
    predictor.close()
    items = [Item(str(file), file.read_bytes) for file in trained.files]
    with Renderer(spec=predictor.spec, local_batch=64, choice=Choice("reference", "")) as renderer, torch.no_grad():
        seen = [*rendered(items, renderer, views=2, tell=lambda number, reason: None)]
    bundled, _ = models.load(trained.run)
    with torch.no_grad():
        first, *views = (bundled(batch.inputs).sigmoid().double().numpy() for batch in seen)
    expected = 0.25 * first + 0.75 * (views[0] + views[1]) / 2
    found = [
        [each.probabilities[name] for name in trained.manifest.classes]
        for each in predictor.predict(trained.files, tta=2)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected - first).max() > 1e-3


def test_the_bundle_says_what_pillows_pixels_change(runs: dict[str, Trained]) -> None:
    """By a plain count over both engines' answers."""
    trained = runs["single_label"]
    names, said = trained.manifest.classes, {}
    for engine in ("dali", "reference"):
        with thawline.load(trained.run, engine=engine) as predictor:
            answers = predictor.predict(trained.files)
        said[engine] = np.array([[each.probabilities[name] for name in names] for each in answers], np.float64)
    off = np.abs(said["dali"] - said["reference"])
    same = (said["dali"].argmax(1) == said["reference"].argmax(1)).mean()
    expected = {"images": 10, "largest": off.max(), "mean": off.mean(), "agreement": same}
    assert trained.predictor.about.pillow == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert expected["largest"] > 0
    assert runs["multi_label"].predictor.about.pillow == {}


ALONE = """
import json, logging, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nvidia", "ray", "torchmetrics", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
logging.basicConfig(format="%(message)s")
import thawline
said = thawline.load(sys.argv[1]).predict(sys.argv[2:])
print(json.dumps([[each.prediction, each.probability] for each in said]))
"""


def test_neither_ray_nor_dali_need_be_there_and_a_line_says_who_decodes(runs: dict[str, Trained]) -> None:
    trained = runs["single_label"]
    command = [sys.executable, "-c", ALONE, str(trained.run), *map(str, trained.files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    told = (
        r"DALI cannot be imported \(.*\): Pillow decodes, whose JPEGs differ by a few levels. On 10 validation images "
        r"that moved what it says by .* with the same prediction for .* of them; install nvidia-dali-cuda130 for the "
        r"same"
    )
    assert re.fullmatch(rf"{trained.run} was validated with DALI, and {told}\n", done.stderr)
    with thawline.load(trained.run, engine="reference") as predictor:
        expected = [[each.prediction, each.probability] for each in predictor.predict(trained.files)]
    for one, other in zip(json.loads(done.stdout), expected, strict=True):
        assert one == [other[0], pytest.approx(other[1], abs=1e-6)]


@pytest.mark.parametrize("engine", ["dali", "reference"])
def test_hostile_files_have_the_pixels_of_a_run_or_its_reasons(engine: EngineName, tmp_path: Path) -> None:
    kept = {name: data for name, data in pictures().items() if "/" not in name and "12000" not in name}
    for side in ("train", "valid"):
        (tmp_path / side).mkdir()
    for name, data in kept.items():
        (tmp_path / "valid" / name).write_bytes(data)
    for name in ("rgb.jpg", "rgb.png"):
        (tmp_path / "train" / name).write_bytes(kept[name])
    listed = from_folder(tmp_path, extensions=sorted({Path(name).suffix for name in kept}))
    labelled = label(listed, by_function(lambda row: "even" if len(row["path"]) % 2 else "odd"))
    manifest = split(labelled, by_folder("valid"), max_bad=1)
    spec = ImageSpec(size_px=32, presize_px=40)
    model = models.create("tiny", 2, weights="none", seed=0).eval()
    with split_loader(manifest, spec, "valid", global_batch=16, engine=engine) as loader, torch.no_grad():
        expected = torch.cat([model(batch.inputs).softmax(1) for batch in loader.stream()]).numpy()
        paths = loader.subset.take(np.arange(len(loader.subset))).paths
    about = Description(**ABOUT, engine=engine, image={"size_px": 32, "presize_px": 40})
    broken = {row["path"]: row["status"] for row in manifest.quarantined().to_pylist()}
    with Predictor(models.Bundle(model, about)) as predictor:
        said = predictor.predict([tmp_path / path for path in [*paths, *broken]], batch=16)
    assert len(paths) > 90
    found = [[each.probabilities[name] for name in manifest.classes] for each in said[: len(paths)]]
    np.testing.assert_array_equal(found, expected)
    assert [each.error for each in said[len(paths) :]] == list(broken.values())
