"""What is `thawline export`? A finished run's model is made into a file or folder, compared, and then written.

Nothing is written that does not say what the model says. One file beside this one makes each format.
"""

import copy
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from thawline.cluster.errors import ExportError
from thawline.cluster.serve.export import hub_folder, onnx_file, pt2_file, safetensors_file
from thawline.cluster.serve.export.comparing import TOLERANCE, difference
from thawline.cluster.serve.export.examples import Examples, examples
from thawline.cluster.serve.export.made import Made, Wish
from thawline.dataio.store import files
from thawline.dataio.store.atomic import atomic_write
from thawline.dataio.store.root import Root
from thawline.dataio.stream.renderer import choose_engine
from thawline.models import bundle

FormatName = Literal["onnx", "pt2", "safetensors", "hub"]


@dataclass(frozen=True)
class Format:
    """How one kind of export is made."""

    make: Callable[[Wish], Made]
    takes: tuple[str, ...] = ()
    """Which of a wish's options it can have."""


FORMATS: Mapping[FormatName, Format] = {
    "onnx": Format(onnx_file.make, ("with_preprocessing",)),
    "pt2": Format(pt2_file.make, ("with_preprocessing",)),
    "safetensors": Format(safetensors_file.make),
    "hub": Format(hub_folder.make, ("license",)),
}
_AT_ONCE = 8
"""Images that go through a model at once: a U-Net takes a GB for so many."""
_WITH_PIXELS = 5e-3
"""How far apart probabilities may be where the pixels are made by the graph: a share of them."""


def export(
    source: str | Path,
    to: FormatName,
    dest: str | Path,
    *,
    with_preprocessing: bool = False,
    license: str = "",
    overwrite: bool = False,
    trust_code: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> str:
    """Export a finished run, or its bundle, into the folder or URI `dest`. Returns the file that makes it whole.

    with_preprocessing: what is made takes decoded images. license: of the weights, for a model card. overwrite: files
    of the same names may be there. trust_code: see models.load. tell: is given a line on what was made, and one or two
    on what it was compared with.
    Raises: ExportError where it cannot be made, says something else, or cannot be written; BundleError.
    """
    _check_taken(to, with_preprocessing=with_preprocessing, license=license)
    home = Root.of(dest)
    _check_free(home, source, overwrite=overwrite)
    loaded = bundle.load(source, trust_code=trust_code)
    model = copy.deepcopy(loaded.model).float()
    wish = Wish(str(source), loaded, model, with_preprocessing=with_preprocessing, license=license)
    made = FORMATS[to].make(wish)
    tell(made.words)
    for line in _compared(wish, made, examples(source)):
        tell(line)
    _write(home, made)
    return home.full([*made.files][-1])


def _compared(wish: Wish, made: Made, given: Examples) -> Iterator[str]:
    """What the comparison came to, in a line or two. Raises ExportError where the two differ."""
    engine = "reference" if wish.with_preprocessing else wish.bundle.about.engine
    expected = _by_model(wish, given, engine)
    if wish.with_preprocessing:
        # The pixels come from elsewhere, so that what is asked for are not the logits' last digits.
        expected, said = expected[-1:], _joined([made.answers(image) for image in given.pixels()])[-1:]
    else:
        images = given.seen(wish.spec, engine)
        said = _joined([made.answers(part) for part in (images[:1], *torch.split(images[1:], _AT_ONCE)) if len(part)])
    found = difference(expected, said, tolerance=_WITH_PIXELS if wish.with_preprocessing else TOLERANCE)
    if found.why:
        raise ExportError(
            f"the export does not say what the model says ({given.words}: {found.why}): nothing was written; tell us, "
            "or export its weights, --to safetensors"
        )
    yield f"compared with the model on {given.words}: the largest difference is {found.largest:.1g}"
    if wish.with_preprocessing and wish.bundle.about.engine != engine and choose_engine().engine != engine:
        off = difference(_by_model(wish, given, wish.bundle.about.engine)[-1:], said).largest
        yield (
            f"with {wish.bundle.about.engine}, by which the run was validated, it is {off:.1g}: JPEGs are decoded "
            "otherwise, and warped pixels rounded"
        )


def _by_model(wish: Wish, given: Examples, engine: str) -> list[Tensor]:
    """What the model says of the examples' pixels, as this engine makes them."""
    network = wish.answers
    with torch.no_grad():
        return _joined([network(part) for part in torch.split(given.seen(wish.spec, engine), _AT_ONCE)])


def _joined(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat([*parts]) for parts in zip(*outputs, strict=True)]


def _check_taken(to: FormatName, **options: bool | str) -> None:
    """Raises ExportError for an option that another format has."""
    for name, value in options.items():
        if value and name not in FORMATS[to].takes:
            others = " or ".join(other for other, each in FORMATS.items() if name in each.takes)
            raise ExportError(
                f"--{name.replace('_', '-')} with --to {to}: nothing would read it; leave it out (it is for {others})"
            )


def _check_free(home: Root, source: str | Path, *, overwrite: bool) -> None:
    """Raises ExportError for a place that cannot be written, or holds something that may not be written over."""
    if home.text in (Root.of(source).text, Root.of(source).child(bundle.FOLDER).text):
        raise ExportError(f"{home} is what is exported: its own files would be replaced; give another folder")
    try:
        there = home.listing()
        if not home.remote:
            standing = next(place for place in (home.folder, *home.folder.parents) if place.exists())
            if not os.access(standing, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ExportError(
            f"{home} cannot be written ({files.why_refused(error)}): nothing is exported; give another folder"
        ) from error
    if there and not overwrite:
        raise ExportError(
            f"{home} is not empty ({min(there)}): an export would mix with it; give another folder, or --overwrite, "
            "which replaces files of the same names"
        )


def _write(home: Root, made: Made) -> None:
    """All files, the last one last: where it is, they are whole. Raises ExportError."""
    *_, last = made.files
    try:
        if last in home.listing():
            home.remove(last)
        for name, data in made.files.items():
            with atomic_write(home, name) as sink:
                sink.write(data)
    except OSError as error:
        raise ExportError(
            f"{home} cannot take the export ({files.why_refused(error)}): what is there is not whole; make room, or "
            "give another folder"
        ) from error
