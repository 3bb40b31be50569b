"""Does somebody hear of coordinates that cannot be what they say?"""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from thawline.dataio.labels.keypoints import UNPAIRED
from thawline.dataio.labels.labels import from_lists, label, points_by_function
from thawline.dataio.table.draws import random_split
from thawline.dataio.table.splits import split

NAN = float("nan")
LABELS: list[list[tuple[float, float]]] = [
    [(3, 4), (20, 5)],
    [(40, 0), (0, 30)],
    [(NAN, NAN), (39.5, 29.5)],
]  # of 40 x 30 px, edges included


def notes(folder: Path, labels: list[list[tuple[float, float]]], *, verify: bool = True) -> tuple[str, ...]:
    paths = [f"{i}.png" for i in range(len(labels))]
    for i, path in enumerate(paths):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(folder / path)
    points = dict(zip(paths, labels, strict=True))
    table = label(from_lists(paths, root=folder), points_by_function(lambda row: points[row["path"]]), swap=[])
    return split(table, random_split(valid=0.4), verify=verify).notes


def test_points_within_their_images_are_not_spoken_of_but_for_their_sides(tmp_path: Path) -> None:
    assert notes(tmp_path, LABELS) == ()
    unpaired = label(from_lists(["0.png", "1.png"], root=tmp_path), points_by_function(lambda row: LABELS[0]))
    assert split(unpaired, random_split(valid=0.5)).notes == (UNPAIRED,)


@pytest.mark.parametrize(
    ("first", "sentence"),
    [
        (
            [(812, 40), (20, -3.5)],
            "WARNING: 2 points in 1 images (0.png) lie outside their image (point 0 of 0.png at 812, 40 px of 40 x 30)"
            ", and what lies outside counts only where training shows a border there (padding, a rotation); correct "
            "them, or leave such cells empty",
        ),
        (
            [(-1, -1), (20, 5)],
            "WARNING: 1 points in 1 images (0.png) lie at exactly (-1, -1): many tools write that where a point is not "
            "shown, and what lies outside counts only where training shows a border there (padding, a rotation); leave "
            "such cells empty",
        ),
        (
            [(0, 0), (0, 0)],
            "WARNING: 2 points in 1 images (0.png) lie at exactly (0, 0): many tools write that where a point is not "
            "shown, and it will be trained on as a place; leave such cells empty",
        ),
    ],
)
def test_points_outside_their_images_or_where_nothing_is_are_told(
    tmp_path: Path, first: list[tuple[float, float]], sentence: str
) -> None:
    assert notes(tmp_path, [first, *LABELS[1:]]) == (sentence,)


def test_shares_of_the_sides_are_no_pixels(tmp_path: Path) -> None:
    shares = [[(x / 40, y / 30) for x, y in points] for points in LABELS]
    shares[0][0] = (-1, -1)
    absent, told = notes(tmp_path, shares)
    assert "lie at exactly (-1, -1)" in absent
    assert told.startswith("WARNING: all points lie between 0 and 1 px: that looks like shares of the sides")


def test_what_was_not_verified_has_no_outside(tmp_path: Path) -> None:
    assert notes(tmp_path, [[(812, 40), (20, 5)], *LABELS[1:]], verify=False) == ()
