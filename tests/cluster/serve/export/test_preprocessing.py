"""From an image's bytes to the bundle's answer, in a process that has ONNX Runtime, numpy and Pillow alone?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import thawline
from tests.kit.bundles import write_bundle
from tests.kit.images import encode, photo
from thawline.cluster.cli.finished.export import Export

pytestmark = pytest.mark.slow
pytest.importorskip("onnxruntime", reason="the extra export is not installed")

ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "PIL", "onnxruntime"}:
            raise ModuleNotFoundError(f"no {name} here", name=name)

sys.meta_path.insert(0, Absent())
import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["thawline"])["classes"]
for file in sys.argv[2:]:
    image = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    (probabilities,) = session.run(["probabilities"], {"image": image})
    print(json.dumps(dict(zip(classes, probabilities[0].tolist()))))
assert not {"torch", "thawline", "onnx"} & {*sys.modules}
"""


def test_it_is_the_bundles_answer(tmp_path: Path) -> None:
    source = write_bundle(
        tmp_path / "bundle", "tiny", "single_label", 4, size_px=48, image={"presize": "pad"}, sharp=30
    )
    out = tmp_path / "out"
    Export(source=str(source), dest=str(out), to="onnx", with_preprocessing=True).run()
    images = {
        "large.jpg": encode(photo(900, 600, seed=1)),
        "small.png": encode(photo(20, 31, seed=2), "PNG"),
        "turned.jpg": encode(photo(200, 90, seed=3), orientation=6),
        "grey.jpg": encode(photo(64, 64, seed=4), mode="L"),
    }
    for name, data in images.items():
        (tmp_path / name).write_bytes(data.tobytes())
    names = [str(tmp_path / name) for name in images]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(out / "model.onnx"), *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    with thawline.load(source) as predictor:
        expected = [each.probabilities for each in predictor.predict(names)]
    assert found == [pytest.approx(each, abs=1e-4) for each in expected]
    assert max(abs(a["class 0"] - b["class 0"]) for a in expected for b in expected) > 0.03, "images are told apart"
