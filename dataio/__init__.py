"""Images and labels to batches: folder -> Table -> Manifest -> plan -> batches. Knows no model."""

from typing import TYPE_CHECKING

from thawline.late import late

if TYPE_CHECKING:
    from thawline.dataio.batch import Batch, Loader
    from thawline.dataio.errors import DataError
    from thawline.dataio.labels.labels import (
        by_column,
        by_function,
        by_parent,
        by_regex,
        from_lists,
        label,
        mask_path,
        numbers_by_columns,
        points_by_columns,
        points_by_function,
    )
    from thawline.dataio.pixels.spec import ImageSpec
    from thawline.dataio.reading.packing import pack
    from thawline.dataio.show import explain, show_batch
    from thawline.dataio.stream.arrays import ArrayLoader, array_loaders
    from thawline.dataio.stream.loader import ImageLoader, loaders, split_loader
    from thawline.dataio.stream.mix import Mix
    from thawline.dataio.stream.render import render
    from thawline.dataio.stream.renderer import choose_engine
    from thawline.dataio.table.draws import k_fold, random_split, stratified
    from thawline.dataio.table.manifest import Manifest
    from thawline.dataio.table.sources import Table, from_csv, from_file, from_folder, from_table
    from thawline.dataio.table.splits import by_folder, hold_out, split

__getattr__ = late(
    __name__,
    {
        "thawline.dataio.batch": "Batch Loader",
        "thawline.dataio.errors": "DataError",
        "thawline.dataio.pixels.spec": "ImageSpec",
        "thawline.dataio.reading.packing": "pack",
        "thawline.dataio.show": "explain show_batch",
        "thawline.dataio.stream.arrays": "ArrayLoader array_loaders",
        "thawline.dataio.stream.loader": "ImageLoader loaders split_loader",
        "thawline.dataio.stream.mix": "Mix",
        "thawline.dataio.stream.render": "render",
        "thawline.dataio.stream.renderer": "choose_engine",
        "thawline.dataio.table.draws": "k_fold random_split stratified",
        "thawline.dataio.labels.labels": (
            "by_column by_function by_parent by_regex from_lists label mask_path numbers_by_columns points_by_columns "
            "points_by_function"
        ),
        "thawline.dataio.table.manifest": "Manifest",
        "thawline.dataio.table.sources": "Table from_csv from_file from_folder from_table",
        "thawline.dataio.table.splits": "by_folder hold_out split",
    },
)

__all__ = [
    "ArrayLoader",
    "Batch",
    "DataError",
    "ImageLoader",
    "ImageSpec",
    "Loader",
    "Manifest",
    "Mix",
    "Table",
    "array_loaders",
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
    "numbers_by_columns",
    "pack",
    "points_by_columns",
    "points_by_function",
    "random_split",
    "render",
    "show_batch",
    "split",
    "split_loader",
    "stratified",
]
