"""Are the values of masks those of the classes, and does somebody hear of it where they are not?"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from thawline.dataio.checks.verify import check_files
from thawline.dataio.errors import LabelError, SplitError
from thawline.dataio.labels.labels import label, mask_path
from thawline.dataio.labels.masks import count_values, totals, why_lossy
from thawline.dataio.table.draws import random_split
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import from_folder
from thawline.dataio.table.splits import split


def saved(mask: NDArray[np.uint8], kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, kind, **options)
    return file.getvalue()


def made(folder: Path, *masks: list[int], test: bool = False, **options: Any) -> Manifest:
    """A manifest over images of 12 x 10 px, one for each mask, which holds these values in equal parts."""
    for i, values in enumerate(masks):
        mask = np.repeat(np.array(values, np.uint8), 120 // len(values)).reshape(10, 12)
        for name, picture in ((f"images/{i}.png", mask * 7 + i), (f"masks/{i}.png", mask)):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(picture.astype(np.uint8)).save(folder / name)
    table = label(from_folder(folder, folders=["images"]), mask_path("masks/{stem}.png"), **options)
    return split(table, (lambda rows: np.full(rows.num_rows, "test", object)) if test else random_split(valid=0.5))


def test_pixels_are_counted_by_value(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).choice(np.array([0, 3, 255], np.uint8), (31, 57), p=[0.7, 0.2, 0.1])
    values, counts = np.unique(mask, return_counts=True)
    assert count_values(mask) == (values.tolist(), counts.tolist())
    for name, part in (("a", mask), ("b", mask[:, :7])):
        (tmp_path / f"{name}.png").write_bytes(saved(part.copy(), "PNG"))
    found = totals(check_files(tmp_path, ["a.png", "b.png"], masks=["a.png", "b.png"]))
    assert found.tolist() == [int((mask == v).sum() + (mask[:, :7] == v).sum()) for v in range(256)]


@pytest.mark.parametrize("values", [None, (0, 1)])
def test_a_class_that_no_mask_shows_beside_a_value_of_no_class_is_refused(tmp_path: Path, values: Any) -> None:
    wrong = r"^1 of 2 classes occur in no mask: object \(value 1\); and value 255, with 25\.0% of all pixels, is no "
    with pytest.raises(SplitError, match=wrong + r"class: .* with --values 0,255$"):
        made(tmp_path, [0, 255], [0, 0], classes=("ground", "object"), values=values)
    right = made(tmp_path, [0, 255], [0, 255], classes=("ground", "object"), values=(0, 255))
    assert (right.values, right.notes) == ((0, 255), ())
    alone = made(tmp_path, [0, 255], [0, 0], classes=("ground", "object"), values=(0, 1), test=True)
    assert len(alone.notes) == 2, "what the classes are was decided by another manifest"


def test_void_is_told_with_its_share_and_refused_only_where_a_class_may_be_meant(tmp_path: Path) -> None:
    names = ("ground", "cat", "dog")
    void = made(tmp_path, [0, 1, 2, 255], [0, 1, 2], classes=names)
    assert void.notes == ("mask value 255, with 12.5% of all pixels, is no class: left out of training and metrics",)
    assert void.notes[0] in void.summary()
    assert made(tmp_path, [0, 1, 2, 255], [0, 1, 2]).notes == void.notes, "found, not given"
    with pytest.raises(SplitError, match=r"^1 of 3 .*: dog \(value 2\); and value 255, .* with --values 0,1,255$"):
        made(tmp_path, [0, 1, 255, 255], [0, 1], classes=names)
    with pytest.raises(SplitError, match=r"and values 7, 8, .* --values, also where a class is only missing here$"):
        made(tmp_path, [0, 7, 8], [0, 1], classes=names)
    given = made(tmp_path, [0, 1, 7, 8], [0, 1], classes=names, values=(0, 1, 2))
    assert given.notes == (
        "WARNING: 1 of 3 classes occur in no mask: dog (value 2): nothing can be learnt of them",
        "WARNING: mask values 7, 8, with 25.0% of all pixels, are no class: left out of training and metrics",
    )


RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))


@pytest.mark.parametrize(
    ("kind", "options", "lossy"),
    [
        ("JPEG", {"quality": 100}, "lossy JPEG"),
        ("TIFF", {"compression": "jpeg"}, "lossy TIFF"),
        ("TIFF", {"compression": "tiff_lzw"}, None),
        ("WEBP", {"quality": 90}, "lossy WEBP"),
        ("WEBP", {"lossless": True}, None),
        ("JPEG2000", {"irreversible": True}, "lossy JPEG2000"),
        ("JPEG2000", {}, None),
        ("PNG", {}, None),
        ("BMP", {}, None),
        ("GIF", {}, None),
    ],
)
def test_a_lossy_mask_does_not_hold_the_values_that_were_drawn(
    tmp_path: Path, kind: str, options: dict[str, Any], lossy: str | None
) -> None:
    data = saved(RAMP, kind, **options)
    assert (why_lossy(data) or "").split(",")[0] == (lossy or "")
    (tmp_path / "x.png").write_bytes(saved(RAMP, "PNG"))
    (tmp_path / "mask").write_bytes(data)
    (row,) = check_files(tmp_path, ["x.png"], masks=["mask"]).to_pylist()
    if lossy:
        assert row["status"] == f"its mask mask: {lossy}, which changes pixel values; save it as PNG"
    assert why_lossy(b"no picture") is None


def test_a_mask_that_is_listed_as_an_image_is_refused(tmp_path: Path) -> None:
    made(tmp_path, [0, 1], [0, 1])
    with pytest.raises(LabelError, match=r"2 masks that are among the 4 images themselves \(masks/0\.png, masks/1"):
        label(from_folder(tmp_path), mask_path("masks/{stem}.png"))


def test_a_class_that_no_mask_of_one_side_shows_is_told(tmp_path: Path) -> None:
    notes = made(tmp_path, [0, 1], [0, 0], [0, 0], [0, 0], classes=["road", "car"]).notes
    table = label(from_folder(tmp_path, folders=["images"]), mask_path("masks/{stem}.png"), classes=["road", "car"])
    first = split(table, lambda rows: np.array(["train", "valid", "test", "test"], object)).notes
    second = split(table, lambda rows: np.array(["valid", "train", "test", "test"], object)).notes
    assert len([note for note in notes if note.startswith("WARNING: no ")]) == 1  # of two sides one lacks the car
    assert first[-1].startswith("WARNING: no validation images of 1 of 2 classes (car): they are measured by no metric")
    assert second[-1].startswith("WARNING: no training images of 1 of 2 classes (car): they cannot be learned; give")
