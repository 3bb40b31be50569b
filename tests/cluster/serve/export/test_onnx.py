"""Does an ONNX file say what the bundle says, to ONNX Runtime, of every size of image that it claims to take?"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kit.bundles import IMAGE, write_bundle
from thawline import models
from thawline.cluster.cli.finished.export import Export

pytestmark = pytest.mark.slow
onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra export is not installed")

ANY, MULTIPLES = "images of any height and width", "images whose sides are multiples of 32 px"


def said(file: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))


@pytest.mark.parametrize(
    ("name", "task", "outputs", "size_px", "takes", "sides"),
    [
        ("tiny", "single_label", 5, 32, ANY, [(32, 32), (37, 91)]),
        ("tiny", "points", 4, 32, ANY, [(45, 33)]),
        ("resnet18", "mask", 3, 64, MULTIPLES, [(64, 64), (96, 32)]),
    ],
)
def test_it_answers_as_the_bundle_does(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    task: str,
    outputs: int,
    size_px: int,
    takes: str,
    sides: list[tuple[int, int]],
) -> None:
    source = write_bundle(tmp_path / "bundle", name, task, outputs, size_px=size_px)
    assert Export(source=str(source), dest=str(tmp_path / "out"), to="onnx").run() == 0
    file = tmp_path / "out/model.onnx"
    told = capsys.readouterr()
    assert told.out.split() == [str(file)]
    assert f"ONNX, opset 20: any number of {takes}\ncompared with the model on 6 drawn images" in told.err
    model, _ = models.load(source)
    for number, (height, width) in enumerate(sides, start=1):
        images = torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            expected = model(images)
        found = said(file, images)
        if task == "points":
            torch.testing.assert_close(found, {"predictions": expected}, rtol=0, atol=1e-4)
        else:
            both = {"logits": expected, "probabilities": expected.softmax(1)}
            torch.testing.assert_close(found, both, rtol=1e-4, atol=1e-4)

    about: dict[str, Any] = json.loads(next(p.value for p in onnx.load(file).metadata_props if p.key == "thawline"))
    assert about["task"] == task
    assert about["classes"] == [f"class {i}" for i in range(outputs)]
    assert about["image"] == {
        "size_px": size_px,
        "fit": IMAGE["presize"],
        "border": IMAGE["border"],
        "mean": list(IMAGE["mean"]),
        "std": list(IMAGE["std"]),
        "channels": "RGB",
        "range": [0, 1],
    }
    assert about["metrics"]["roc_auc"] is None
    stated = [dim.dim_param or dim.dim_value for dim in onnx.load(file).graph.input[0].type.tensor_type.shape.dim]
    assert stated == about["inputs"]["images"]["shape"] == ["batch", 3, *SHAPES[takes]]


SHAPES = {ANY: ["height", "width"], MULTIPLES: ["32*height", "32*width"]}
