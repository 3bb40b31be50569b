"""Is the U-Net fastai's, and does it give a class to every pixel of any image over any body with stages?"""

from typing import Any

import pytest
import torch

from thawline.models.bodies.body import feature_maps
from thawline.models.classifier import create
from thawline.models.errors import ModelError
from thawline.models.folding import folded, in_two
from thawline.models.groups import freeze, parameter_groups
from thawline.models.unet import Enlarged

# What `python -m benchmarks.fastai_unet` printed of fastai 2.8.12's DynamicUnet over a ResNet-18: 5 classes, 64 x 96.
FASTAIS_PARAMETERS = 19_936_796
FASTAIS_BLOCKS = [(512, 4, 6), (384, 8, 12), (256, 16, 24), (96, 32, 48)]

BODIES = ("resnet18", "convnext_tiny", "efficientnet_b0", "mobilenet_v3_small")
SIZES = ((96, 64), (97, 130), (224, 224))

pytestmark = pytest.mark.slow  # builds many networks


def unet(name: str, **options: Any) -> Any:
    return create(name, 5, task="mask", weights="none", seed=0, **options)


def test_it_has_fastais_parameters_and_shapes() -> None:
    model = unet("resnet18").eval()
    assert sum(p.numel() for p in model.head.parameters()) == FASTAIS_PARAMETERS
    images, blocks = torch.randn(1, 3, 64, 96), list[tuple[int, ...]]()
    for block in model.head.blocks:
        block.register_forward_hook(lambda module, inputs, out: blocks.append(tuple(out.shape[1:])))
    with torch.no_grad():
        assert model(images).shape == (1, 5, 64, 96)
    assert blocks == FASTAIS_BLOCKS


@pytest.mark.parametrize("name", BODIES)
def test_the_mask_is_as_large_as_the_image_and_everything_learns(name: str) -> None:
    model = unet(name).eval()  # in training whole blocks are left out at random
    ghost = unet(name).to("meta")
    for height, width in SIZES:
        assert ghost(torch.empty(2, 3, height, width, device="meta")).shape == (2, 5, height, width)
    model(torch.randn(2, 3, 70, 45)).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    groups = parameter_groups(model)
    assert len(groups) == 3
    assert {key.partition(".")[0] for key, _ in groups[-1]} == {"head"}


def test_frozen_its_body_is_the_librarys_own() -> None:
    """The skips are what torchvision computes at each size, and only the decoder is left to train."""
    model = unet("resnet18").eval()
    freeze(model)
    trains = {key.partition(".")[0] for key, p in model.named_parameters() if p.requires_grad and "bn" not in key}
    assert trains - {"body"} == {"head"}
    body, images = model.body, torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        first = body.relu(body.bn1(body.conv1(images)))
        expected = [first, body.layer1(body.maxpool(first))]
        for layer in (body.layer2, body.layer3, body.layer4):
            expected.append(layer(expected[-1]))
        found = feature_maps(body, images)
    assert all(map(torch.equal, found, expected))


def test_what_is_enlarged_begins_without_a_pattern() -> None:
    torch.manual_seed(0)
    value = Enlarged(8, 3)(torch.randn(2, 8, 5, 4))
    assert value.shape == (2, 3, 10, 8)
    assert torch.equal(value, value[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_what_no_unet_can_stand_on_gets_a_sentence() -> None:
    with pytest.raises(ModelError, match=r"vit_b_32 has feature maps of one size alone.*give a convolutional body"):
        unet("vit_b_32")
    with pytest.raises(ModelError, match="a mask of 1 classes has nothing to tell apart"):
        create("tiny", 1, task="mask", weights="none")


@pytest.mark.parametrize("name", ["resnet18", "tiny"])
def test_folded_it_says_the_same_and_there_is_nothing_to_cache(name: str) -> None:
    model = unet(name).eval()
    model.body.requires_grad_(False)
    images = torch.randn(2, 3, 64, 48)
    twin = folded(model, -1)
    assert twin is not model
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(images), model(images), rtol=1e-3, atol=1e-4)
    with pytest.raises(ModelError, match=r"sees the images and the maps of all stages.*cache_features = 0"):
        in_two(model)


def test_other_channels_reach_the_last_convolutions_too() -> None:
    assert unet("tiny", in_channels=1)(torch.randn(2, 1, 33, 40)).shape == (2, 5, 33, 40)
