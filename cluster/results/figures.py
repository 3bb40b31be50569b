"""Into which file does a picture go? One that is checked before the work; written without matplotlib's warnings."""

import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

from thawline.cluster.errors import JobError
from thawline.cluster.words import quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
"""Formats that matplotlib can write and people use."""


def check_out(given: str) -> Path:
    """The file that `--out` names, .png where it has no ending; its folder is made.

    Raises JobError for a file that cannot be written, or whose ending is none of a picture: before the work, not after
    it.
    """
    out = Path(given) if Path(given).suffix else Path(f"{given}.png")
    if out.suffix.lower() not in ENDINGS:
        raise JobError(
            f"--out {quoted(given)} ends in {out.suffix}, which is not a kind of picture: nothing could be drawn; give "
            f"one of {', '.join(ENDINGS)}"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        existed = out.exists()
        with out.open("ab"):
            pass
        if not existed:
            out.unlink()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise JobError(
            f"--out {quoted(given)} cannot be written ({why}): the picture would be lost; give another file"
        ) from error
    return out


def write(figure: "Figure", to: Path | IO[bytes], kind: str | None = None) -> None:
    """Write a figure; a letter of a class's name that the font lacks is drawn as a box, without a warning.

    kind: such as "png", where `to` has no ending. Raises: OSError.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(to, format=kind, dpi=110)


def save(figure: "Figure", out: Path) -> None:
    """Write a figure. Raises JobError where the file cannot be written any more, see `check_out`."""
    try:
        write(figure, out)
    except OSError as error:
        raise JobError(
            f"{out} cannot be written ({getattr(error, 'strerror', None) or error}): the picture is lost"
        ) from error
