"""Images and labels to batches: folder -> Table -> Manifest -> plan -> batches. Knows no model."""

from dataio.batch import Batch, Loader
from dataio.errors import DataError
from dataio.explain import explain, show_batch
from dataio.labels import by_column, by_function, by_parent, by_regex, label
from dataio.loader import ImageLoader, choose_engine, loaders
from dataio.manifest import Manifest
from dataio.sources import Table, from_csv, from_folder, from_lists, from_table
from dataio.spec import ImageSpec
from dataio.splits import by_folder, random_split, split

__all__ = [
    "Batch",
    "DataError",
    "ImageLoader",
    "ImageSpec",
    "Loader",
    "Manifest",
    "Table",
    "by_column",
    "by_folder",
    "by_function",
    "by_parent",
    "by_regex",
    "choose_engine",
    "explain",
    "from_csv",
    "from_folder",
    "from_lists",
    "from_table",
    "label",
    "loaders",
    "random_split",
    "show_batch",
    "split",
]
