"""What is `thawline export`? A finished run's model is made into a file or folder, compared, and then written.

Nothing is written that does not say what the model says. One file beside this one makes each format.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from thawline.cluster.errors import ExportError
from thawline.cluster.serve.export import onnx_file
from thawline.cluster.serve.export.comparing import difference
from thawline.cluster.serve.export.examples import Examples, examples
from thawline.cluster.serve.export.made import Made, Wish
from thawline.cluster.serve.export.network import Answers
from thawline.dataio.store import files
from thawline.dataio.store.atomic import atomic_write
from thawline.dataio.store.root import Root
from thawline.models import bundle

FormatName = Literal["onnx"]
FORMATS: Mapping[FormatName, Callable[[Wish], Made]] = {"onnx": onnx_file.make}
_AT_ONCE = 8
"""Images that go through a model at once: a U-Net takes a GB for so many."""


def export(
    source: str | Path,
    to: FormatName,
    dest: str | Path,
    *,
    overwrite: bool = False,
    trust_code: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> str:
    """Export a finished run, or its bundle, into the folder or URI `dest`. Returns the file that makes it whole.

    overwrite: files of the same names may be there. trust_code: see models.load. tell: is given a line on what was
    made, and one on what it was compared with.
    Raises: ExportError where it cannot be made, says something else, or cannot be written; BundleError.
    """
    home = Root.of(dest)
    _check_free(home, source, overwrite=overwrite)
    loaded = bundle.load(source, trust_code=trust_code)
    loaded.model.float()
    wish = Wish(loaded)
    made = FORMATS[to](wish)
    tell(made.words)
    tell(_compared(wish, made, examples(source)))
    _write(home, made)
    return home.full([*made.files][-1])


def _compared(wish: Wish, made: Made, given: Examples) -> str:
    """What the comparison came to. Raises ExportError where the two differ."""
    network = Answers(wish.bundle.model, wish.bundle.about.task).eval()
    images = given.seen(wish.spec, wish.bundle.about.engine)
    parts = [images[:1], *torch.split(images[1:], _AT_ONCE)]  # one alone, and several
    with torch.no_grad():
        expected, said = (_joined([ask(part) for part in parts]) for ask in (network, made.answers))
    found = difference(expected, said)
    if found.why:
        raise ExportError(
            f"the export does not say what the model says ({given.words}: {found.why}): nothing was written; tell us, "
            "or export its weights, --to safetensors"
        )
    return f"compared with the model on {given.words}: the largest difference is {found.largest:.1g}"


def _joined(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat([*parts]) for parts in zip(*outputs, strict=True)]


def _check_free(home: Root, source: str | Path, *, overwrite: bool) -> None:
    """Raises ExportError for a place that cannot be written, or holds something that may not be written over."""
    if home.text in (Root.of(source).text, Root.of(source).child(bundle.FOLDER).text):
        raise ExportError(f"{home} is what is exported: its own files would be replaced; give another folder")
    try:
        there = home.listing()
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
