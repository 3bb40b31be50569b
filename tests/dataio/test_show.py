"""Does what people are shown agree with what the model is given?"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kit.images import EVERYTHING, first, flat_manifest, photo
from thawline.dataio.errors import ManifestError
from thawline.dataio.labels.labels import by_parent, label
from thawline.dataio.pixels.geometry import centred, project
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.show import denormalise, explain, grid, show_batch
from thawline.dataio.stream.loader import ImageLoader, loaders
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import from_folder
from thawline.dataio.table.splits import by_function, split

SPEC = ImageSpec(size_px=32, presize_px=40, **EVERYTHING)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Five small photos and one that needs a prefilter, 300 x 200, of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        path = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo(*((300, 200) if i == 4 else (48, 36 + i)), seed=i)).save(path)
    table = label(from_folder(folder), by_parent())
    return split(table, by_function(lambda row: Path(str(row["path"])).stem in ("1", "4")))


def pair(manifest: Manifest, spec: ImageSpec = SPEC, **options: Any) -> tuple[ImageLoader, ImageLoader]:
    return loaders(manifest, spec, batch=4, engine="reference", **options)


def corners_in(text: str) -> np.ndarray:
    (line,) = (line for line in text.splitlines() if "the model's corners see" in line)
    return np.array(re.findall(r"(-?\d+\.\d),(-?\d+\.\d)", line), float)


def test_a_training_sample_is_told_with_its_id_shapes_and_place(photos: Manifest) -> None:
    train, _ = pair(photos)
    position = train.samples + 1  # in the second epoch
    work = train.source.work(np.array([position], np.int64))
    row = int(np.searchsorted(train.subset.ids, work.ids[0]))
    text = explain(train, position=position)
    rows = train.subset.take(np.array([row]))
    name = f"{photos.root}/{rows.paths[0]}"
    size = Path(name).stat().st_size
    for words in (
        f"training sample: epoch 1, position {position}, id {work.ids[0]}",
        f"{name}  {size:,} bytes",
        f"target     {train.classes[int(work.targets[0])]}",
        f"decoded    ({rows.heights[0]}, {rows.widths[0]}, 3) uint8",
        "warp       (32, 32, 3) uint8, one bilinear interpolation, reflect border",
        "engine: reference on cpu (asked for)",
        "images (4, 3, 32, 32) float32 channels_last",
        "targets (4,) int64, ids (4,) int64",
        "split: 4 samples, 2 classes; global batch 4, 1 steps an epoch",
    ):
        assert words in text, text
    scale, shift = work.geometry.scale[0, 0], work.geometry.shift[0, 0]
    said = re.search(r"y = (\d\.\d+) x ([+-]) (\d\.\d+)", text)
    assert said
    assert float(said[1]) == pytest.approx(scale, abs=6e-4)
    assert float(said[2] + said[3]) == pytest.approx(shift, abs=6e-4)


def test_corners_and_matrix_are_those_of_the_geometry(photos: Manifest) -> None:
    train, _ = pair(photos)
    matrix = train.source.work(np.array([2], np.int64)).geometry.homographies
    text = explain(train, position=2)
    expected = project(matrix, np.array([[[0, 0], [32, 0], [32, 32], [0, 32]]], float))[0]
    np.testing.assert_allclose(corners_in(text), expected, atol=0.051)
    printed = re.findall(r"\[\s*(-?[\d.]+)\s+(-?[\d.]+)\s+(-?[\d.]+)\]", text)
    np.testing.assert_allclose(np.array(printed, float), matrix[0], atol=6e-5)


def test_a_validation_sample_is_told_without_epoch_and_with_its_prefilter(photos: Manifest) -> None:
    _, valid = pair(photos)
    rows = {Path(path).stem: row for row, path in enumerate(valid.subset.take(np.arange(valid.samples)).paths)}
    large = explain(valid, position=rows["4"])
    size = np.array([300], np.int32), np.array([200], np.int32)
    height, width = centred(SPEC, widths=size[0], heights=size[1]).prefilter_px[0]
    assert f"validation sample: position {rows['4']}, id {valid.subset.ids[rows['4']]}" in large
    assert f"prefilter  ({height}, {width}, 3)" in large
    assert "epoch" not in large
    # The centre square of the filtered image.
    left, right = (width - height) / 2, (width + height) / 2
    expected = [[left, 0], [right, 0], [right, height], [left, height]]
    np.testing.assert_allclose(corners_in(large), expected, atol=0.3)
    assert "prefilter  not needed" in explain(valid, position=rows["1"])


def test_a_position_that_is_not_there_and_a_file_that_went_are_sentences(tmp_path: Path) -> None:
    manifest = flat_manifest(tmp_path, train=8, valid=2)
    train, valid = pair(manifest)
    for loader, position, words in (
        (valid, 2, "position 2 is not in the validation split of 2 images, .*: give 0 to 1$"),
        (valid, -1, "position -1 is not in the validation split"),
        (train, -1, "position -1 is not in the training split of 8 images, .*: give 0 or more$"),
    ):
        with pytest.raises(ManifestError, match=words):
            explain(loader, position=position)
    (name,) = valid.subset.take(np.array([1])).paths
    (Path(manifest.root) / name).unlink()
    assert "validation sample: position 0" in explain(valid)
    with pytest.raises(ManifestError, match=rf"^the validation image at position 1 cannot be used \(.*{name}: missing"):
        explain(valid, position=1)


def test_multi_label_targets_are_told_in_words(tmp_path: Path) -> None:
    train, _ = pair(flat_manifest(tmp_path, train=8, valid=2, multi_label=True))
    text = explain(train)
    (number,) = re.findall(r"id (\d+)", text)[:1]
    expected = (["even"] if int(number) % 2 == 0 else []) + [f"third{int(number) % 3}"]
    assert f"target     {', '.join(expected)}\n" in text
    assert "targets (4, 4) float32" in text


def test_denormalise_undoes_the_normalisation_and_stays_in_range() -> None:
    shown = np.random.default_rng(0).uniform(0, 1, (2, 5, 4, 3)).astype(np.float32)
    seen = torch.from_numpy((shown - np.array(SPEC.mean)) / np.array(SPEC.std)).permute(0, 3, 1, 2)
    np.testing.assert_allclose(denormalise(seen.half(), SPEC), shown, atol=2e-3)
    far = denormalise(torch.full((1, 3, 2, 2), 50.0), SPEC)
    assert (far == 1).all()


@pytest.mark.parametrize("side", ["train", "valid"])
def test_show_batch_draws_what_the_model_is_given(photos: Manifest, side: str) -> None:
    loader = pair(photos)[side == "valid"]
    count = 6 if side == "train" else 2  # validation has two
    figure = show_batch(loader, rows=2, cols=3)
    assert len(figure.axes) == (6 if side == "train" else 3)
    batches = first(loader, 2)
    expected = np.concatenate([denormalise(batch.inputs, SPEC) for batch in batches])
    names = [loader.classes[int(target)] for batch in batches for target in batch.targets]
    drawn = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(drawn) == count
    for i, image in enumerate(drawn):
        np.testing.assert_array_equal(np.asarray(image), expected[i])
        assert figure.axes[i].get_title() == names[i]
    assert not any(axes.axison for axes in figure.axes)


def test_grid_colours_titles_and_leaves_the_rest_empty() -> None:
    images = [np.full((4, 4, 3), value, np.float32) for value in (0.2, 0.4, 0.6)]
    figure = grid(images, ["a", "b", "c"], cols=2, colours=["red", "green", "red"])
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", ""]
    assert [axes.title.get_color() for axes in figure.axes[:3]] == ["red", "green", "red"]
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]
