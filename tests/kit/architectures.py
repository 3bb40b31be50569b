"""What must hold for every architecture? Its groups, frozen and unfrozen steps, and its library's features."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thawline import models
from thawline.models.bodies import from_timm, tiny
from thawline.models.bodies.body import Body
from thawline.models.bodies.libraries import body_of
from thawline.models.settings import GROUPINGS, Grouping


@dataclass(frozen=True)
class Tried:
    """The measurements of one architecture; parameters in millions, layer groups by grouping, losses of two steps."""

    name: str
    millions: float
    groups: tuple[int, ...]
    stages: int
    pooled: bool
    side_px: int
    losses: tuple[float, float]


def try_out(name: str, *, side_px: int | None = None) -> Tried:
    """Check one architecture. Raises AssertionError, naming parameters. side_px: None is the body's own."""
    body = body_of(name)
    side_px = body.size_px if side_px is None or body.bound else side_px
    model = models.create(name, 3, weights="none", seed=0, size_px=side_px)
    images = torch.randn(4, 3, side_px, side_px, generator=torch.Generator().manual_seed(1))
    check_features(body, model.body, images[:2])
    groups = tuple(check_groups(body, model, how) for how in GROUPINGS)
    frozen = check_frozen(model, images)
    return Tried(
        name=name,
        millions=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        groups=groups,
        stages=len(body.stages),
        pooled=body.pooled,
        side_px=side_px,
        losses=(frozen, check_unfrozen(model, images)),
    )


def check_groups(body: Body, model: models.Classifier, how: Grouping) -> int:
    """Every parameter in one group, the first layer in the first group, the head in the last."""
    grouped = models.Classifier(model.body, model.head, name=body.name, classes=3, groups=body.groups(how))
    groups = models.parameter_groups(grouped)  # raises where one lies in none or in two
    assert all(groups), f"{body.name}: a group of {how} is empty"
    first = next(name for name, layer in model.body.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    assert f"body.{first}.weight" in dict(groups[0]), f"{body.name}: {first} is not in the first group of {how}"
    assert all(key.startswith("head.") for key, _ in groups[-1])
    return len(groups)


def check_frozen(model: models.Classifier, images: Tensor) -> float:
    """A step changes only the head and the BatchNorms. Returns the loss before it."""
    models.freeze(model)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    loss = step(model, images)
    norms = {
        id(parameter) for layer in model.modules() if isinstance(layer, _BatchNorm) for parameter in layer.parameters()
    }
    for key, value in model.named_parameters():
        if not key.startswith("head.") and id(value) not in norms:
            assert torch.equal(value, before[key]), f"{model.name}: {key} moved though it is frozen"
    assert any(not torch.equal(value, before[f"head.{key}"]) for key, value in model.head.named_parameters())
    return loss


def check_unfrozen(model: models.Classifier, images: Tensor) -> float:
    """A step has a gradient for every parameter: DistributedDataParallel would wait for a missing one. The loss."""
    models.unfreeze(model)
    loss = step(model, images)
    without = [key for key, value in model.named_parameters() if value.grad is None]
    assert not without, f"{model.name}: no gradient for {without[:5]}"
    bad = [key for key, value in model.named_parameters() if value.grad is not None and not value.grad.isfinite().all()]
    assert not bad, f"{model.name}: a gradient that is no number for {bad[:5]}"
    return loss


def step(model: models.Classifier, images: Tensor) -> float:
    """One step of plain SGD; the loss before it."""
    model.train()
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images), torch.arange(len(images)) % 3)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert loss.isfinite(), f"{model.name}: the loss is {loss.item()}"
    return loss.item()


def check_features(body: Body, module: nn.Module, images: Tensor) -> None:
    """The body computes what its library's own network gives to its classifier, by the same weights."""
    own = library(body, images.shape[-1])
    foreign = from_timm.foreign(body) if body.name.startswith("timm/") else body.foreign
    state = {key: value for key, value in own.state_dict().items() if not key.startswith(foreign)}
    module.load_state_dict(state)
    module.eval()
    with torch.no_grad():
        features, expected = module(images), before_classifier(own.eval(), images, pooled=body.pooled)
    if expected.numel() != features.numel() and not body.pooled:
        features = features.mean((2, 3))
    if expected.numel() == features.numel():
        torch.testing.assert_close(features.flatten(1), expected.flatten(1), rtol=1e-4, atol=1e-5)


def library(body: Body, side_px: int) -> nn.Module:
    """The network as a user of its library makes it, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if body.name.startswith("timm/"):
            import timm

            options: dict[str, Any] = {"img_size": side_px} if body.bound else {}
            network: nn.Module = timm.create_model(body.name.removeprefix("timm/"), num_classes=7, **options)
            return network
        if body.name == "tiny":
            return tiny.network()
        options = {"init_weights": True} if body.name in ("googlenet", "inception_v3") else {}
        own: nn.Module = torchvision.models.get_model(body.name, weights=None, num_classes=7, **options)
        return own


def before_classifier(own: nn.Module, images: Tensor, *, pooled: bool) -> Tensor:
    """The features that a library's network passes to its classifier: torchvision's last child, or timm's head."""
    network: Any = own
    if hasattr(network, "reset_classifier"):
        if pooled:
            vectors: Tensor = network.forward_head(network.forward_features(images), pre_logits=True)
            return vectors
        network.reset_classifier(0, "")
        maps: Tensor = network(images)
        return maps
    inputs: list[Tensor] = []
    *_, last = own.children()
    last.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    own(images)
    return inputs[0] if inputs else own(images)
