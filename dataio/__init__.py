"""Images and labels to batches: folder -> Table -> Manifest -> plan -> batches. Knows no model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thawline.dataio.errors import DataError
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.table.labels import (
    by_column,
    by_function,
    by_parent,
    by_regex,
    label,
    mask_path,
    points_by_columns,
    points_by_function,
)
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import Table, from_csv, from_file, from_folder, from_lists, from_table
from thawline.dataio.table.splits import by_folder, hold_out, k_fold, random_split, split, stratified

if TYPE_CHECKING:
    from thawline.dataio.batch import Batch, Loader
    from thawline.dataio.reading.packing import pack
    from thawline.dataio.show import explain, show_batch
    from thawline.dataio.stream.loader import ImageLoader, choose_engine, loaders, split_loader
    from thawline.dataio.stream.mix import Mix

# These bring torch, which costs seconds: they are imported when they are first asked for, so that `thawline index` and
# a mistyped path answer at once.
_LATE = {
    **dict.fromkeys(("Batch", "Loader"), "thawline.dataio.batch"),
    **dict.fromkeys(("explain", "show_batch"), "thawline.dataio.show"),
    **dict.fromkeys(("ImageLoader", "choose_engine", "loaders", "split_loader"), "thawline.dataio.stream.loader"),
    "Mix": "thawline.dataio.stream.mix",
    "pack": "thawline.dataio.reading.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'dataio' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATE[name]), name)
    return value


__all__ = [
    "Batch",
    "DataError",
    "ImageLoader",
    "ImageSpec",
    "Loader",
    "Manifest",
    "Mix",
    "Table",
    "by_column",
    "by_folder",
    "by_function",
    "by_parent",
    "by_regex",
    "choose_engine",
    "explain",
    "from_csv",
    "from_file",
    "from_folder",
    "from_lists",
    "from_table",
    "hold_out",
    "k_fold",
    "label",
    "loaders",
    "mask_path",
    "pack",
    "points_by_columns",
    "points_by_function",
    "random_split",
    "show_batch",
    "split",
    "split_loader",
    "stratified",
]
