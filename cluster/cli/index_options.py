"""How is a manifest made? What the command line and `make_manifest` take; imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import UseAppendAction


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How a folder or a list becomes a manifest."""

    label: str = "parent"
    """parent (the folder's name), regex:R (its first group, on the file's name), path-regex:R (on the path), column:C
    (of the CSV or table), mask:TEMPLATE (such as masks/{stem}.png; {parent} and {name} too) or mask-column:C,
    points:x0,y0,x1,y1 (columns) or points-column:C."""
    delimiter: str | None = None
    """Splits a column's value into several labels (multi-label)."""
    classes: str | None = None
    """The vocabulary: a,b,c, a .txt file with a class a line, or another manifest, whose classes these are; the sorted
    labels if not given."""
    values: str | None = None
    """The pixel values of a mask's classes, such as 0,255; those that occur if not given."""
    swap: UseAppendAction[tuple[str, ...]] = ()
    """Two points that change places in a mirror image, such as left_eye,right_eye, once for each pair; none where no
    point has a side. If not given, images with points are not mirrored."""
    valid: str = "0.2"
    """A fraction drawn at random, stratified:F, fold:I/K (0/5 to 4/5), stratified-fold:I/K, column:C (true or valid,
    test), or folder:N (a folder of that name)."""
    test: str | None = None
    """The same for the test, but no folds; or all. Fractions are of all images; but where one of the two is no
    fraction, the test is picked first and --valid divides the rest."""
    seed: int = 42
    """Of what is drawn."""
    root: str | Path | None = None
    """Where the paths of a CSV or table start; its own folder if not given."""
    path_column: str | None = None
    """The column of paths; the first if not given."""
    folder: str = ""
    """Put before every path."""
    suffix: str = ""
    """Put behind every path, such as .jpg."""
    column_names: tuple[str, ...] = ()
    """Of a CSV that does not begin with them."""
    folders: tuple[str, ...] = ()
    """Of a folder, look only into these."""
    extensions: tuple[str, ...] = ()
    """What images end in, such as png."""
    recursive: bool = True
    """Look into folders of the folder too."""
    max_bad: float = 0.01
    """The share of files that may be unusable; 1 for any."""
    separator: str | None = None
    """Between the columns of a CSV, such as ';' or tab; found if not given."""
    skip_unlabelled: bool = False
    """Leave out, and count, the images that --label finds no label for."""
    max_pixels: int = 120_000_000
    """Images and masks of more pixels are unusable, and not decoded: 120 megapixels take 360 MB of memory each. At most
    178,956,970, from where Pillow refuses."""
