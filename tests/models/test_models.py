"""Do models compute what fastai's and torchvision's do, load what they should, and freeze what they say?"""

import hashlib
import http.server
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from tests.kit.images import grown
from thawline import models
from thawline.models import weights
from thawline.models.heads import AdaptiveConcatPool2d, classification_head
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.format import Origin

untrained = partial(models.create, weights="none")


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


@pytest.fixture(scope="module")
def shared() -> models.Classifier:
    """One model for the tests that change nothing but what is frozen."""
    return untrained("resnet18", 3, seed=0)


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


# --- heads


def test_concat_pool_puts_the_maximum_before_the_average() -> None:
    planes = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    pooled = AdaptiveConcatPool2d()(torch.from_numpy(planes)).numpy()
    assert pooled.shape == (2, 6, 1, 1)
    np.testing.assert_array_equal(pooled[:, :3, 0, 0], planes.max((2, 3)))
    np.testing.assert_allclose(pooled[:, 3:, 0, 0], planes.mean((2, 3)), rtol=1e-13)


def test_head_computes_what_numpy_computes() -> None:
    rng = np.random.default_rng(1)
    head = classification_head(8, 5).double().eval()
    with torch.no_grad():  # norms away from their start, so that each of their four vectors counts
        for layer in head:
            if isinstance(layer, nn.BatchNorm1d):
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    assert tensor is not None
                    tensor.copy_(torch.from_numpy(rng.uniform(0.5, 2, tensor.shape)))
    state = {key: value.numpy() for key, value in head.state_dict().items()}

    def norm(x: np.ndarray, i: int) -> np.ndarray:
        scale = state[f"{i}.weight"] / np.sqrt(state[f"{i}.running_var"] + 1e-5)
        return (x - state[f"{i}.running_mean"]) * scale + state[f"{i}.bias"]

    planes = rng.normal(size=(6, 8, 3, 3))
    x = norm(np.concatenate([planes.max((2, 3)), planes.mean((2, 3))], 1), 2)
    expected = norm(np.maximum(x @ state["4.weight"].T, 0), 6) @ state["8.weight"].T
    with torch.no_grad():
        np.testing.assert_allclose(head(torch.from_numpy(planes)).numpy(), expected, rtol=1e-10, atol=1e-12)
    assert {key for key in state if key.endswith("bias")} == {"2.bias", "6.bias"}


def test_head_starts_kaiming_normal_with_fastais_dropouts() -> None:
    head = classification_head(512, 200, dropout=0.4)
    assert [layer.p for layer in head if isinstance(layer, nn.Dropout)] == [0.2, 0.4]
    for layer in head:
        if isinstance(layer, nn.Linear):  # He: std = sqrt(2 / fan_in), and a normal's kurtosis is 3
            w = layer.weight.detach().double().flatten()
            assert w.std().item() == pytest.approx((2 / layer.in_features) ** 0.5, rel=0.02)
            assert ((w / w.std()) ** 4).mean().item() == pytest.approx(3, rel=0.05)


# --- backbones


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet50", 2048)])
def test_create_finds_the_width_of_the_body(name: str, width: int) -> None:
    with torch.device("meta"):  # the shapes alone: create itself stays on the CPU
        model = untrained(name, 4)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        assert model.body(images).shape == (2, width, 1, 1)
        assert model.eval()(images).shape == (2, 4)
    assert (model.name, model.classes) == (name, 4)


def test_a_seed_decides_the_weights_and_leaves_the_callers_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = untrained("resnet18", 3, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    again = untrained("resnet18", 3, seed=1).state_dict()
    other = untrained("resnet18", 3, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if first[key].ndim > 1)


def test_the_body_starts_as_torchvisions_own() -> None:
    model = untrained("resnet18", 3, seed=9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        own = torchvision.models.resnet18().state_dict()
    body = model.body.state_dict()
    assert list(body) == [key for key in own if not key.startswith("fc.")]
    assert all(torch.equal(body[key], own[key]) for key in body)


def test_tiny_sees_16_px_in_a_resnets_groups_and_knows_that_nobody_trained_it() -> None:
    model = models.create("tiny", 4, seed=0)
    assert (model.name, model.classes, model.pretrained) == ("tiny", 4, False)
    assert model.origin == "random weights: nobody trained it on ImageNet"
    assert model.eval()(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    assert 90_000 < sum(parameter.numel() for parameter in model.parameters()) < 110_000
    groups = models.parameter_groups(model)
    assert [pair for group in groups for pair in group] == list(model.named_parameters())
    tops = [list(dict.fromkeys(".".join(name.split(".")[:2]) for name, _ in group)) for group in groups[:2]]
    assert tops == [["body.conv1", "body.bn1", "body.layer1", "body.layer2"], ["body.layer3", "body.layer4"]]
    assert models.normalisation("tiny") == models.normalisation("resnet18")
    other = untrained("tiny", 4, seed=0).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


def test_unknown_names_get_the_nearest_ones() -> None:
    with pytest.raises(models.UnknownModelError, match=r"'resnet43'.*resnet34"):
        untrained("resnet43", 3)
    with pytest.raises(models.UnknownModelError, match=r"resnet18.*wide_resnet50_2"):
        untrained("vgg", 3)


@pytest.mark.parametrize(("classes", "dropout"), [(0, 0.5), (3, 1.0), (3, -0.1), (3, float("nan"))])
def test_a_head_that_cannot_learn_is_refused(classes: int, dropout: float) -> None:
    with pytest.raises(models.ModelError, match="give"):
        classification_head(8, classes, dropout=dropout)


# --- groups


def test_three_groups_hold_every_parameter_once_in_order(shared: models.Classifier) -> None:
    groups = models.parameter_groups(shared)
    assert [pair for group in groups for pair in group] == list(shared.named_parameters())
    tops = [{".".join(name.split(".")[:2]) for name, _ in group} for group in groups]
    assert tops[0] == {"body.conv1", "body.bn1", "body.layer1", "body.layer2"}
    assert tops[1] == {"body.layer3", "body.layer4"}
    assert all(top.startswith("head.") for top in tops[2])
    assert [len(group) for group in models.layer_groups(shared)] == [6, 2, 1]


@pytest.mark.parametrize(("n", "first"), [(0, 0), (1, 1), (2, 2), (-1, 2), (-2, 1), (-3, 0)])
def test_freeze_to_trains_the_groups_from_n_on_and_every_norm(shared: models.Classifier, n: int, first: int) -> None:
    norms = {
        f"{name}.{which}"
        for name, layer in shared.named_modules()
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d)
        for which in ("weight", "bias")
    }
    models.freeze(shared)
    models.freeze_to(shared, n)
    expected = norms | {name for group in models.parameter_groups(shared)[first:] for name, _ in group}
    assert {name for name, p in shared.named_parameters() if p.requires_grad} == expected


def test_freeze_and_unfreeze_are_the_two_ends(shared: models.Classifier) -> None:
    models.freeze(shared)
    assert not shared.get_parameter("body.layer4.1.conv2.weight").requires_grad
    assert shared.get_parameter("head.4.weight").requires_grad
    models.unfreeze(shared)
    assert all(parameter.requires_grad for parameter in shared.parameters())


def test_statistics_of_frozen_norms_move_and_follow_their_definition() -> None:
    model = untrained("resnet18", 3, seed=0)
    models.freeze(model)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = model.body.get_submodule("conv1")(images).mean((0, 2, 3))
    model.train()(images).sum().backward()
    torch.testing.assert_close(model.get_buffer("body.bn1.running_mean"), 0.1 * mean)  # torch's momentum
    assert model.get_parameter("body.bn1.weight").grad is not None
    assert model.get_parameter("body.conv1.weight").grad is None


@pytest.mark.parametrize("n", [3, -4])
def test_a_group_that_is_not_there_is_refused(shared: models.Classifier, n: int) -> None:
    with pytest.raises(models.ModelError, match=rf"freeze_to {n}: .* 3 layer groups.* -3 to 2"):
        models.freeze_to(shared, n)


class TwoLayers(nn.Module):
    """Somebody's own model: what groups.py asks for, and nothing else."""

    def __init__(self, picked: list[str]) -> None:
        super().__init__()
        self.stem, self.top, self.picked = nn.Linear(2, 2), nn.Linear(2, 2), picked

    def groups(self) -> list[list[nn.Module]]:
        return [[self.get_submodule(name)] for name in self.picked]


def test_any_module_with_groups_can_be_frozen() -> None:
    model = TwoLayers(["stem", "top"])
    models.freeze(model)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains == ["top.weight", "top.bias"]


def test_groups_that_miss_or_repeat_a_parameter_are_refused() -> None:
    with pytest.raises(models.ModelError, match=r"top\.weight 0 times"):
        models.parameter_groups(TwoLayers(["stem"]))
    with pytest.raises(models.ModelError, match=r"stem\.weight 2 times"):
        models.parameter_groups(TwoLayers(["stem", "top", "stem"]))
    with pytest.raises(models.ModelError, match=r"Conv2d has no method groups\(\)"):
        models.layer_groups(nn.Conv2d(1, 1, 1, groups=1))


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
        weights.load_file(model, tmp_path / "other.pth")
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
        weights.load_file(shared, tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 half a zip", b"\x80\x02}q\x00."])
def test_a_file_of_something_else_is_refused(shared: models.Classifier, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(models.WeightsError, match=r"x\.pth .*"):
        weights.load_file(shared, tmp_path / "x.pth")


def test_a_file_without_a_state_dict_is_refused(shared: models.Classifier, tmp_path: Path) -> None:
    torch.save({"model": {"epoch": 3}}, tmp_path / "x.pth")
    with pytest.raises(models.WeightsError, match="holds no state dict"):
        weights.load_file(shared, tmp_path / "x.pth")


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
    monkeypatch.setattr(weights, "imagenet_url", lambda name: url)


def test_imagenet_means_torchvisions_first_weights() -> None:
    pattern = r"https://download\.pytorch\.org/models/resnet34-[0-9a-f]{8}\.pth"
    assert re.fullmatch(pattern, weights.imagenet_url("resnet34"))


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
        weights.load_imagenet(shared, "resnet18")
    assert list(cache.iterdir()) == []


def test_an_http_error_is_told(
    shared: models.Classifier, address: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(f"{address}/resnet18-12345678.pth", monkeypatch)
    with pytest.raises(models.WeightsError, match=r"12345678\.pth could not be fetched \(HTTP Error 404"):
        weights.load_imagenet(shared, "resnet18")


def test_without_a_network_the_remedies_are_given(
    shared: models.Classifier, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:  # bound but not listening: connections are refused
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/resnet18-12345678.pth"
        point_to(url, monkeypatch)
        with pytest.raises(models.WeightsError) as caught:
            weights.load_imagenet(shared, "resnet18")
    said = str(caught.value)
    assert all(part in said for part in (url, "refused", str(cache), 'model.weights = "FILE"', '"none"'))
    assert socket.getdefaulttimeout() is None


def test_a_server_that_says_nothing_is_given_up(
    shared: models.Classifier, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CONNECT_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}/resnet18-12345678.pth", monkeypatch)
        with pytest.raises(models.WeightsError, match="timed out"):
            weights.load_imagenet(shared, "resnet18")


def test_a_damaged_cache_is_named(shared: models.Classifier, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    (cache / "resnet18-12345678.pth").write_bytes(b"half a file")
    point_to("http://127.0.0.1:9/resnet18-12345678.pth", monkeypatch)
    with pytest.raises(models.WeightsError, match=r"12345678\.pth cannot be used.*delete it"):
        weights.load_imagenet(shared, "resnet18")


def test_weights_that_hold_themselves_end_in_a_sentence(tmp_path: Path) -> None:
    state: dict[str, object] = {}
    state["state_dict"] = state
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(models.WeightsError, match="holds no state dict"):
        models.create("tiny", 3, weights=tmp_path / "x.pt")
