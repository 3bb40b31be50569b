"""Where do weights come from, and is what does not fit refused?"""

import hashlib
import http.server
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from tests.kit.images import grown
from tests.kit.networks import untrained
from thawline import models
from thawline.models import bundle
from thawline.models.weights import fetched, loading
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.format import Origin


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """torchvision's own resnet18 with random weights and BatchNorm statistics that have moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network: nn.Module = torchvision.models.resnet18()
        network.train()(torch.randn(4, 3, 64, 64))
        return network.eval()


@pytest.fixture(scope="module")
def torchvision_file(reference: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its state dict, named as torchvision names them: with the head of its SHA-256."""
    folder = tmp_path_factory.mktemp("served")
    torch.save(reference.state_dict(), folder / "plain.pth")
    digest = hashlib.sha256((folder / "plain.pth").read_bytes()).hexdigest()
    return (folder / "plain.pth").rename(folder / f"resnet18-{digest[:8]}.pth")


def features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """torchvision's forward up to layer4."""
    for name, child in network.named_children():
        if name not in ("avgpool", "fc"):
            images = child(images)
    return images


def same_body(model: nn.Module, network: nn.Module) -> bool:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.equal(model.eval().get_submodule("body")(images), features(network, images))


# --- weights from a file


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_torchvision_file_gives_torchvisions_features(
    reference: nn.Module, torchvision_file: Path, tmp_path: Path, wrapped: bool
) -> None:
    file = torchvision_file
    if wrapped:
        file = tmp_path / "checkpoint.pth"
        torch.save({"model": reference.state_dict(), "epoch": 3}, file)
    model = models.create("resnet18", 3, weights=file)
    assert same_body(model, reference)
    assert model.origin.startswith(f"{file}: body;")


def test_files_older_than_the_batch_counter_load(reference: nn.Module, tmp_path: Path) -> None:
    old = {key: value for key, value in reference.state_dict().items() if "num_batches" not in key}
    torch.save(old, tmp_path / "old.pth")
    assert same_body(models.create("resnet18", 3, weights=tmp_path / "old.pth"), reference)


def test_our_own_file_brings_its_head_only_where_the_classes_agree(tmp_path: Path) -> None:
    file = tmp_path / "ours.pth"
    ours = untrained("tiny", 3, seed=1)
    torch.save(ours.state_dict(), file)
    same = models.create("tiny", 3, weights=str(file), seed=2)
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in ours.state_dict().items())
    assert same.origin == f"{file}: body and head"
    fresh, wider = (models.create("tiny", 5, weights=w, seed=2) for w in ("none", file))
    assert same_body(wider, ours.eval().body)
    assert all(torch.equal(p, q) for p, q in zip(fresh.head.parameters(), wider.head.parameters(), strict=True))
    assert "body only" in wider.origin
    assert "8.weight is (3, 512) in the file and (5, 512)" in wider.origin


def test_a_file_that_does_not_fit_is_named_by_three_keys_and_changes_nothing(
    reference: nn.Module, tmp_path: Path
) -> None:
    state = dict(reference.state_dict())
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    del state["bn1.bias"], state["layer1.0.conv1.weight"]
    state["stray"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    model = untrained("resnet18", 3, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = (
        "conv1.weight is (64, 1, 7, 7) in the file and (64, 3, 7, 7) in the model, bn1.bias is missing, "
        "layer1.0.conv1.weight is missing and 1 more"
    )
    with pytest.raises(models.WeightsError, match=re.escape(expected)):
        loading.load_file(model, tmp_path / "other.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


WRAPPERS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "DDP": lambda state: {f"module.{key}": value for key, value in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "a compiled body": lambda state: {key.replace("body.", "body._orig_mod."): value for key, value in state.items()},
    "DDP of torch.compile": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "timm": lambda state: {"state_dict": dict(state), "epoch": 3},
    "Lightning": lambda state: {
        "state_dict": {**{f"model.{key}": value for key, value in state.items()}, "loss.weight": torch.ones(3)},
        "epoch": 3,
    },
    "Lightning, compiled": lambda state: {"state_dict": {f"model._orig_mod.{key}": v for key, v in state.items()}},
}


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_state_dict_is_understood_however_it_was_wrapped(tmp_path: Path, how: str) -> None:
    ours = untrained("tiny", 3, seed=1).state_dict()
    torch.save(WRAPPERS[how](ours), tmp_path / "x.pt")
    model = models.create("tiny", 3, weights=tmp_path / "x.pt", seed=2)
    assert model.origin == f"{tmp_path}/x.pt: body and head"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in ours.items())


def test_numbers_that_are_none_are_told_at_loading(shared: models.Classifier, tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in untrained("resnet18", 3, seed=1).state_dict().items()}
    state["body.layer1.0.conv1.weight"][0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(models.WeightsError, match=r"holds 2 of 36,864 values of layer1\.0\.conv1\.weight .*NaN"):
        models.create("resnet18", 3, weights=tmp_path / "nan.pt")


def last_weight(model: models.Classifier) -> torch.Tensor:
    return model.get_parameter("head.8.weight")


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """The folder of a run of three classes with two checkpoints, and a third that is not finished."""
    for step, seed in ((5, 1), (10, 2)):
        parts = {"model": untrained("tiny", 3, seed=seed).state_dict(), "state": {"rows": []}}
        origin = Origin({"seed": 7}, ("ape", "bee", "cat"))
        checkpoint.save(tmp_path / "run/checkpoints", step, parts, keep=3, origin=origin)
    (tmp_path / "run/checkpoints/step_00000015").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("given", "seed"),
    [
        ("", 2),
        ("checkpoints", 2),
        ("checkpoints/step_00000005", 1),
        ("checkpoints/step_00000005/model.pt", 1),
    ],
)
def test_a_run_and_a_checkpoint_are_weights_and_know_their_classes(a_run: Path, given: str, seed: int) -> None:
    expected = untrained("tiny", 3, seed=seed).state_dict()
    same = models.create("tiny", 3, weights=a_run / given, class_names=("ape", "bee", "cat"), seed=4)
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in expected.items())
    other = models.create("tiny", 3, weights=a_run / given, class_names=("ape", "cat", "bee"), seed=4)
    assert same_body(other, same.eval().body)
    assert torch.equal(last_weight(other), last_weight(untrained("tiny", 3, seed=4)))
    assert other.origin.endswith("it was trained on other classes ('bee' in the place of 'cat')")


def test_the_averaged_weights_of_a_checkpoint_are_taken_before_those_that_were_trained(tmp_path: Path) -> None:
    trained, other = (untrained("tiny", 3, seed=seed) for seed in (1, 2))
    averaged = dict(other.named_parameters())  # trainer's Ema averages no buffers
    parts = {"model": trained.state_dict(), "ema": averaged}
    model = models.create("tiny", 3, weights=checkpoint.save_model(tmp_path, "best", parts))
    assert all(torch.equal(value, averaged[key]) for key, value in model.named_parameters())
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in model.named_buffers())


def test_a_head_whose_classes_nobody_knows_is_not_taken_for_ours(tmp_path: Path) -> None:
    torch.save(untrained("tiny", 3, seed=1).state_dict(), tmp_path / "x.pt")
    model = models.create("tiny", 3, weights=tmp_path / "x.pt", class_names=("ape", "bee", "cat"))
    assert "x.pt: body only; the head is as initialised, since the file does not say which classes" in model.origin


@pytest.mark.parametrize("name", ["tiny", "timm/test_vit"])
def test_a_head_of_numbers_says_the_same_numbers_however_they_are_standardised(name: str, tmp_path: Path) -> None:
    kind = {"task": "number", "class_names": ("length", "width")}
    made = {"label_mean": (20.0, 3.0), "label_std": (5.0, 0.1)}
    old = models.create(name, 2, weights="none", seed=1, **kind, **made)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    old(images)  # its norms have seen something
    about = bundle.Description(
        model=name,
        options=made,
        outputs=2,
        task="number",
        classes=("length", "width"),
        image={},
        engine="",
        precision="",
        step=1,
    )
    for file, data in bundle.packed(old.state_dict(), about).items():
        (tmp_path / file).write_bytes(data)
    other = {"label_mean": (60.0, 2.0), "label_std": (2.0, 4.0)}
    new = models.create(name, 2, weights=tmp_path, seed=2, **kind, **other)  # type: ignore[arg-type]
    assert new.origin.endswith("body and head")
    with torch.no_grad():
        torch.testing.assert_close(new.eval()(images), old.eval()(images), rtol=1e-4, atol=1e-3)
    within = models.create(name, 2, weights=tmp_path, y_range=(0.0, 9.0), **kind, **other)  # type: ignore[arg-type]
    assert within.origin.endswith("its numbers lie within y_range=None, and these in (0.0, 9.0)")
    torch.save(old.state_dict(), tmp_path / "x.pt")
    unknown = models.create(name, 2, weights=tmp_path / "x.pt", **kind, **other)  # type: ignore[arg-type]
    assert "body only" in unknown.origin


def test_a_folder_without_weights_and_a_checkpoint_that_changed_get_a_sentence(a_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    grown(tmp_path / "grown.pt")
    file = a_run / "checkpoints/step_00000010/model.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for given, said in (
        (tmp_path / "empty", "empty holds no finished checkpoint, so there are no weights in it"),
        (tmp_path / "pipe", "pipe is neither a file nor a folder"),
        (tmp_path / "grown.pt", r"grown\.pt is not a torch file"),
        (a_run, "model.pt changed since it was written: its weights would be wrong"),
    ):
        with pytest.raises(models.WeightsError, match=said):
            models.create("tiny", 3, weights=given)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


def test_pickled_code_is_refused_and_does_not_run(shared: models.Classifier, tmp_path: Path) -> None:
    torch.save({"conv1.weight": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    with pytest.raises(models.WeightsError, match="code, which is never run"):
        loading.load_file(shared, tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 half a zip", b"\x80\x02}q\x00."])
def test_a_file_of_something_else_is_refused(shared: models.Classifier, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(models.WeightsError, match=r"x\.pth .*"):
        loading.load_file(shared, tmp_path / "x.pth")


def test_a_file_without_a_state_dict_is_refused(shared: models.Classifier, tmp_path: Path) -> None:
    torch.save({"model": {"epoch": 3}}, tmp_path / "x.pth")
    with pytest.raises(models.WeightsError, match="holds no state dict"):
        loading.load_file(shared, tmp_path / "x.pth")


def test_a_missing_file_is_named_with_the_other_choices() -> None:
    with pytest.raises(models.WeightsError, match=r'imagnet does not exist.*"none".*"imagenet"'):
        models.create("resnet18", 3, weights="imagnet")


# --- weights from torchvision


@pytest.fixture
def address(torchvision_file: Path) -> Iterator[str]:
    """The folder of the torchvision file, served on the loopback interface."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = partial(Quiet, directory=str(torchvision_file.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub; proxies are out of the way."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "hub" / "checkpoints"


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "imagenet_url", lambda name: url)


def test_imagenet_means_torchvisions_first_weights() -> None:
    pattern = r"https://download\.pytorch\.org/models/resnet34-[0-9a-f]{8}\.pth"
    assert re.fullmatch(pattern, loading.imagenet_url("resnet34"))


def test_imagenet_weights_are_fetched_once_and_then_found_offline(
    reference: nn.Module,
    torchvision_file: Path,
    address: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    point_to(f"{address}/{torchvision_file.name}", monkeypatch)
    model = models.create("resnet18", 3, weights="imagenet")
    assert same_body(model, reference)
    assert "ImageNet" in model.origin
    assert capsys.readouterr().out == ""  # stdout is for data
    assert socket.getdefaulttimeout() is None
    point_to(f"http://127.0.0.1:9/{torchvision_file.name}", monkeypatch)
    assert same_body(models.create("resnet18", 3, weights="imagenet"), reference)


def test_a_wrong_checksum_is_refused_and_leaves_no_file(
    shared: models.Classifier,
    torchvision_file: Path,
    address: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = torchvision_file.with_name("resnet18-00000000.pth")
    wrong.write_bytes(torchvision_file.read_bytes())
    point_to(f"{address}/{wrong.name}", monkeypatch)
    with pytest.raises(models.WeightsError, match=r"00000000\.pth could not be fetched \(invalid hash value"):
        loading.load_imagenet(shared, "resnet18")
    assert list(cache.iterdir()) == []


def test_an_http_error_is_told(
    shared: models.Classifier, address: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(f"{address}/resnet18-12345678.pth", monkeypatch)
    with pytest.raises(models.WeightsError, match=r"12345678\.pth could not be fetched \(HTTP Error 404"):
        loading.load_imagenet(shared, "resnet18")


def test_without_a_network_the_remedies_are_given(
    shared: models.Classifier, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:  # bound but not listening: connections are refused
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/resnet18-12345678.pth"
        point_to(url, monkeypatch)
        with pytest.raises(models.WeightsError) as caught:
            loading.load_imagenet(shared, "resnet18")
    said = str(caught.value)
    assert all(part in said for part in (url, "refused", str(cache), 'model.weights = "FILE"', '"none"'))
    assert socket.getdefaulttimeout() is None


def test_a_server_that_says_nothing_is_given_up(
    shared: models.Classifier, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched, "CONNECT_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}/resnet18-12345678.pth", monkeypatch)
        with pytest.raises(models.WeightsError, match="timed out"):
            loading.load_imagenet(shared, "resnet18")


def test_a_damaged_cache_is_named(shared: models.Classifier, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    (cache / "resnet18-12345678.pth").write_bytes(b"half a file")
    point_to("http://127.0.0.1:9/resnet18-12345678.pth", monkeypatch)
    with pytest.raises(models.WeightsError, match=r"12345678\.pth cannot be used.*delete it"):
        loading.load_imagenet(shared, "resnet18")


def test_weights_that_hold_themselves_end_in_a_sentence(tmp_path: Path) -> None:
    state: dict[str, object] = {}
    state["state_dict"] = state
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(models.WeightsError, match="holds no state dict"):
        models.create("tiny", 3, weights=tmp_path / "x.pt")
