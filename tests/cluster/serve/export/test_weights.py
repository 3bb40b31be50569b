"""Are weights that are handed on read: by a body's own library, and by `thawline.load` from a folder for the Hub?"""

import json
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

import thawline
from tests.kit.bundles import write_bundle
from tests.kit.images import photo
from thawline import models
from thawline.cluster.job import job as jobs
from thawline.cluster.serve.export.export import export
from thawline.dataio import Manifest
from thawline.models.weights import tensors


def theirs(name: str) -> torch.nn.Module:
    if not name.startswith("timm/"):
        network: torch.nn.Module = torchvision.models.get_model(name)
        return network
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    made: torch.nn.Module = timm.create_model(name.removeprefix("timm/"), num_classes=0)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size_px", "made"),
    [
        ("shufflenet_v2_x0_5", 64, "torchvision.models.get_model('shufflenet_v2_x0_5')"),
        ("timm/test_convnext", 64, "timm.create_model('test_convnext', num_classes=0)"),
    ],
)
def test_a_bodys_own_library_takes_its_weights(tmp_path: Path, name: str, size_px: int, made: str) -> None:
    network = theirs(name)
    source = write_bundle(tmp_path / "bundle", name, "single_label", 3, size_px=size_px)
    said = list[str]()
    file = Path(export(source, "safetensors", tmp_path / "out", tell=said.append))
    assert f"body.safetensors: {made}.load_state_dict(..., strict=False) takes it" in said[0]
    body = tensors.from_bytes((file.parent / "body.safetensors").read_bytes(), where="body")
    missing, unexpected = network.load_state_dict(body, strict=False)
    assert (unexpected, {key.partition(".")[0] for key in missing} <= {"fc", "head"}) == ([], True)
    model, _ = models.load(source)
    whole = tensors.from_bytes(file.read_bytes(), where="model")
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())


def test_a_folder_for_the_hub_is_a_bundle_with_a_card(flat: Manifest, tmp_path: Path) -> None:
    run = tmp_path / "run"
    source = write_bundle(run / "model", "tiny", "single_label", 3, size_px=32)
    flat.save(run / "flat.parquet")
    job = jobs.from_dict({"manifest": "elsewhere/flat.parquet", "name": "run"})
    (run / "job.toml").write_text(jobs.to_toml(job))
    said = list[str]()
    out = Path(export(run, "hub", tmp_path / "out", license="apache-2.0", tell=said.append)).parent
    assert said[1].startswith("compared with the model on 11 validation images: the largest")
    picture = photo(80, 60)
    with thawline.load(source) as before, thawline.load(out) as after:
        assert after.predict(picture) == before.predict(picture)
    head, text = (out / "README.md").read_text().removeprefix("---\n").split("\n---\n")
    assert yaml.safe_load(head) == {
        "license": "apache-2.0",
        "library_name": "thawline",
        "pipeline_tag": "image-classification",
        "tags": ["thawline", "single_label", "tiny"],
        "metrics": ["error_rate", "roc_auc"],
    }
    assert "37 images for train, 11 images for valid." in text
    assert "| error\\_rate | 0.25 |\n| roc\\_auc | none |" in text
    counts = [line.split(" | ") for line in text.splitlines() if line.startswith("| class ")]
    assert [row[0] for row in counts] == ["| class", "| class 0", "| class 1", "| class 2"]
    assert sum(int(row[1]) for row in counts[1:]) == 37
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "class 0", "1": "class 1", "2": "class 2"}


def test_names_of_strangers_are_text_in_a_card(tmp_path: Path) -> None:
    source = write_bundle(tmp_path / "bundle", "tiny", "single_label", 2, size_px=32)
    described = json.loads((source / "model.json").read_text())
    described["classes"] = ["a\n---\nlicense: mit", "<script>|[x](http://h)\x1b[2J"]
    (source / "model.json").write_text(json.dumps(described))
    out = Path(export(source, "hub", tmp_path / "out")).parent
    card = (out / "README.md").read_text()
    assert "Classes: a --- license: mit, \\<script\\>\\|\\[x\\]\\(http://h\\)\\\\x1b\\[2J" in card
    assert card.count("\nlicense:") == 1
    assert 'license: "unknown"' in card
