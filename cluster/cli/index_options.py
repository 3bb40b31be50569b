"""How is a manifest made? What the command line and `make_manifest` take; imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

_Column = Annotated[str | None, arg(metavar="COLUMN")]
_Text = Annotated[str | None, arg(metavar="TEXT")]
_Names = Annotated[tuple[str, ...], arg(metavar="NAME...")]


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How a folder or a list becomes a manifest. Docstrings are the help: two lines at most, which tyro joins."""

    label: Annotated[str, arg(metavar="RULE")] = "parent"
    """Where labels come from: parent (the folder's name), regex:R (first group, on the file's name), path-regex:R,
    column:C, number:C,... (columns of numbers), mask:TEMPLATE (masks/{stem}.png; {parent}, {name}), mask-column:C,
    points:X0,Y0,... or points-column:C."""
    delimiter: _Text = None
    """Split a column's value at this into several labels (multi-label)."""
    classes: Annotated[str | None, arg(metavar="A,B,...|FILE")] = None
    """The classes: a,b,c, or a .txt file with one a line, or another manifest whose classes to take; if not given, the
    labels that occur, sorted."""
    values: Annotated[str | None, arg(metavar="N,N,...")] = None
    """Pixel values of a mask's classes, such as 0,255; if not given, those that occur."""
    swap: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="A,B|none")] = ()
    """Two points that change places in a mirror image, such as left_eye,right_eye; none where no point has a side. If
    not given, images with points are not mirrored."""
    valid: Annotated[str, arg(metavar="RULE")] = "0.2"
    """Which images are for validation: a fraction drawn at random, stratified:F, fold:I/K (0/5 to 4/5),
    stratified-fold:I/K, column:C (true or valid, test), or folder:N (in a folder of that name)."""
    test: Annotated[str | None, arg(metavar="RULE")] = None
    """Which are for the test: all, or as --valid but no folds. Fractions are of all images, but where one of the two is
    no fraction, the test is picked first and --valid divides the rest."""
    seed: int = 42
    """Seed of what is drawn at random."""
    root: Annotated[str | Path | None, arg(metavar="DIR")] = None
    """Where the paths in a list start; if not given, in the list's own folder."""
    path_column: _Column = None
    """The column that holds the paths; if not given, the first."""
    folder: Annotated[str, arg(metavar="TEXT")] = ""
    """Put this before every path in a list."""
    suffix: Annotated[str, arg(metavar="TEXT")] = ""
    """Put this after every path in a list, such as .jpg."""
    column_names: _Names = ()
    """Names of the columns, for a CSV whose first line does not give them."""
    folders: _Names = ()
    """Look only into these folders of SOURCE."""
    extensions: _Names = ()
    """Take files with these endings, such as png."""
    recursive: bool = True
    """Look into folders of folders, too."""
    max_bad: float = 0.01
    """Share of the files that may be unusable; 1 allows any."""
    separator: _Text = None
    """What separates the columns of a CSV, such as ';' or tab; if not given, it is found."""
    skip_unlabelled: bool = False
    """Leave out, and count, the images that --label finds no label for."""
    max_pixels: int = 120_000_000
    """Images and masks with more pixels are unusable and not decoded: 120 megapixels take 360 MB of memory each. At
    most 178,956,970, from where Pillow refuses."""
