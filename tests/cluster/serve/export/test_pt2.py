"""Does a .pt2 file say what the bundle says, to torch alone, of every size of image that it claims to take?"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kit.bundles import write_bundle
from thawline import models
from thawline.cluster.serve.export.export import export

pytestmark = pytest.mark.slow
YEARS: dict[str, Any] = {"label_mean": [2026.0, 3.0], "label_std": [5.0, 1.0]}
ONE_SIZE = ["batch", 3, 32, 32]


def read(file: Path) -> tuple[Any, dict[str, Any]]:
    """Its module, and its description."""
    extra: dict[str, Any] = {"thawline.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(file, extra_files=extra).module()
    return module, json.loads(extra["thawline.json"])


@pytest.mark.parametrize(
    ("name", "task", "outputs", "options", "shape", "sides"),
    [
        ("tiny", "multi_label", 1, {}, ["batch", 3, "height", "width"], (49, 37)),
        ("tiny", "number", 2, YEARS, ["batch", 3, "height", "width"], (32, 64)),
        ("timm/test_vit3", "single_label", 3, {}, ONE_SIZE, (32, 32)),
    ],
)
def test_it_answers_as_the_bundle_does(
    tmp_path: Path,
    name: str,
    task: str,
    outputs: int,
    options: dict[str, Any],
    shape: list[Any],
    sides: tuple[int, int],
) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="the extra timm is not installed")
    source = write_bundle(tmp_path / "bundle", name, task, outputs, size_px=32, **options)
    said = list[str]()
    file = Path(export(source, "pt2", tmp_path / "out", tell=said.append))
    module, about = read(file)
    assert about["inputs"]["images"] == {"shape": shape, "dtype": "float32"}
    assert ("of 32 x 32 px alone" in said[0]) == (shape == ONE_SIZE)
    model, _ = models.load(source)
    for count in (1, 3):
        images = torch.randn(count, 3, *sides, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected, found = model(images), module(images)
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
        if task == "number":
            assert (len(found), about["outputs"]) == (1, ["predictions"])
            assert 1950 < float(expected[0, 0]) < 2100
        else:
            shares = expected.sigmoid() if task == "multi_label" else expected.softmax(1)
            torch.testing.assert_close(found[1], shares, rtol=0, atol=1e-4)
