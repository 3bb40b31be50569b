"""What does a finished run leave to whoever uses its model? The bundle: model.safetensors and model.json.

The weights that validation measured, and a description that is enough to go from an image to an answer as validation
did. Folders of this machine are read here; where a run lies elsewhere, `unpacked` takes the bytes of the two files.
Predicting is not this file's matter: the pixels are dataio.render's, what outputs mean is the task's.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import thawline
from thawline.models import code
from thawline.models.classifier import Classifier, create
from thawline.models.errors import BundleError, ModelError
from thawline.models.weights import saved, tensors
from thawline.models.weights.loading import differences

FOLDER = saved.BUNDLE
"""The bundle's, in a run's folder."""
DESCRIPTION, WEIGHTS = saved.DESCRIPTION, saved.BUNDLED
VERSION = 1
_FORMAT = "thawline bundle"
log = logging.getLogger(__name__)
_OPTIONS = ("decoder", "dropout", "groups", "in_channels", "label_mean", "label_std", "size_px", "y_range")
"""Of `create`, that a description of this version may give."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What model.json says of the model beside it."""

    model: str
    """The architecture, as `create` takes it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `create`."""
    outputs: int
    """How many numbers the head puts out."""
    task: str
    classes: tuple[str, ...]
    """What the outputs mean, in order: class names, or a mask's, or the points'."""
    values: tuple[int, ...] = ()
    """A mask's pixel value for each class."""
    image: Mapping[str, Any]
    """dataio.ImageSpec's fields, such that its `size_px` and its geometry are those of the last validation."""
    engine: str
    """Who decoded and warped in it: dali or reference."""
    precision: str
    """What it was computed in: fp32, bf16, ..."""
    step: int
    """Training steps behind the weights."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """What it measured; None where that is no number."""
    pillow: Mapping[str, float] = field(default_factory=dict)
    """How far what is said differs where Pillow decodes in place of DALI: `images`, up to 200 of the validation's, the
    `largest` and `mean` difference of probabilities, the `agreement` of predictions; empty where DALI did not validate.
    """
    code: Mapping[str, str] = field(default_factory=dict)
    """What of a user's own is imported to make it, by its python: name, and the SHA-256 of its file, "" without one."""
    thawline: str = thawline.__version__
    """The version that wrote it."""


class Bundle(NamedTuple):
    """A model in evaluation mode, on the CPU, and what it is."""

    model: Classifier
    about: Description


def packed(weights: Mapping[str, Tensor], about: Description) -> dict[str, bytes]:
    """The bundle's files by name, in the order to write them in: whoever finds the description finds all."""
    data = tensors.to_bytes(weights, about={"format": "pt"})
    there = {"file": WEIGHTS, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    written = {"format": _FORMAT, "version": VERSION, **asdict(about), "weights": there}
    return {WEIGHTS: data, DESCRIPTION: (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode()}


def load(where: str | Path, *, trust_code: bool = False) -> Bundle:
    """The model of a run's folder, or of a bundle's own, as its last validation measured it.

    trust_code: a model of the user's own may be made, by importing the code that the bundle names; it is told, as a
    warning of this module's logger.

    Raises: BundleError, when there is none, or it is incomplete, changed, of another version, holds pickled code, or
        names code that is not trusted; UnknownModelError, CodeError.
    """
    if "://" in str(where):
        raise BundleError(
            f"{where} is a URI, and bundles are read from local folders: copy its {FOLDER}/ here, and load that"
        )
    folder = Path(where).expanduser()
    if not (folder / DESCRIPTION).exists() and (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    weights = folder / WEIGHTS
    try:
        if not (folder / DESCRIPTION).is_file():
            raise BundleError(
                f"{folder} holds no bundle ({DESCRIPTION} is missing): its run has not finished, or an older thawline "
                "made it; give the folder of a finished run"
            )
        about, proof = _described((folder / DESCRIPTION).read_bytes(), where=folder / DESCRIPTION)
        if not weights.is_file():
            raise BundleError(f"{weights} is missing: the bundle was copied in part; copy the whole folder")
        with weights.open("rb") as file:
            _check(file.read(8), weights.stat().st_size, proof, where=weights)
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise BundleError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
    return _bundle(about, proof, data, where=weights, trust_code=trust_code)


def unpacked(files: Mapping[str, bytes], *, where: str, trust_code: bool = False) -> Bundle:
    """`load`, of the two files' bytes by name. where: what the bundle is called in errors. Raises as `load` does."""
    about, proof = _described(files[DESCRIPTION], where=f"{where}/{DESCRIPTION}")
    _check(files[WEIGHTS][:8], len(files[WEIGHTS]), proof, where=f"{where}/{WEIGHTS}")
    return _bundle(about, proof, files[WEIGHTS], where=f"{where}/{WEIGHTS}", trust_code=trust_code)


class _Proof(NamedTuple):
    """What the weights' file must be."""

    bytes: int
    sha256: str


def _described(text: bytes, *, where: str | Path) -> tuple[Description, _Proof]:
    """What a model.json says. Raises BundleError."""
    try:
        written = json.loads(text)
        if written["format"] != _FORMAT:
            raise ValueError(f"format {written['format']!r}")
        if written["version"] != VERSION:
            theirs, writer = str(written["version"])[:20], str(written.get("thawline"))[:20]
            raise BundleError(
                f"{where} is a bundle of version {theirs}, and thawline {thawline.__version__} reads {VERSION}: its "
                f"model might be another; install thawline {writer}, which wrote it"
            )
        proof = _Proof(int(written["weights"]["bytes"]), str(written["weights"]["sha256"]))
        written = {"code": {}, "pillow": {}, **written}  # which older ones lack
        known = {each.name: written[each.name] for each in fields(Description)}
        if strange := set(known["options"]) - set(_OPTIONS):
            raise ValueError(f"unknown options {', '.join(sorted(strange))[:80]}")
        lists = {"classes": tuple(map(str, known["classes"])), "values": tuple(map(int, known["values"]))}
        image = {name: tuple(v) if isinstance(v, list) else v for name, v in known["image"].items()}
        sums = {str(name): str(value) for name, value in known["code"].items()}
        moved = {str(name): float(value) for name, value in known["pillow"].items()}
        plain = {"outputs": int(known["outputs"]), "image": image, "code": sums, "pillow": moved}
        about = Description(**{**known, **lists, **plain})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{where} is not a bundle's description ({type(error).__name__}: {str(error)[:80]}): what its model is "
            "cannot be known; copy the bundle again"
        ) from error
    return about, proof


def _check(first: bytes, size: int, proof: _Proof, *, where: str | Path) -> None:
    """Raises BundleError for a file that cannot be the weights, before all of it is read."""
    # a .safetensors file begins with a length below 2^32 in eight bytes
    if first.startswith(b"PK\x03\x04") or (first.startswith(b"\x80") and any(first[4:])):
        raise BundleError(
            f"{where} is a pickle or a file of torch.save, which may hold code and is never read: a bundle's weights "
            "are a .safetensors file; copy the bundle again"
        )
    if size != proof.bytes:
        raise BundleError(
            f"{where} has {size:,} bytes, and the bundle was written with {proof.bytes:,}: it was copied in part, or "
            "replaced; copy the whole bundle again"
        )


def _check_code(about: Description, *, where: str | Path, trusted: bool) -> None:
    """Tell what will be imported. Raises BundleError where that is not trusted."""
    if not code.is_code(about.model):
        return
    if not trusted:
        raise BundleError(
            f"{where}: its model is made by code, {about.model}, which is not imported unasked: it may be a "
            "stranger's: read that code, then give --trust-code, or models.load(..., trust_code=True)"
        )
    for line in code.notices([about.model]):
        log.warning("%s, which makes the model of %s", line, where)
    if code.fingerprints([about.model]) != {about.model: about.code.get(about.model, "")}:
        log.warning("%s is not as it was when %s was written: its answers may be others", about.model, where)


def _bundle(about: Description, proof: _Proof, data: bytes, *, where: str | Path, trust_code: bool) -> Bundle:
    _check_code(about, where=where, trusted=trust_code)
    if hashlib.sha256(data).hexdigest() != proof.sha256:
        raise BundleError(
            f"{where} changed since it was written (its checksum is another): its answers would be wrong; copy the "
            "bundle again"
        )
    # clones: else each would keep the whole file in memory, and a name that is not the model's would go unseen
    state = {name: tensor.clone() for name, tensor in tensors.from_bytes(data, where=str(where)).items()}
    try:
        model = create(about.model, about.outputs, task=about.task, weights="none", seed=0, **about.options)
    except (ModelError, TypeError) as error:
        raise BundleError(
            f"{where}: its model cannot be made here ({error}); install thawline {about.thawline}"
        ) from error
    if wrong := differences(model, state):
        raise BundleError(f"{where} does not fit {about.model} ({wrong[0]}): copy the bundle again")
    model.load_state_dict(state, assign=True)  # in the precision that they were kept in
    model.origin, model.pretrained = f"{where}", True
    return Bundle(model.eval(), about)
