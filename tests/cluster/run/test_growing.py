"""A run goes on with more of its task: do what it has learnt, and whose labels changed, mean the same there?"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.cluster.run.test_tasks import job_of
from thawline import models
from thawline.cluster.cli.index import make_manifest
from thawline.cluster.launch.launch import in_process
from thawline.cluster.run.loaded import Loaded
from thawline.cluster.run.more import going_on
from thawline.dataio.checks.census import label_moments
from thawline.dataio.shapes import write_shapes
from thawline.dataio.table.manifest import Manifest
from thawline.trainer.checkpoints import checkpoint

INDEX: dict[str, dict[str, Any]] = {
    "number": {"label": "number:area"},
    "points": {"label": "points:disc_x,disc_y,cross_x,cross_y", "swap": ("none",)},
    "mask": {"label": "mask-column:mask", "classes": "ground,disc,cross", "values": "0,1,4"},
    "multi_label": {"label": "column:shapes", "delimiter": ";"},
}


def listed(folder: Path, task: str, lines: list[str]) -> Manifest:
    """A manifest of these lines of the list."""
    file = folder / "some.csv"
    file.write_text("\n".join(lines))
    return make_manifest(file, valid="0.25", **INDEX[task])


@pytest.mark.slow
@pytest.mark.parametrize("task", INDEX)
def test_what_was_learnt_means_the_same_beside_new_images_and_labels(tmp_path: Path, task: str) -> None:
    write_shapes(tmp_path, task, count=40)
    head, *lines = (tmp_path / "shapes.csv").read_text().splitlines()
    few = [head, *[line for line in lines if "triangle" not in line][:24]]
    old = listed(tmp_path, task, few)
    old.save(tmp_path / f"{task}.parquet")
    job = job_of(tmp_path, task, fit={"epochs": 1}, checkpoint={"every_s": 0.0})
    in_process(job)
    run = tmp_path / "runs" / task
    before, _ = models.load(run)
    if task == "number":  # an old one's is another, and the new ones' are far away
        few[1] = few[1].partition(",")[0] + ",77"
        lines = [f"{name},{float(area) + 1000}" for name, area in (line.split(",") for line in lines)]
    known = {line.partition(",")[0] for line in few}
    new = listed(tmp_path, task, [*few, *[line for line in lines if line.partition(",")[0] not in known]])
    longer = going_on(job, 1, new)
    saved, _ = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    after = Loaded(longer).take_model().eval()
    after.load_state_dict(saved.load("model"))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        outputs = before.eval()(images)
        torch.testing.assert_close(after(images)[:, : outputs.shape[1]], outputs)
    made = in_process(longer)
    grown = Manifest.load(longer.manifest)
    assert (made["status"], made["epochs"]) == ("finished", 2)
    predicted = pq.read_table(run / "valid.parquet")
    assert predicted["id"].to_pylist() == grown.subset("valid").ids.tolist()
    assert len(grown.subset("train").ids) + len(predicted) == 40
    if task == "multi_label":
        assert grown.classes == (*old.classes, "triangle")
    if task == "number":
        labels = dict(zip(grown.rows["path"].to_pylist(), grown.rows["label"].to_pylist(), strict=True))
        assert labels[few[1].partition(",")[0]] == [77.0]
        _, about = models.load(run)
        assert (about.options["label_mean"], about.options["label_std"]) == tuple(map(list, label_moments(old) or ()))
