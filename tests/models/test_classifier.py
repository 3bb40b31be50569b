"""Do models compute what fastai's and torchvision's do, load what they should, and freeze what they say?"""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from tests.kit.networks import untrained
from thawline import models
from thawline.models.heads import AdaptiveConcatPool2d, classification_head

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
    with pytest.raises(models.UnknownModelError, match=r"'vgg' is neither a network of torchvision nor 'tiny'.*vgg16"):
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
