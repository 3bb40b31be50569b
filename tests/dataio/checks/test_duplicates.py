"""Are files with equal content found, and is it told when a copy tests what another one taught?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from thawline.dataio.checks.duplicates import duplicates, report
from thawline.dataio.table.manifest import Manifest, build


def manifest(hashes: list[int | None], sides: list[str | None], sizes: list[int | None] | None = None) -> Manifest:
    """Images 0.jpg, 1.jpg, ...; one without a side is quarantined."""
    n = len(hashes)
    columns: dict[str, object] = dict.fromkeys(("width", "height", "format", "orientation", "codec"), pa.nulls(n))
    columns |= {"id": np.arange(n), "path": [f"{i}.jpg" for i in range(n)], "label": ["a"] * n, "split": sides}
    columns |= {"hash": hashes, "bytes": sizes or [1] * n, "status": ["ok" if side else "empty file" for side in sides]}
    return build(columns, root=str(Path("/data")), task="single_label", classes=("a",))


def test_groups_are_equal_hashes_of_usable_images_in_the_order_of_ids() -> None:
    made = manifest(
        [9, 2**63, 9, 5, 2**63, 9, None, None, 7, 7], ["train", "valid", "test", "train", *["train"] * 5, None]
    )
    assert duplicates(made).to_pylist() == [
        {"group": 0, "id": 0, "path": "0.jpg", "split": "train"},
        {"group": 0, "id": 2, "path": "2.jpg", "split": "test"},
        {"group": 0, "id": 5, "path": "5.jpg", "split": "train"},
        {"group": 1, "id": 1, "path": "1.jpg", "split": "valid"},
        {"group": 1, "id": 4, "path": "4.jpg", "split": "train"},
    ]


def test_equal_hashes_of_other_lengths_are_no_copies() -> None:
    assert duplicates(manifest([4, 4], ["train", "train"], [10, 11])).num_rows == 0


def test_it_finds_what_a_plain_count_finds() -> None:
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 300, 400).tolist()
    made = manifest(hashes, draw.choice(["train", "valid"], 400).tolist())
    found = duplicates(made)
    groups: dict[int, list[int]] = {}
    for i, value in enumerate(hashes):
        groups.setdefault(value, []).append(i)
    expected = [ids for ids in groups.values() if len(ids) > 1]  # dicts keep the order of first images
    assert found["id"].to_pylist() == [i for ids in expected for i in ids]
    assert found["group"].to_pylist() == [number for number, ids in enumerate(expected) for _ in ids]


def test_nothing_is_said_without_copies() -> None:
    assert report(manifest([1, 2, 3], ["train", "valid", "test"])) == ""
    assert report(manifest([None, None], ["train", "valid"])) == ""
    assert duplicates(manifest([], [])).num_rows == 0


def test_copies_within_a_side_are_counted_and_across_sides_are_loud() -> None:
    quiet = report(manifest([1, 1, 1, 2, 2, 3], ["train", "train", "train", "valid", "valid", "test"]))
    assert quiet == "copies within one split: 2 in train, 1 in valid"
    loud = report(manifest([1, 1, 1, 2, 2, 3, 3], ["train", "valid", "valid", "test", "train", "test", "valid"]))
    advice = "): the metrics would flatter; remove them, or split by a column or folder that keeps copies together"
    assert loud.splitlines() == [
        "WARNING: 2 images of valid are also in train (1.jpg = 0.jpg" + advice,
        "WARNING: 1 images of test are also in train (3.jpg = 4.jpg" + advice,
        "WARNING: 1 images of test are also in valid (5.jpg = 6.jpg" + advice,
        "copies within one split: 1 in valid",
    ]


def test_copies_under_other_labels_are_loud() -> None:
    made = manifest([1, 1, 2, 2, 3, 3], ["train"] * 6)
    labels = pa.array(["a", "b", "a", "a", "b", "a"])
    other = replace(made, rows=made.rows.set_column(2, made.rows.schema.field("label"), labels))
    assert report(other).splitlines() == [
        "WARNING: 2 files have copies with different labels (0.jpg (a) = 1.jpg (b), 4.jpg (b) = 5.jpg (a)): they teach "
        "and test both; keep the right one of each",
        "copies within one split: 3 in train",
    ]
