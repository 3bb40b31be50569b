"""Is a bundle read as it was written, in the format that others write, and refused where it is not whole?"""

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from thawline import models
from thawline.models import bundle
from thawline.models.bundle import DESCRIPTION, WEIGHTS, Description
from thawline.models.weights import tensors

ABOUT = Description(
    model="tiny",
    options={"dropout": 0.2},
    outputs=3,
    task="single_label",
    classes=("ape", "bee", "cät"),
    image={"size_px": 32, "presize": "pad", "mean": (0.5, 0.5, 0.5)},
    engine="dali",
    precision="fp32",
    step=7,
    metrics={"error_rate": 0.25, "roc_auc": None},
)

# What the package safetensors 0.8.0 writes of PLAIN, with {"format": "pt"} as its metadata.
THEIRS = base64.b64decode(
    "AAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJwdCJ9LCJuIjp7ImR0eXBlIjoiSTY0Iiwic2hhcGUiOltdLCJkYXRhX29mZnNldHMi"
    "OlswLDhdfSwidyI6eyJkdHlwZSI6IkYzMiIsInNoYXBlIjpbMiwzXSwiZGF0YV9vZmZzZXRzIjpbOCwzMl19LCJoIjp7ImR0eXBlIjoiRjE2Iiwi"
    "c2hhcGUiOlsyXSwiZGF0YV9vZmZzZXRzIjpbMzIsMzZdfSwibSI6eyJkdHlwZSI6IkJPT0wiLCJzaGFwZSI6WzNdLCJkYXRhX29mZnNldHMiOlsz"
    "NiwzOV19fSAgICAgBwAAAAAAAAAAAAAAAACAPgAAAD8AAEA/AACAPwAAoD8APgDAAQAB"
)
PLAIN = {
    "w": torch.arange(6).float().reshape(2, 3) / 4,
    "n": torch.tensor(7),
    "h": torch.tensor([1.5, -2]).half(),
    "m": torch.tensor([True, False, True]),
}


def test_tensors_are_written_byte_for_byte_as_safetensors_writes_them_and_read_back() -> None:
    assert tensors.to_bytes(PLAIN, about={"format": "pt"}) == THEIRS
    read = tensors.from_bytes(THEIRS, where="x")
    assert read.keys() == PLAIN.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in PLAIN.items())


def test_tensors_of_any_layout_come_back() -> None:
    odd = {
        "bf16": torch.randn(3, 5).bfloat16().t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "none": torch.empty(0, 4),
    }
    read = tensors.from_bytes(tensors.to_bytes(odd), where="x")
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in odd.items())


def with_header(change: Callable[[dict[str, dict[str, object]]], object], beyond: bytes = b"") -> bytes:
    """THEIRS under a changed header."""
    length = int.from_bytes(THEIRS[:8], "little")
    header = json.loads(THEIRS[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + THEIRS[8 + length :] + beyond


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"short", THEIRS[:-1], THEIRS[:100], b"\xff" * 16, (2**40).to_bytes(8, "little") + b"{}"),
        *(b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{", THEIRS + b"\0"),
        with_header(lambda header: header["w"].update(data_offsets=[0, 24])),  # over another
        with_header(lambda header: header["w"].update(data_offsets=[32, 8])),
        with_header(lambda header: header["w"].update(data_offsets=[-16, 8])),
        with_header(lambda header: header["w"].update(shape=[2, -3])),
        with_header(lambda header: header["w"].update(shape=[2**40, 2**40])),
        with_header(lambda header: header["w"].update(dtype="F8")),
        with_header(lambda header: header.pop("w")),  # a hole
        with_header(lambda header: header.update(w={"dtype": "F32"})),
    ],
)
def test_what_is_no_whole_safetensors_file_is_refused(data: bytes) -> None:
    with pytest.raises(models.WeightsError, match=r"^x is not a whole \.safetensors file \(.*\): no weights are read"):
        tensors.from_bytes(data, where="x")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A run's folder with a bundle of ABOUT in it."""
    for name, data in bundle.packed(models.create("tiny", 3, seed=1).state_dict(), ABOUT).items():
        (tmp_path / "run/model").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run/model" / name).write_bytes(data)
    return tmp_path / "run"


@pytest.mark.parametrize("given", ["", "model"])
def test_a_bundle_gives_back_its_model_and_what_was_said_of_it(written: Path, given: str) -> None:
    model, about = models.load(written / given)
    assert about == ABOUT
    assert not model.training
    own = models.create("tiny", 3, seed=1).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert model.get_submodule("head.7").p == 0.2  # its dropout, should it be trained on


def test_weights_stay_in_the_precision_that_they_were_kept_in() -> None:
    state = models.create("tiny", 3, seed=1).bfloat16().state_dict()
    model, _ = bundle.unpacked(bundle.packed(state, replace(ABOUT, precision="pure_bf16")), where="s3://b/run")
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16, torch.int64}


def rewrite(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **values}))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (shutil.rmtree, r"run holds no bundle \(model\.json is missing\): its run has not finished"),
    "no description": (
        lambda model: (model / DESCRIPTION).unlink(),
        r"model holds no bundle \(model\.json is missing\)",
    ),
    "no weights": (
        lambda model: (model / WEIGHTS).unlink(),
        r"model\.safetensors is missing: the bundle was copied in",
    ),
    "half the weights": (
        lambda model: (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:9999]),
        r"has 9,999 bytes, and the bundle was written with 41\d,\d{3}: it was copied in part",
    ),
    "a changed bit": (lambda model: flip(model / WEIGHTS), r"changed since it was written \(its checksum is another\)"),
    "a pickle": (
        lambda model: torch.save({"w": torch.ones(2)}, model / WEIGHTS),
        r"model\.safetensors is a pickle or a file of torch\.save, which may hold code and is never read",
    ),
    "an old pickle": (
        lambda model: torch.save({"w": torch.ones(2)}, model / WEIGHTS, _use_new_zipfile_serialization=False),
        r"is a pickle or a file of torch\.save",
    ),
    "another version": (
        lambda model: rewrite(model / DESCRIPTION, version=2, thawline="9.1"),
        r"is a bundle of version 2, and thawline .* reads 1: .*install thawline 9\.1",
    ),
    "half a description": (
        lambda model: (model / DESCRIPTION).write_bytes((model / DESCRIPTION).read_bytes()[:99]),
        r"model\.json is not a bundle's description \(JSONDecodeError",
    ),
    "another JSON": (lambda model: (model / DESCRIPTION).write_text("[]"), r"is not a bundle's description"),
    "classes gone": (lambda model: rewrite(model / DESCRIPTION, classes=None), r"is not a bundle's description"),
    "an unknown option": (lambda model: rewrite(model / DESCRIPTION, options={"x": 1}), r"unknown options x"),
    "an unknown model": (
        lambda model: rewrite(model / DESCRIPTION, model="resnet19"),
        r"its model cannot be made here \('resnet19' is neither",
    ),
    "another model": (
        lambda model: rewrite(model / DESCRIPTION, model="resnet18"),
        r"does not fit resnet18 \(body\.conv1\.weight is ",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_no_whole_bundle_gets_a_sentence(written: Path, how: str) -> None:
    spoil, said = SPOILT[how]
    spoil(written / "model")
    with pytest.raises(models.BundleError, match=said) as error:
        models.load(written)
    assert "\n" not in str(error.value)


def test_a_uri_is_no_folder_of_this_machine() -> None:
    with pytest.raises(models.BundleError, match=r"^s3://b/run is a URI, and .*: copy its model/ here"):
        models.load("s3://b/run")
