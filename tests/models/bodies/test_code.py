"""Is a user's own network a body like any other, and is what is none told? And is a stranger's code left alone?"""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thawline
from tests.kit.own_code import forget, write_nets
from tests.models.test_bundle import ABOUT
from thawline import models
from thawline.models import bundle, code
from thawline.models.bodies.libraries import body_of, sketch
from thawline.models.classifier import check
from thawline.models.errors import BundleError, CodeError
from thawline.models.groups import freeze, parameter_groups

OWN = "python:nets:body"


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nets.py, where it can be imported from."""
    forget(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    return write_nets(tmp_path)


def test_it_is_the_users_network_under_a_head_the_same_for_a_seed() -> None:
    model = models.create(OWN, 4, seed=1).eval()
    assert next(model.body.parameters()).shape == (8, 3, 3, 3)
    images = torch.randn(2, 3, 50, 40)
    plain = nn.Sequential(*model.body.children())  # as its author wrote it
    assert torch.equal(model(images), model.head(plain(images)))
    again = models.create(OWN, 4, seed=1)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.origin == "weights as it was made with"


def test_what_it_is_is_found_by_looking() -> None:
    body = body_of(OWN, size_px=64)
    assert (body.features, body.pooled, [(s.channels, s.stride) for s in body.stages]) == (
        24,
        False,
        [(8, 2), (16, 4), (24, 8)],
    )
    assert [len(body.groups(how)) for how in ("three", "stages", "blocks")] == [2, 3, 3]
    vectors = body_of("python:nets:Vectors")
    assert (vectors.features, vectors.pooled, vectors.stages) == (8, True, ())
    assert len(vectors.groups("blocks")) == 5
    assert check("python:nets:Vectors", groups="blocks", sizes_px=[32, 64]) == 6
    assert body_of("python:nets:Vectors", in_channels=5).module.first.in_channels == 5  # type: ignore[union-attr]
    assert models.create(OWN, 4, in_channels=1).body[0].in_channels == 1  # type: ignore[index]
    sized = models.create("python:nets:Sized", 4, size_px=24)
    assert sized.options["size_px"] == 24
    with pytest.raises(models.ModelError, match=r"Sized cannot see images of 32 px"):
        check("python:nets:Sized", sizes_px=[32, 24])


def test_a_unet_stands_on_it() -> None:
    model = models.create(OWN, 3, task="mask", seed=0).eval()
    model(torch.randn(2, 3, 70, 45)).square().mean().backward()
    assert model(torch.randn(2, 3, 70, 45)).shape == (2, 3, 70, 45)
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    with pytest.raises(models.ModelError, match=r"python:nets:Vectors has feature maps of one size alone"):
        models.create("python:nets:Vectors", 3, task="mask")


def test_its_author_may_say_what_it_is() -> None:
    assert models.normalisation("python:nets:described") == ((0.5,) * 3, (0.5,) * 3)
    assert models.normalisation(OWN) == models.normalisation("resnet18")
    model = models.create("python:nets:described", 4, groups="stages")
    of_body = [{key.rpartition(".")[0] for key, _ in group} for group in parameter_groups(model)[:-1]]
    assert of_body == [{"body.0", "body.1"}, {"body.3"}, {"body.5"}]
    freeze(model)
    assert not model.get_parameter("body.3.weight").requires_grad


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nets", r"'python:nets' does not say what to import: give python:MODULE:NAME"),
        ("nets:a b", r"does not say what to import"),
        ("nett:body", r"there is no module 'nett', neither in the working folder nor among what is installed"),
        ("nets.deep:body", r"there is no module 'nets.deep'"),
        ("nets:boddy", r"nets has no 'boddy': .* did you mean 'body'\?"),
        ("lacks:body", r"importing lacks raised ModuleNotFoundError: No module named 'not_there'"),
        ("broken:body", r"importing broken raised ZeroDivisionError: division by zero"),
        ("leaves:body", r"importing leaves raised SystemExit: 3"),
        ("nets:number", r"returned int, which is no torch\.nn\.Module"),
        ("nets:fails", r"nets:fails raised OSError: no such weights"),
        ("nets:made", r"is a Sequential and no function: each call must make a new one"),
        ("nets:several", r"Two gives a tuple for images \(2, 3, 224, 224\)"),
        ("nets:Last", r"Last gives a tensor \(2, 56, 56, 3\) .* the channels first"),
        ("nets:two_groups_short", r"groups hold 3\.weight 0 times"),
    ],
)
def test_what_is_no_body_gets_a_sentence(name: str, told: str, nets: Path) -> None:
    (nets.parent / "lacks.py").write_text("import not_there")
    (nets.parent / "broken.py").write_text("1 / 0")
    (nets.parent / "leaves.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(CodeError, match=told) as error:
        models.create(f"python:{name}", 4)
    assert "\n" not in str(error.value)


def test_where_it_lies_is_known_without_importing_it(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nets.parent / "deep/inner").mkdir(parents=True)
    assert code.place(OWN) == nets
    assert code.place("python:deep.inner.more:x") == nets.parent / "deep"
    assert [*code.notices([OWN, "python:nett:x"])] == [
        f"importing {OWN} from {nets}",
        "importing python:nett:x from a place that is not known",
    ]
    assert "nets" not in sys.modules
    sketch(OWN)
    assert capsys.readouterr() == ("", "nets was imported\n")  # stdout is for data


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A bundle of it, and the weights in there."""
    state = models.create(OWN, 3, seed=1).state_dict()
    about = replace(ABOUT, model=OWN, options={}, code=code.fingerprints([OWN]))
    folder = tmp_path / "run/model"
    folder.mkdir(parents=True)
    for name, data in bundle.packed(state, about).items():
        (folder / name).write_bytes(data)
    del sys.modules["nets"]
    return folder.parent, state


def test_a_bundles_code_is_not_imported_unless_it_is_trusted_and_then_it_is_told(
    written: tuple[Path, dict[str, Any]], nets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, state = written
    with pytest.raises(
        BundleError, match=r"its model is made by code, python:nets:body, which is not imported unasked"
    ):
        models.load(run)
    assert "nets" not in sys.modules
    with caplog.at_level(logging.WARNING):
        model, about = models.load(run, trust_code=True)
    assert [record.getMessage().partition(", which")[0] for record in caplog.records] == [
        f"importing {OWN} from {nets}"
    ]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert about.code.keys() == {OWN}

    nets.write_text(nets.read_text() + "# changed")
    models.load(run, trust_code=True)
    assert "is not as it was when" in caplog.records[-1].getMessage()


def test_weights_of_its_run_come_without_its_code(written: tuple[Path, dict[str, Any]]) -> None:
    run, state = written
    with pytest.raises(models.WeightsError, match="another architecture"):
        models.create("tiny", 3, weights=run)
    assert "nets" not in sys.modules
    model = models.create(OWN, 3, weights=run, class_names=ABOUT.classes)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_it_is_public() -> None:
    assert thawline.as_body(nn.Conv2d(3, 5, 3)).features == 5
