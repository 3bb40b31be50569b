"""Does a number that a table gives reach the model as it stands there, and is one that is not there spoken of?"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thawline.cluster.cli.index import make_manifest
from thawline.dataio.checks.census import label_moments
from thawline.dataio.errors import LabelError, ManifestError
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import loaders
from thawline.dataio.table.manifest import Manifest


def listed(folder: Path, **columns: list[Any]) -> Path:
    """A CSV with a picture a row."""
    count = len(next(iter(columns.values())))
    for i in range(count):
        Image.new("RGB", (20, 16), (i, 0, 0)).save(folder / f"{i}.png")
    with (folder / "list.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", *columns])
        lines.writerows([f"{i}.png", *row] for i, row in enumerate(zip(*columns.values(), strict=True)))
    return folder / "list.csv"


def test_numbers_are_standardised_by_the_training_images_and_targets_in_their_own_units(tmp_path: Path) -> None:
    length, width = [2026.5, 2027, 2030, 1e6, 2021.25], [0.5, -1, 0.25, 3, 1]
    file = listed(tmp_path, length=length, width=width, split=["train"] * 3 + ["valid"] * 2)
    made = make_manifest(file, label="number:length,width", valid="column:split")
    made.save(tmp_path / "m.parquet")
    manifest = Manifest.load(tmp_path / "m.parquet")
    assert (manifest.task, manifest.classes) == ("number", ("length", "width"))
    moments = label_moments(manifest)
    assert moments is not None
    np.testing.assert_allclose(moments[0], [np.mean(length[:3]), np.mean(width[:3])])
    np.testing.assert_allclose(moments[1], [np.std(length[:3]), np.std(width[:3])])
    _, valid = loaders(manifest, ImageSpec(size_px=16, presize_px=16), batch=2, engine="reference")
    with valid:
        (batch,) = valid.stream()
    np.testing.assert_array_equal(batch.targets, np.array([[1e6, 3], [2021.25, 1]], np.float32))
    again = make_manifest(tmp_path / "m.parquet", label="number:label", path_column="path", valid="column:split")
    assert again.rows["label"].to_pylist() == manifest.rows["label"].to_pylist(), (
        "as the remedy for a changed table says"
    )


def test_an_image_without_its_number_is_spoken_of_or_left_out(tmp_path: Path) -> None:
    file = listed(tmp_path, age=["1", "", "nan", "4.5", "NaN", "7"])
    with pytest.raises(LabelError, match=r"gives 3 of 6 images no label \(1.png, 2.png, 4.png\).*--skip-unlabelled"):
        make_manifest(file, label="number:age")
    kept = make_manifest(file, label="number:age", valid="0.4", skip_unlabelled=True)
    assert kept.rows["label"].to_pylist() == [[1.0], [4.5], [7.0]]
    assert any("3 of 6 images are left out" in note for note in kept.notes)


@pytest.mark.parametrize(
    ("ages", "told"),
    [
        (["1", "n/a"], r"'1\.png'|1\.png what is not a number \(.*n/a.*give finite numbers"),
        (["inf", "2"], r"0\.png what is not a number \(inf is not finite\)"),
        (["1", "-1e39"], r"1\.png what is not a number \(-1e39 is not finite in float32\)"),
    ],
)
def test_what_is_no_number_gets_a_sentence(tmp_path: Path, ages: list[str], told: str) -> None:
    with pytest.raises(LabelError, match=told):
        make_manifest(listed(tmp_path, age=ages), label="number:age")


def test_a_number_that_is_always_the_same_cannot_be_learned(tmp_path: Path) -> None:
    made = make_manifest(listed(tmp_path, age=[3, 3, 3, 3]), label="number:age", valid="0.25")
    with pytest.raises(ManifestError, match="the 3 training images have the same age: there is nothing to learn"):
        label_moments(made)


def test_numbers_that_float32_takes_for_one_another_cannot_be_learned(tmp_path: Path) -> None:
    made = make_manifest(listed(tmp_path, at=[1.7e9 + i for i in range(8)]), label="number:at", valid="0.25")
    with pytest.raises(ManifestError, match=r"at differ by .*steps of 128 there: .*with a constant taken off"):
        label_moments(made)
    days = make_manifest(listed(tmp_path, at=[2460000.5 + i for i in range(8)]), label="number:at", valid="0.25")
    assert label_moments(days) is not None


def test_a_manifest_whose_numbers_were_changed_is_refused(tmp_path: Path) -> None:
    made = make_manifest(listed(tmp_path, age=[1, 2, 3, 4]), label="number:age", valid="0.25")
    made.save(tmp_path / "m.parquet")
    rows = made.rows.set_column(2, "label", [[[1.0], [math.nan], [3.0], [4.0]]])
    Manifest(rows, made.root, "number", ("age",)).save(tmp_path / "n.parquet")
    with pytest.raises(ManifestError, match=r"\[nan\] for the label of row 1"):
        Manifest.load(tmp_path / "n.parquet")
