"""Do adapters alone train beside a frozen body, and does the merged model say what the one with adapters says?"""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from thawline.models.classifier import Classifier, create
from thawline.models.errors import ModelError, WeightsError
from thawline.models.folding import folded
from thawline.models.groups import freeze_to, parameter_groups, unfreeze
from thawline.models.lora import add_lora, check, merged

pytestmark = [  # not importorskip: every test process would import it, whatever it runs
    pytest.mark.slow,
    pytest.mark.skipif(not (find_spec("peft") and find_spec("timm")), reason="the extra lora or timm is not installed"),
]

BODIES = ("timm/test_vit", "timm/test_convnext", "swin_t")
SIDE = {"timm/test_vit": 160}


def adapted(name: str, **options: Any) -> Classifier:
    return add_lora(create(name, 4, weights="none", seed=0), rank=3, alpha=6.0, seed=1, **options)


def trained(model: nn.Module) -> set[str]:
    """What kinds of parameters ask for gradients."""
    kinds = {True: "adapters", False: "body"}
    return {
        "head" if name.startswith("head.") else kinds[".lora_" in name]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("name", BODIES)
def test_at_first_nothing_changes_and_merged_what_was_learnt_stays(name: str) -> None:
    model, plain = adapted(name).eval(), create(name, 4, weights="none", seed=0).eval()
    images = torch.randn(2, 3, SIDE.get(name, 64), SIDE.get(name, 64))
    with torch.no_grad():
        for key, parameter in (*model.named_parameters(), *plain.named_parameters()):
            if key.endswith(".gamma"):  # a ConvNeXt's blocks begin with a millionth of what they say
                parameter.fill_(1.0)
        before = plain(images)
        torch.testing.assert_close(model(images), before)
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                nn.init.normal_(parameter, std=0.1)
        after = model(images)
        assert not torch.allclose(after, before, atol=1e-2)
        plain.load_state_dict(merged(model, model.state_dict()))  # every name and shape
        torch.testing.assert_close(plain(images), after, atol=1e-5, rtol=1e-5)
    own = plain.state_dict()
    assert merged(plain, own).keys() == own.keys()


@pytest.mark.parametrize("norms", [True, False])
def test_only_adapters_and_the_head_get_gradients_whatever_is_unfrozen(norms: bool) -> None:
    model = adapted("timm/test_convnext")
    groups = parameter_groups(model)
    assert len(groups) == 4
    assert all(".lora_" in key for key, _ in groups[2])
    assert not any(".lora_" in key for group in (*groups[:2], groups[3]) for key, _ in group)
    for n, kinds in ((0, {"adapters", "head"}), (1, {"adapters", "head"}), (-2, {"adapters", "head"}), (-1, {"head"})):
        freeze_to(model, n, norms=norms)
        assert trained(model) == kinds
    unfreeze(model)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == {
        key for key, p in model.named_parameters() if ".lora_" in key or key.startswith("head.")
    }


class Mixed(nn.Module):
    """A norm over batches beside a linear layer that is called, and one of which the weight alone is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        value = self.called(self.first(images).mean((2, 3)))
        return nn.functional.linear(value, self.read.weight, self.read.bias)


@pytest.fixture
def mixed() -> Iterator[Classifier]:
    sys.modules["mixed"] = sys.modules[__name__]
    yield create("python:mixed:Mixed", 4, seed=0)
    del sys.modules["mixed"]


def test_a_layer_of_which_the_weight_alone_is_read_has_none_and_no_norm_trains(mixed: Classifier) -> None:
    model = add_lora(mixed, rank=2)
    assert {key.split(".")[1] for key, _ in parameter_groups(model)[-2]} == {"called"}
    freeze_to(model, 0)
    assert trained(model) == {"adapters", "head"}
    with pytest.raises(ModelError, match=r"lora target 'read' ends the name of no linear layer in python:mixed:Mixed"):
        check("python:mixed:Mixed", targets=["read"], size_px=32)


def test_frozen_norms_are_folded_beneath_adapters(mixed: Classifier) -> None:
    model = add_lora(mixed, rank=2).eval()
    freeze_to(model, 0, norms=False)
    twin, images = folded(model, 0), torch.randn(4, 3, 20, 20)
    assert isinstance(twin.get_submodule("body.first.1"), nn.Identity)
    torch.testing.assert_close(twin.eval()(images), model(images), atol=1e-5, rtol=1e-5)
    model.load_state_dict({k: v + 0.1 if ".lora_" in k else v for k, v in model.state_dict().items()})
    torch.testing.assert_close(twin(images), model(images), atol=1e-5, rtol=1e-5)  # the adapters are the model's own


def test_with_gradient_checkpointing_the_gradients_are_the_same() -> None:
    images = torch.randn(2, 3, 160, 160)
    found = []
    for checkpointing in (False, True):
        model = add_lora(
            create("timm/test_vit", 4, weights="none", seed=0, checkpointing=checkpointing), rank=2, seed=1
        )
        model.eval()(images).square().mean().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    torch.testing.assert_close(found[0], found[1])


def test_the_targets_are_ends_of_names_and_a_seed_settles_all() -> None:
    model, again = adapted("timm/test_vit", targets=["attn.qkv", "fc1"]), adapted("timm/test_vit")
    there = {key.partition(".base_layer")[0].split(".", 3)[3] for key in model.state_dict() if ".base_layer." in key}
    assert there == {"attn.qkv", "mlp.fc1"}
    state = torch.random.get_rng_state()
    other = adapted("timm/test_vit").state_dict()
    assert all(torch.equal(value, other[key]) for key, value in again.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_where_there_is_nothing_to_adapt_a_sentence_says_so(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match=r"resnet18 has no linear layers that an adapter could stand beside"):
        check("resnet18")
    with pytest.raises(ModelError, match=r"lora target 'query' ends the name of no .* give some of fc1, fc2, proj"):
        check("timm/test_vit", targets=["qkv", "query"])
    with pytest.raises(ModelError, match=r"rank=0, alpha=None: nothing would be learned"):
        add_lora(create("timm/test_vit", 4, weights="none"), rank=0)
    model = adapted("timm/test_convnext")
    with pytest.raises(ModelError, match="has LoRA's adapters already"):
        add_lora(model, rank=2)
    torch.save(model.state_dict(), tmp_path / "unmerged.pt")
    with pytest.raises(WeightsError, match=r"run with LoRA that has not finished: its adapters are not merged"):
        create("timm/test_convnext", 4, weights=tmp_path / "unmerged.pt")


def test_without_peft_a_sentence_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r'peft, which is not installed: .*pip install "thawline\[lora\]"'):
        check("timm/test_vit")


def test_nobody_waits_for_peft_who_has_not_asked_for_it() -> None:
    code = "import sys, thawline.models.lora, thawline.cluster.run.run; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
