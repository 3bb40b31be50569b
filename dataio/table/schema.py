"""Which columns and splits has a manifest's table, of which types, and in which order do its rows lie?"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from thawline.dataio.table.tasks import TASKS

SPLITS = ("train", "valid", "test")


def columns(task: str) -> pa.Schema:
    """Return the schema of a manifest's rows."""
    word, reason = (pa.dictionary(index, pa.string()) for index in (pa.int8(), pa.int32()))
    fields = {
        "id": pa.int64(),
        "path": pa.large_string(),
        "label": TASKS[task].column,
        "split": word,
        "width": pa.int32(),
        "height": pa.int32(),
        "bytes": pa.int64(),
        "hash": pa.uint64(),
        "format": word,
        "orientation": pa.int8(),
        "codec": word,
        "status": reason,
    }
    return pa.schema({**fields, "mask_hash": pa.uint64()} if TASKS[task].masks else fields)


def in_order(rows: pa.Table) -> pa.Table:
    """In one chunk a column, so that any row is reached without a search; by id."""
    if any(column.num_chunks > 1 for column in rows.columns):
        rows = rows.unify_dictionaries().combine_chunks()
    ids = rows["id"].to_numpy()
    return rows if (np.diff(ids) > 0).all() else rows.sort_by("id").combine_chunks()
