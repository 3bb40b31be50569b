"""Does a decoder of segmentation_models_pytorch over our body compute what smp's own model does, at any size?"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from thawline import models
from thawline.models import decoders
from thawline.models.bundle import Description, packed
from thawline.models.classifier import check, create
from thawline.models.errors import BundleError, ModelError
from thawline.models.groups import freeze, parameter_groups

pytestmark = pytest.mark.skipif(  # not importorskip: every test process would import it, whatever it runs
    not find_spec("segmentation_models_pytorch"), reason="the extra smp is not installed"
)
NAMES = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer"
ALL = tuple(f"smp:{name}" for name in NAMES.split())
OWN_DILATION = ("smp:DeepLabV3", "smp:DeepLabV3Plus", "smp:PAN")
"""smp dilates its encoder for these, which a body of ours is not."""
ONE_UNIT = (".SE_ll.", ".SE_hl.", ".fpa.down")
"""Layers of MAnet and PAN with one unit under a ReLU, which may begin dead."""
BODIES = ("convnext_tiny", "efficientnet_b0")


def mask_model(decoder: str, body: str = "tiny") -> Any:
    return create(body, 5, task="mask", weights="none", seed=0, decoder=decoder)


def test_they_are_smps_architectures_but_for_the_one_over_tokens() -> None:
    import segmentation_models_pytorch as smp

    assert set(decoders.names()) >= {*ALL}
    assert "smp:DPT" not in decoders.names()
    before = dict(smp.encoders.encoders)
    mask_model("smp:FPN")
    assert smp.encoders.encoders == before, "smp's own list is left as it was"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in (*OWN_DILATION, "smp:PSPNet")])
def test_over_a_resnet_it_is_smps_own_model(name: str) -> None:
    """PSPNet is left out: smp gives it a body of three stages."""
    import segmentation_models_pytorch as smp

    ours = mask_model(name, "resnet18").eval()
    theirs = smp.create_model(name.removeprefix("smp:"), "resnet18", encoder_weights=None, classes=5).eval()
    theirs.encoder.load_state_dict(ours.body.state_dict())
    theirs.decoder.load_state_dict(ours.head.decoder.state_dict())
    theirs.segmentation_head.load_state_dict(ours.head.segmentation_head.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_mask_is_as_large_as_the_image_and_everything_learns(name: str) -> None:
    model = mask_model(name).eval()
    sizes = ((128, 192), (131, 130)) if name == "smp:PAN" else ((96, 64), (97, 130))
    for height, width in sizes:
        model.zero_grad()
        logits = model(torch.randn(2, 3, height, width))
        assert logits.shape == (2, 5, height, width)
        logits.square().mean().backward()
    still = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [key for key in still if not any(narrow in key for narrow in ONE_UNIT)] == []
    groups = parameter_groups(model)
    assert len(groups) == 3
    assert {key.partition(".")[0] for key, _ in groups[-1]} == {"head"}
    freeze(model)
    assert all(p.requires_grad for p in model.head.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_over_any_body_with_stages(body: str) -> None:
    for name in ("smp:FPN", "smp:DeepLabV3Plus", "smp:Unet"):
        model = mask_model(name, body).eval()
        logits = model(torch.randn(1, 3, 97, 130))
        assert logits.shape == (1, 5, 97, 130)
        logits.square().mean().backward()
        assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_is_padded_changes_no_pixel_of_an_image_that_fits() -> None:
    images = torch.randn(1, 3, 33, 64)
    assert decoders.padded(images, 1) is images
    wider = decoders.padded(images, 32)
    assert wider.shape == (1, 3, 64, 64)
    assert torch.equal(wider[:, :, :33], images)
    assert not wider[:, :, 33:].any()


def test_its_bundle_is_the_model_and_names_the_decoder(tmp_path: Path) -> None:
    model = mask_model("smp:FPN").eval()
    about = Description(
        model="tiny",
        options=model.options,
        outputs=5,
        task="mask",
        classes=tuple("abcde"),
        image={},
        engine="reference",
        precision="fp32",
        step=1,
    )
    for name, data in packed(model.state_dict(), about).items():
        (tmp_path / name).write_bytes(data)
    loaded, there = models.load(tmp_path)
    assert there.options["decoder"] == "smp:FPN"
    images = torch.randn(1, 3, 50, 34)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decoder": "smp:fpn"}, r"decoder='smp:fpn' is not known: .*give smp:FPN"),
        ({"decoder": "DeepLabV3+"}, r"give smp:DeepLabV3"),
        ({"decoder": "u-net"}, r"is not known: .*unet"),
        ({"decoder": "smp:FPN", "task": "points"}, r"decoder=smp:FPN with task='points', .*\(it is for mask\)"),
        ({"decoder": "smp:FPN", "name": "vit_b_32"}, r"vit_b_32 has feature maps of one size alone"),
        ({"decoder": "smp:PAN", "sizes_px": (64,)}, r"smp:PAN over tiny cannot see images of 64 px"),
    ],
)
def test_what_cannot_be_gets_a_sentence_before_anything_is_trained(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        check(**{"name": "tiny", "task": "mask", **options})


def test_without_smp_a_sentence_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    test_its_bundle_is_the_model_and_names_the_decoder(tmp_path)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ModelError, match=r'is not installed: .*pip install "thawline\[smp\]"'):
        mask_model("smp:FPN")
    with pytest.raises(BundleError, match=r"cannot be made here .*thawline\[smp\]"):
        models.load(tmp_path)
    assert mask_model("unet").options.get("decoder") is None
