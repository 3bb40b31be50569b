"""Is what a body says of itself so? Its stages, its groups, its channels, its size, its pixels; and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.kit.networks import untrained
from tests.models.test_bundle import ABOUT
from thawline import models
from thawline.models import bundle
from thawline.models.bodies import from_timm
from thawline.models.bodies.body import Stage, feature_maps, for_channels
from thawline.models.bodies.libraries import body_of, sketch
from thawline.models.classifier import check, create
from thawline.models.settings import Grouping


def images(side_px: int = 64, *, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, side_px, side_px, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def timm() -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")


# --- stages


def test_stages_are_the_last_maps_of_each_size() -> None:
    body = body_of("resnet18")
    assert body.stages == (Stage(64, 2), Stage(64, 4), Stage(128, 8), Stage(256, 16), Stage(512, 32))
    network = body.module.eval()
    maps = feature_maps(network, images())
    value, expected = images(), []
    for name, layer in network.named_children():
        value = layer(value)
        if name in ("relu", "layer1", "layer2", "layer3", "layer4"):
            expected.append(value)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


def test_a_swins_maps_come_with_their_channels_first() -> None:
    body = body_of("swin_t")
    assert (body.pooled, body.features) == (True, 768)
    assert body.stages == (Stage(96, 4), Stage(192, 8), Stage(384, 16), Stage(768, 32))
    with torch.no_grad():
        maps = feature_maps(body.module.eval(), images())
        vectors = body.module(images())
    assert [tuple(each.shape[1:]) for each in maps] == [(96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2)]
    assert torch.equal(maps[-1].mean((2, 3)), vectors)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("maps", [False, True])
def test_timms_stages_are_what_its_maps_show(maps: bool) -> None:
    body = body_of("timm/test_efficientnet", maps=maps)
    found = feature_maps(body.module.eval(), images())
    assert [(each.shape[1], 64 // each.shape[2]) for each in found] == [(s.channels, s.stride) for s in body.stages]
    assert any(key.startswith("conv_head") for key in body.foreign) is maps
    assert sum(map(len, body.by_block)) == sum(1 for _ in body.module.named_parameters())


# --- groups


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("three", [["conv1", "bn1", "layer1", "layer2"], ["layer3", "layer4"]]),
        ("stages", [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]),
        ("blocks", [["conv1", "bn1"], *([f"layer{i}.{j}"] for i in (1, 2, 3, 4) for j in (0, 1))]),
    ],
)
def test_a_resnets_groups(how: Grouping, expected: list[list[str]]) -> None:
    model = untrained("resnet18", 3, groups=how)
    names = {module: name for name, module in model.body.named_modules()}
    groups = [[names[part] for part in group if [*part.parameters()]] for group in model.groups()[:-1]]  # type: ignore
    assert groups == expected
    models.freeze_to(model, 1)
    assert not model.get_parameter("body.conv1.weight").requires_grad
    assert model.get_parameter("body.layer4.0.conv1.weight").requires_grad


def test_a_class_token_is_of_the_stem() -> None:
    body = body_of("vit_b_32")
    assert body.by_block[0] == ("class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding")
    assert [names[0] for names in body.by_block[1:]] == [
        f"encoder.layers.encoder_layer_{i}.ln_1.weight" for i in range(12)
    ]
    assert body.by_block[-1][-1] == "encoder.ln.bias"
    model = models.Classifier(body.module, nn.Linear(768, 2), name="vit", classes=2, groups=body.groups())
    models.freeze_to(model, 1)
    trains = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trains == {f"body.{name}" for name in body.groups()[1]} | {"head.weight", "head.bias"}


def test_another_grouping_is_refused() -> None:
    with pytest.raises(models.ModelError, match=r"groups='halves': .*give three, stages, blocks"):
        untrained("tiny", 3, groups="halves")  # type: ignore[arg-type]


# --- channels and sizes


def test_channels_follow_fastais_rule(tmp_path: Path) -> None:
    rgb = torch.randn(8, 3, 3, 3)
    assert torch.equal(for_channels(rgb, 1), rgb.sum(1, keepdim=True))
    assert torch.equal(for_channels(rgb, 2), rgb[:, :2] * 1.5)
    assert torch.equal(for_channels(rgb, 5), torch.cat([rgb, torch.zeros(8, 2, 3, 3)], 1))
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "rgb.pt")
    trained = create("resnet18", 2, weights=tmp_path / "rgb.pt").eval()
    grey = create("resnet18", 2, weights=tmp_path / "rgb.pt", in_channels=1, seed=0).eval()
    one = images(channels=1)
    torch.testing.assert_close(grey.body(one), trained.body(one.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    more = create("resnet18", 2, weights=tmp_path / "rgb.pt", in_channels=5, seed=0).eval()
    torch.testing.assert_close(more.body(images(channels=5)), trained.body(images(channels=5)[:, :3]))
    assert more.options == {"dropout": 0.5, "in_channels": 5}
    with pytest.raises(models.ModelError, match="in_channels=0"):
        untrained("tiny", 2, in_channels=0)


@pytest.mark.usefixtures("timm")
def test_a_network_of_one_size_is_built_for_the_jobs() -> None:
    model = untrained("timm/test_vit", 3, size_px=96, groups="blocks")
    assert model.eval()(images(96)).shape == (2, 3)
    assert model.options == {"dropout": 0.5, "groups": "blocks", "size_px": 96}
    assert check("timm/test_vit", sizes_px=[96]) == 3
    with pytest.raises(models.ModelError, match=r"vit_tiny_patch16_224 cannot see images of 64 px .*data\.size_px"):
        check("timm/vit_tiny_patch16_224", sizes_px=[64, 96])


def test_a_size_that_a_network_cannot_be_built_for_is_refused() -> None:
    with pytest.raises(models.ModelError, match=r"maxvit_t cannot be built for images of 100 px .*size_px=224"):
        check("maxvit_t", sizes_px=[100])
    with pytest.raises(models.ModelError, match=r"vit_b_16 cannot be built for images of 30 px .*size_px=224"):
        check("vit_b_16", sizes_px=[30])
    with pytest.raises(models.ModelError, match=r"alexnet cannot see images of 16 px"):
        check("alexnet", sizes_px=[16])


@pytest.mark.usefixtures("timm")
def test_a_bundle_holds_what_its_model_is_made_of() -> None:
    model = untrained("timm/test_vit", 3, size_px=96, groups="blocks", seed=0)
    about = replace(ABOUT, model=model.name, options=model.options)
    again, _ = bundle.unpacked(bundle.packed(model.state_dict(), about), where="x")
    assert torch.equal(again(images(96)), model.eval()(images(96)))
    assert len(again.groups()) == len(model.groups()) == 8


# --- pixels


def test_networks_that_change_their_pixels_are_given_them_changed() -> None:
    own = torchvision.models.googlenet(weights=None, init_weights=True, aux_logits=False, transform_input=True).eval()
    body = body_of("googlenet")
    body.module.load_state_dict({key: value for key, value in own.state_dict().items() if not key.startswith("fc.")})
    seen: list[Tensor] = []
    own.avgpool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    preset = torchvision.models.get_model_weights("googlenet").DEFAULT.transforms()

    def normal(mean: list[float], std: list[float]) -> Tensor:
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    with torch.no_grad():
        own(normal(preset.mean, preset.std))
        ours = body.module.eval()(normal(*map(list, models.normalisation("googlenet"))))
    torch.testing.assert_close(ours, seen[0], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("timm")
def test_normalisation_is_that_of_the_weights() -> None:
    half = (0.5, 0.5, 0.5)
    assert models.normalisation("timm/tf_efficientnet_lite0") == (half, half)
    assert models.normalisation("timm/vit_small_patch16_dinov3.lvd1689m") == models.normalisation("resnet18")


# --- checkpointing


@pytest.mark.usefixtures("timm")
def test_checkpointing_changes_no_gradient() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = untrained("timm/test_vit", 3, size_px=32, dropout=0.0, seed=0, checkpointing=checkpointing).train()
        model(images(32)).square().sum().backward()
        return [value.grad for value in model.parameters() if value.grad is not None]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again)
    with pytest.raises(models.ModelError, match=r"resnet18 has no gradient checkpointing"):
        check("resnet18", checkpointing=True)


# --- names


@pytest.mark.usefixtures("timm")
def test_timms_unknown_names_get_the_nearest_ones() -> None:
    for name, said in (
        ("timm/resnet-18", r"'timm/resnet-18' is no model of timm .*timm/resnet18"),
        ("timm/resnet18.nope", r"no weights of this tag; give timm/resnet18\."),
    ):
        with pytest.raises(models.UnknownModelError, match=said):
            models.normalisation(name)


def test_without_timm_its_names_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    from_timm._timm.cache_clear()
    with pytest.raises(models.UnknownModelError, match=r'not installed.*pip install "thawline\[timm\]"'):
        models.normalisation("timm/resnet18")


def test_old_names_of_densenets_are_read(tmp_path: Path) -> None:
    own = torchvision.models.densenet121().state_dict()
    old = {key.replace("norm1", "norm.1").replace("conv2", "conv.2"): value for key, value in own.items()}
    old = {key: value for key, value in old.items() if "denselayer" in key} | {
        key: value for key, value in own.items() if "denselayer" not in key
    }
    torch.save(old, tmp_path / "old.pt")
    body = create("densenet121", 2, weights=tmp_path / "old.pt").body.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in body.items())


@pytest.mark.usefixtures("timm")
def test_a_classifier_of_several_layers_is_left_out_whole() -> None:
    body = sketch("timm/caformer_s18")
    foreign = from_timm.foreign(body)
    left = [key for key in from_timm.shapes(body.name) if not key.startswith(foreign)]
    assert left == [*body.module.state_dict()]
    assert "head.fc.fc1.weight" in foreign
