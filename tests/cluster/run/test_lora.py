"""Does a run with LoRA resume, and leave a model that is whole without peft?"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.kit.runs import digits_manifest, go, write_job
from thawline import models
from thawline.cluster.errors import JobError
from thawline.cluster.job import job as jobs
from thawline.cluster.job.checks import check
from thawline.cluster.job.flags import override
from thawline.cluster.run.loaded import Loaded
from thawline.cluster.run.preflight import preflight
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import loaders
from thawline.models.errors import ModelError

pytestmark = pytest.mark.skipif(
    not (find_spec("peft") and find_spec("timm")), reason="the extra lora or timm is not installed"
)

FLAGS = (
    *("--model.lora.rank", "4", "--model.lora.alpha", "8", "--model.lora.targets", "qkv", "proj"),
    *("--fit.recipe", "fine_tune", "--fit.epochs", "1", "--fit.ema", "0.8", "--fit.lr", "0.02"),
)


@pytest.mark.slow
def test_resumed_it_equals_the_unbroken_and_its_bundle_is_the_body_with_what_was_learnt(tmp_path: Path) -> None:
    file = write_job(tmp_path, digits_manifest(tmp_path, count=150), model="timm/test_vit")
    job = jobs.resolved(check(override(jobs.load(file), [*FLAGS, "--name", "whole"])))
    assert preflight(job) is None
    unbroken, broken = go(job), replace(job, name="broken")
    for last in (1, 3):  # in the frozen phase, and in the other
        assert go(broken, stop_at_ask=last)["status"] == "stopped"
    assert go(broken)["metrics"] == unbroken["metrics"]
    (model, about), (other, _) = (models.load(tmp_path / "runs" / name) for name in ("whole", "broken"))
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())

    before, changed = models.create("timm/test_vit", 10, weights="none", seed=7, size_px=32).state_dict(), set[str]()
    for key, value in state.items():
        if key.startswith("body.") and not torch.equal(value, before[key]):
            changed.add(".".join(key.split(".")[3:]))
    assert changed == {"attn.qkv.weight", "attn.proj.weight"}

    image = dict(about.image)
    _, valid = loaders(Loaded(job).manifest, ImageSpec(**image), batch=30)
    with valid, torch.no_grad():
        said = {i: p for b in valid.stream() for i, p in zip(b.ids.tolist(), model(b.inputs).softmax(1), strict=True)}
    for row in pq.read_table(tmp_path / "runs/whole/valid.parquet").to_pylist():
        assert row["probability"] == pytest.approx(float(said[row["id"]].max()), abs=1e-5)
    assert models.create("timm/test_vit", 3, weights=tmp_path / "runs/whole", size_px=32).pretrained


def test_what_cannot_be_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    job = jobs.load(write_job(tmp_path, digits_manifest(tmp_path, count=40), model="tiny"))
    for flags, said in (
        (["--model.lora.rank", "-1"], r"give model\.lora\.rank >= 0"),
        (["--model.lora.alpha", "8"], r"model\.lora\.rank=0, which is no LoRA"),
        (["--model.lora.rank", "2", "--model.lora.alpha", "0"], r"model\.lora\.alpha=0\.0 is out of range"),
    ):
        with pytest.raises(JobError, match=said):
            check(override(job, flags))
    with pytest.raises(ModelError, match=r"tiny has no linear layers"):
        preflight(check(override(job, ["--model.lora.rank", "2"])))
