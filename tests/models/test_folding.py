"""Does a frozen part compute the same when BatchNorm is folded, and does the model not notice?"""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.kit.networks import untrained
from thawline.models.folding import folded
from thawline.models.groups import freeze_to, parameter_groups

IMAGES = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Grouped(nn.Module):
    """A network of torchvision's under a head that trains."""

    def __init__(self, name: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = torchvision.models.get_model(name, weights=None, num_classes=7)
            self.head = nn.Linear(7, 2)

    def groups(self) -> list[list[nn.Module]]:
        return [[self.body], [self.head]]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


class Untraceable(Grouped):
    """No symbol goes through: which way is taken depends on a number."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() < 1e9 else images + 1)


def moved(model: nn.Module) -> nn.Module:
    """float64, and norms that do something."""
    source = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=source) + 0.5)
    return model.double()


def norms(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


@pytest.mark.parametrize(
    ("model", "n", "left"),
    [
        (lambda: untrained("resnet18", 2), -1, 0),
        (lambda: untrained("resnet18", 2), 1, 10),  # those of layer3 and layer4 train
        (lambda: Grouped("mobilenet_v2"), -1, 0),
        (lambda: Untraceable("mobilenet_v2"), -1, 0),
        (lambda: Grouped("densenet121"), -1, 62),  # most stand before their convolution
    ],
)  # fmt: skip
def test_outputs_and_gradients_are_the_models_and_its_weights_stay(
    model: Callable[[], nn.Module], n: int, left: int
) -> None:
    network = moved(model())
    before = copy.deepcopy(network.state_dict())
    freeze_to(network, n, norms=False)
    twin = folded(network, n)
    assert norms(twin) == left < norms(network)
    network.eval()
    results = []
    for each in (network, twin):
        outputs = each(IMAGES)
        network.zero_grad()
        outputs.square().sum().backward()
        results.append((outputs, [p.grad for _, p in parameter_groups(network)[-1]]))
    (plain, gradients), (cheap, others) = results
    torch.testing.assert_close(cheap, plain, rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients, others, strict=True):
        assert one is not None
        torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert {id(p) for p in twin.parameters() if p.requires_grad} == {
        id(p) for p in network.parameters() if p.requires_grad
    }


def test_nothing_is_kept_of_a_frozen_forward_pass() -> None:
    model = untrained("resnet18", 2)
    freeze_to(model, -1, norms=False)
    assert not model.body(IMAGES.float()).requires_grad
    freeze_to(model, -1)
    assert model.body(IMAGES.float()).requires_grad  # fastai's way: BatchNorm trains


def test_where_nothing_can_be_folded_it_is_the_model_itself() -> None:
    model = untrained("resnet18", 2)
    freeze_to(model, 0)
    assert folded(model, 0) is model
    half = untrained("resnet18", 2).bfloat16()
    freeze_to(half, -1, norms=False)
    assert folded(half, -1) is half
