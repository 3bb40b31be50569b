"""How is a manifest made? What the command line and `make_manifest` take; imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

_Column = Annotated[str | None, arg(metavar="COLUMN")]
_Text = Annotated[str | None, arg(metavar="TEXT")]
_Names = Annotated[tuple[str, ...], arg(metavar="NAME...")]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a folder or a list becomes a manifest. Docstrings are the help: two lines at most, which tyro joins."""

    label: Annotated[str, arg(metavar="RULE")] = "parent"
    """Where labels come from: parent (the folder's name), regex:R (first group, in the file's name), path-regex:R,
    column:C, number:C,... (columns of numbers), mask:TEMPLATE (masks/{stem}.png; {parent}, {name}), mask-column:C,
    points:X0,Y0,... or points-column:C."""
    delimiter: _Text = None
    """Split a column's value at this into several labels (multi-label)."""
    classes: Annotated[str | None, arg(metavar="A,B,...|FILE")] = None
    """Classes: a,b,c, a .txt file with one on each line, or another manifest with the same classes; if not given, the
    labels that occur, sorted."""
    values: Annotated[str | None, arg(metavar="N,N,...")] = None
    """Pixel values of a mask's classes, such as 0,255; if not given, those that occur."""
    swap: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="A,B|none")] = ()
    """Two points that swap names in a mirror image, such as left_eye,right_eye; none if there are no such points. If
    not given, images with points are not mirrored."""
    valid: Annotated[str, arg(metavar="RULE")] = "0.2"
    """Images for validation: a fraction drawn at random, stratified:F, fold:I/K (0/5 to 4/5),
    stratified-fold:I/K, column:C (true or valid, test), or folder:N (in a folder of that name)."""
    test: Annotated[str | None, arg(metavar="RULE")] = None
    """Images for the test: all, or as --valid, without folds. Fractions are of all images; but where one of the two is
    not a fraction, the test is picked first and --valid divides the rest."""
    root: Annotated[str | Path | None, arg(metavar="DIR")] = None
    """Folder in which the paths of a list start; if not given, the list's own folder."""
    path_column: _Column = None
    """Column of the paths; if not given, the first."""
    folder: Annotated[str, arg(metavar="TEXT")] = ""
    """Text to put before every path in a list."""
    suffix: Annotated[str, arg(metavar="TEXT")] = ""
    """Text to put after every path in a list, such as .jpg."""
    column_names: _Names = ()
    """Names of the columns, for a CSV whose first line does not give them."""
    folders: _Names = ()
    """Folders of SOURCE to use; if not given, all."""
    extensions: _Names = ()
    """Endings of the files to use, such as png; if not given, those of pictures."""
    recursive: bool = True
    """Search subfolders, too."""
    max_bad: float = 0.01
    """Share of the files that may be unusable; 1 allows any."""
    separator: _Text = None
    """Separator of the columns of a CSV, such as ';' or tab; if not given, it is detected."""
    skip_unlabelled: bool = False
    """Leave out the images that have no label, and report how many."""
    max_pixels: int = 120_000_000
    """Most pixels of an image or mask; larger ones are unusable and not decoded. 120 megapixels take 360 MB of memory;
    Pillow refuses more than 178,956,970."""


@dataclass(frozen=True, kw_only=True)
class IndexOptions(SourceOptions):
    """What `thawline index` takes; where a job is made at once, its own seed is another thing."""

    seed: int = 42
    """Seed of random splits."""
