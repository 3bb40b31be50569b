"""Which values do masks hold, and of which classes are they? Counted while files are verified, then compared."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from thawline.dataio.errors import LabelError, SplitError, listed, quoted
from thawline.dataio.labels.counts import lacking
from thawline.dataio.pixels.pictures import VOID, hush_pillow

MASK_CHECKS = pa.schema(
    {"mask_hash": pa.uint64(), "mask_values": pa.list_(pa.uint8()), "mask_pixels": pa.list_(pa.int64())}
)
"""The columns that masks add to the checks of a file; `mask_pixels` counts each of `mask_values`."""

_EXAMPLES = 3


def check_apart(masks: Sequence[str], images: Sequence[str], name: str) -> None:
    """Raises LabelError where a mask is also listed as an image. masks: their paths; name: of the labeller."""
    both = sorted(set(masks).intersection(images))
    if both:
        raise LabelError(
            f"{name} gives {len(both):,} masks that are among the {len(images):,} images themselves "
            f"({listed(both, most=2)}): they would be trained on as pictures; list the pictures alone (--folders, "
            "--extensions, or the rows of the list)"
        )


def count_values(mask: NDArray[np.uint8]) -> tuple[list[int], list[int]]:
    """The values that occur in a mask (h, w), rising, and the pixels that have each."""
    pixels = Image.fromarray(mask).histogram()  # np.bincount widens every pixel to 8 bytes, and takes 2.5 times as long
    values = [value for value, count in enumerate(pixels) if count]
    return values, [pixels[value] for value in values]


def why_lossy(data: bytes) -> str | None:
    """Why an encoded mask does not hold its original values; None if it does, or is no picture."""
    hush_pillow()
    kind = None
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:  # the decoder reports what it is
        as_jpeg = image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"  # TIFF may hold either
        lossy = as_jpeg or (image.format == "WEBP" and b"VP8 " in data[:64])
        kind = image.format if lossy or (image.format == "JPEG2000" and _irreversible(data)) else None
    return f"lossy {kind}, which changes pixel values; save it as PNG" if kind else None


def _irreversible(data: bytes) -> bool:
    """Whether a JPEG 2000's coding style (its COD marker) has the lossy wavelet."""
    marker = data.find(b"\xff\x52\x00")
    return marker >= 0 and data[marker + 13 : marker + 14] == b"\0"


def totals(checks: pa.Table) -> NDArray[np.int64]:
    """(256,): the pixels of each value over all these masks."""
    values, pixels = (pc.list_flatten(checks[name]).to_numpy() for name in ("mask_values", "mask_pixels"))
    return np.bincount(values, weights=pixels, minlength=256).astype(np.int64)


def occurring_values(checks: pa.Table) -> tuple[int, ...]:
    """The values that occur in masks; 255 is void beside others, and a class of a mask with two values."""
    values = sorted(pc.list_flatten(checks["mask_values"]).unique().to_pylist())
    return tuple(values if len(values) <= 2 else [value for value in values if value != VOID])


def by_split(checks: pa.Table, splits: NDArray[np.object_], values: Sequence[int]) -> Mapping[str, NDArray[np.int64]]:
    """By split that occurs: how many of these masks have each value, (C,). splits: of each mask, (n,)."""
    showing_value = [showing(checks, [value]) for value in values]
    return {
        split: np.array([(has_value & (splits == split)).sum() for has_value in showing_value], np.int64)
        for split in dict.fromkeys(splits.tolist())
    }


def showing(checks: pa.Table, values: Sequence[int]) -> NDArray[np.bool_]:
    """Which masks have a pixel with one of these values, (n,); False for masks that could not be read."""
    present = checks["mask_values"].combine_chunks()
    matches = pc.is_in(present.flatten(), pa.array(values, pa.uint8()))
    inside = np.zeros(checks.num_rows, np.bool_)
    inside[pc.list_parent_indices(present).filter(matches).to_numpy()] = True
    return inside


def check_values(
    pixels: NDArray[np.int64], *, classes: Sequence[str], values: Sequence[int], counted: bool, teaching: bool
) -> tuple[str, ...]:
    """Notes on classes that no mask has, and on values without a class.

    pixels: of `totals`. counted: the values are 0, 1, 2, ... by default. teaching: there are training images.
    Raises: SplitError where some class does not occur and some value has no class, which then probably is that class:
        if the values are counted, or if at most one class is left to learn.
    """
    never = [
        f"{quoted(name)} (value {value})" for name, value in zip(classes, values, strict=True) if not pixels[value]
    ]
    strange = [value for value in np.flatnonzero(pixels).tolist() if value not in values]
    share = pixels[strange].sum() / max(1, pixels.sum())
    lacking = f"{len(never)} of {len(classes)} classes occur in no mask: {_few(never)}"
    value, are = ("value", "is") if len(strange) == 1 else ("values", "are")
    unassigned = f"{value} {_few(strange)}, with {share:.1%} of all pixels, {are} no class"
    if never and strange and (counted or (teaching and len(never) >= len(classes) - 1)):
        occur = ",".join(map(str, np.flatnonzero(pixels)))
        same = occur.count(",") == len(classes) - 1
        raise SplitError(
            f"{lacking}; and {unassigned}: these pixels would never be trained on; give each class its value in the "
            f"masks with --values{f' {occur}' if same else ', also where a class is only missing here'}"
        )
    notes = [f"WARNING: {lacking}: nothing can be learnt of them"] if never else []
    if strange:
        loud = "" if strange == [VOID] else "WARNING: "
        notes.append(f"{loud}mask {unassigned}: left out of training and metrics")
    return tuple(notes)


def remarks(
    rows: pa.Table, checks: pa.Table, *, classes: Sequence[str], values: Sequence[int], counted: bool
) -> Iterator[str]:
    """Notes on the masks of a manifest's usable rows: their values alone do not show what they mean.

    Raises: SplitError as `check_values`.
    """
    if checks["mask_values"].null_count:  # the masks were not verified
        return
    teaching = "train" in pc.unique(rows["split"]).to_pylist()
    pixels = totals(checks)
    yield from check_values(pixels, classes=classes, values=values, counted=counted, teaching=teaching)
    occurring = [value for value in values if pixels[value]]  # a note on the others was made above
    counts = by_split(checks, rows["split"].to_numpy().astype(object), occurring)
    yield from lacking(counts, [classes[values.index(value)] for value in occurring], stratify=False)


def _few(items: Sequence[object]) -> str:
    more = f" and {len(items) - _EXAMPLES:,} more" if len(items) > _EXAMPLES else ""
    return ", ".join(map(str, items[:_EXAMPLES])) + more
