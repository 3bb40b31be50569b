"""Are the digits the right pixels under the right names, and every mistake a sentence?"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thawline.dataio.errors import SourceError
from thawline.dataio.labels.labels import by_regex, label
from thawline.dataio.samples import write_digits
from thawline.dataio.table.sources import from_folder


@pytest.mark.slow
def test_digits_are_the_right_pixels_under_the_right_names(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    seen: list[tuple[int, int]] = []
    folder = tmp_path / "deep" / "digits"
    assert write_digits(folder, size_px=24, progress=lambda done, total: seen.append((done, total))) == 1797
    assert seen[-1] == (1797, 1797)
    assert len(list(folder.iterdir())) == 1797
    digits = load_digits()
    for index in (0, 7, 1796):
        with Image.open(folder / f"{digits.target[index]}_{index:04d}.jpg") as image:
            assert image.size == (24, 24)
            centres = np.asarray(image.convert("L"), np.float64)[1::3, 1::3]
        # bicubic interpolation passes through its samples, which enlarged 3 times lie at every third pixel
        np.testing.assert_allclose(centres, digits.images[index] * 255 / 16, atol=8)  # JPEG at quality 92

    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_digits(folder, size_px=24) == 1797
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "0_0000.jpg").unlink()
    write_digits(folder, size_px=24)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    write_digits(folder, size_px=16)  # another size is not "already there"
    with Image.open(folder / "0_0000.jpg") as image:
        assert image.size == (16, 16)
    assert len(label(from_folder(folder), by_regex(r"(.+)_\d+\.jpg$")).rows["label"].unique()) == 10


def test_digits_mistakes_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="digits cannot"):
        write_digits(tmp_path / "file")
    with pytest.raises(SourceError, match="size_px=0"):
        write_digits(tmp_path / "x", size_px=0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SourceError, match=r"pip install 'thawline\[samples\]'"):
        write_digits(tmp_path / "x")
    assert not (tmp_path / "x").exists()
