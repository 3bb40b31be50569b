"""Which eight images are labelled by hand, in every way that thawline reads labels?"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pyarrow as pa

from thawline.dataio.labels import labels

NAN = math.nan

# The data ---------------------------------------------------------------------------------------------------
# In the order of ids. tail is not to be seen in rows 2 and 5, nothing is in row 6.
COLUMNS = ("file", "species", "tags", "side", "is_valid", "mask", "ear_x", "ear_y", "tail_x", "tail_y")
ROWS = [
    ("test/cat/tom_7.png", "felis", "soft;old", "test", "false", "masks/tom_7.png", 1.0, 2.0, 3.0, 2.5),
    ("test/dog/rex_8.png", "canis", "old", "test", "false", "masks/rex_8.png", 2.0, 2.0, 5.0, 0.5),
    ("train/cat/tom_1.png", "felis", "", "train", "false", "masks/tom_1.png", 1.5, 1.0, None, None),
    ("train/cat/tom_2.png", "felis", "soft", "train", "true", "masks/tom_2.png", 1.0, 2.0, 3.0, 1.0),
    ("train/dog/rex_3.png", "canis", "old;soft", "train", "false", "masks/rex_3.png", 2.0, 3.0, 4.0, 1.0),
    ("train/dog/rex_4.png", "canis", "big", "train", "false", "masks/rex_4.png", 0.5, 0.5, None, None),
    ("valid/cat/tom_5.png", "felis", "soft", "Valid", "true", "masks/tom_5.png", None, None, None, None),
    ("valid/dog/rex_6.png", "canis", "old;soft", "Valid", "false", "masks/rex_6.png", 6.0, 4.0, 0.0, 0.0),
]
FILES = [row[0] for row in ROWS]
MASKS = [str(row[5]) for row in ROWS]
IMAGES = ("--folders", "test", "train", "valid")
POINTS = [
    [1.0, 2.0, 3.0, 2.5],
    [2.0, 2.0, 5.0, 0.5],
    [1.5, 1.0, NAN, NAN],
    [1.0, 2.0, 3.0, 1.0],
    [2.0, 3.0, 4.0, 1.0],
    [0.5, 0.5, NAN, NAN],
    [NAN, NAN, NAN, NAN],
    [6.0, 4.0, 0.0, 0.0],
]
PAIRS = [[] if math.isnan(p[0]) else [p[:2], None if math.isnan(p[2]) else p[2:]] for p in POINTS]
BY_FILE = dict(zip(FILES, PAIRS, strict=True))


def number(row: labels.Row) -> int:
    """The 7 of test/cat/tom_7.png."""
    return int(row["path"][-5])


def frame(base: Path) -> pd.DataFrame:
    """The rows as a data frame, with lists of tags."""
    rows = pd.DataFrame(ROWS, columns=list(COLUMNS), index=range(10, 18))
    return rows.assign(
        tags=rows["tags"].map(lambda text: [tag for tag in text.split(";") if tag]), is_valid=rows["is_valid"] == "true"
    )


def arrow(base: Path) -> pa.Table:
    """The rows as an Arrow table, paths as one column among the others."""
    return pa.Table.from_pandas(frame(base), preserve_index=False)
