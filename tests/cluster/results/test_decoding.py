"""Is what Pillow's pixels change counted as plain numpy counts it, for labels, numbers and masks?"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dataio.test_shapes import indexed
from thawline import ImageSpec, models, split_loader
from thawline.cluster.results.decoding import by_pillow

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")


@pytest.mark.parametrize("task", ["single_label", "number", "mask"])
def test_the_difference_is_a_plain_count(task: str, tmp_path: Path) -> None:
    manifest = indexed(tmp_path, task, count=40)
    spec = ImageSpec(size_px=32, presize_px=40)
    model = models.create("tiny", len(manifest.classes), task=task, weights="none", seed=0).eval()
    said = dict[str, torch.Tensor]()
    with torch.no_grad():
        for engine in ("dali", "reference"):
            with split_loader(manifest, spec, "valid", global_batch=4, engine=engine) as loader:
                said[engine] = torch.cat([model(batch.inputs) for batch in loader.stream()])
                if engine == "dali":
                    found = by_pillow(loader, lambda batch: model(batch.inputs), step=0)
                else:
                    assert by_pillow(loader, lambda batch: model(batch.inputs), step=0) == {}
    one, other = (said[engine].double().numpy() for engine in ("dali", "reference"))
    if task != "number":
        one, other = (np.exp(each) / np.exp(each).sum(1, keepdims=True) for each in (one, other))
    off = np.abs(one - other)
    expected = {"images": 10, "largest": off.max(), "mean": off.mean()}
    if task != "number":
        expected["agreement"] = (one.argmax(1) == other.argmax(1)).mean()
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert found["largest"] > 0
