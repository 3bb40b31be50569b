"""Are sample shapes where their list says, the same for the same seed, and as index reads them?"""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thawline.cluster.cli.index import make_manifest
from thawline.cluster.cli.main import check_arguments
from thawline.dataio.errors import SourceError
from thawline.dataio.shapes import CSV, SETS, SIDE_PX, TRAIN, picture, write_shapes
from thawline.dataio.table.manifest import Manifest


def indexed(folder: Path, task: str, *, count: int = 12, seed: int = 0) -> Manifest:
    """A manifest of shapes, by the words that `thawline sample` says are next."""
    words = shlex.split(write_shapes(folder, task, count=count, seed=seed)[0])
    options: dict[str, Any] = {
        word.removeprefix("--"): value for word, value in zip(words[::2], words[1::2], strict=True)
    }
    if "swap" in options:
        options["swap"] = (options["swap"],)
    return make_manifest(folder / CSV, valid="0.25", **options)


@pytest.mark.parametrize("task", SETS)
def test_shapes_are_indexed_by_the_words_that_are_printed(tmp_path: Path, task: str) -> None:
    manifest = indexed(tmp_path, task)
    assert manifest.task == task
    assert manifest.usable().sum() == 12
    check_arguments(["train", "shapes.parquet", *shlex.split(f"{TRAIN} {SETS[task].train}")])


def test_the_mask_and_the_list_say_what_is_drawn(tmp_path: Path) -> None:
    """The disc by its pixels alone: its middle, and its area."""
    write_shapes(tmp_path / "points", "points", count=5, seed=3)
    for number, line in enumerate((tmp_path / "points" / CSV).read_text().splitlines()[1:]):
        _, mask, _ = picture("points", seed=3, number=number)
        y, x = np.nonzero(mask == 1)
        np.testing.assert_allclose(
            [float(at) for at in line.split(",")[1:3]], [x.mean() + 0.5, y.mean() + 0.5], atol=0.2
        )
    write_shapes(tmp_path / "number", "number", count=5, seed=3)
    for number, line in enumerate((tmp_path / "number" / CSV).read_text().splitlines()[1:]):
        _, mask, _ = picture("number", seed=3, number=number)
        assert float(line.split(",")[1]) == pytest.approx(100 * (mask == 1).mean(), rel=0.05)
    write_shapes(tmp_path / "mask", "mask", count=3, seed=3)
    pixels, mask, shapes = picture("mask", seed=3, number=2)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "mask" / "masks" / "00002.png")), mask)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "mask" / "images" / "00002.png")), pixels)
    assert pixels.shape == (SIDE_PX, SIDE_PX, 3)
    assert len(np.unique(mask)) == 1 + len(shapes)


def test_no_such_shapes_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=re.escape("no shapes for task 'boxes': give single_label")):
        write_shapes(tmp_path, "boxes")
    with pytest.raises(SourceError, match="count=0 and seed=0 make no pictures"):
        write_shapes(tmp_path, "mask", count=0)
