"""Does `thawline models` tell what there is, and what each is?"""

import pytest
import torchvision

from thawline.cluster.cli.models import Models
from thawline.models.errors import ModelError, UnknownModelError


def test_a_few_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert Models(pattern="resnet?8").run() == 0
    own = torchvision.models.get_model_weights("resnet18").DEFAULT.meta["num_params"] - 1000 * 513
    assert capsys.readouterr().out.split() == ["resnet18", f"{own / 1e6:.2f}", "M", "3/6/10", "224"]


def test_many_are_named_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert Models().run() == 0
    names = capsys.readouterr().out.split()
    assert {"tiny", "vit_b_16", "resnet50"} <= {*names}


def test_timms_tell_their_licence_and_whether_their_size_is_fixed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")
    assert Models(pattern="timm/test_vit.*").run() == 0
    assert capsys.readouterr().out.split()[-3:] == ["160", "fixed", "apache-2.0"]


def test_decoders_are_named_by_their_own_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra smp is not installed")
    assert Models(pattern="smp:DeepLab*").run() == 0
    assert capsys.readouterr().out.split() == ["smp:DeepLabV3", "smp:DeepLabV3Plus"]
    with pytest.raises(ModelError, match="smp:UPerNet"):
        Models(pattern="smp:uper").run()


def test_none_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match="resnet34"):
        Models(pattern="resnet43").run()
