"""Images and labels to batches: folder -> Table -> Manifest -> plan -> batches. Knows no model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dataio.errors import DataError
from dataio.labels import (
    by_column,
    by_function,
    by_parent,
    by_regex,
    label,
    mask_path,
    points_by_columns,
    points_by_function,
)
from dataio.manifest import Manifest
from dataio.sources import Table, from_csv, from_file, from_folder, from_lists, from_table
from dataio.spec import ImageSpec
from dataio.splits import by_folder, hold_out, k_fold, random_split, split, stratified

if TYPE_CHECKING:
    from dataio.batch import Batch, Loader
    from dataio.explanation import explain, show_batch
    from dataio.loader import ImageLoader, choose_engine, loaders, split_loader
    from dataio.mix import Mix
    from dataio.packing import pack

# These bring torch, which costs seconds: they are imported when they are first asked for, so that `thawline index` and
# a mistyped path answer at once.
_LATE = {
    **dict.fromkeys(("Batch", "Loader"), "dataio.batch"),
    **dict.fromkeys(("explain", "show_batch"), "dataio.explanation"),
    **dict.fromkeys(("ImageLoader", "choose_engine", "loaders", "split_loader"), "dataio.loader"),
    "Mix": "dataio.mix",
    "pack": "dataio.packing",
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
