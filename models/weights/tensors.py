"""How do tensors lie in a .safetensors file? A JSON header, then their bytes: nothing in it can run.

Written here in full, since the format is these few lines and the package of that name would be one more for everybody
to install. Source: Hugging Face's safetensors, "Format", whose files these are and whose rules for readers are kept.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thawline.models.errors import WeightsError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000
_ABOUT = "__metadata__"


def to_bytes(tensors: Mapping[str, Tensor], *, about: Mapping[str, str] | None = None) -> bytes:
    """A .safetensors file of these tensors, wherever they lie; about: texts to keep beside them."""
    # The widest first: so each begins at a multiple of its own size, which whoever maps the file relies on.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_ABOUT: dict(about)} if about else {}
    parts, at = list[bytes](), 0
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous()
        part = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(part)],
        }
        parts.append(part)
        at += len(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *parts])


def from_bytes(data: bytes, *, where: str) -> dict[str, Tensor]:
    """The tensors in a .safetensors file, on the CPU; they share one copy of `data`.

    where: what the file is called in errors. Raises: WeightsError, when it is cut short or anything else.
    """
    try:
        return _parsed(bytearray(data))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise WeightsError(
            f"{where} is not a whole .safetensors file ({error}): no weights are read from it; copy or make it again"
        ) from error


def _parsed(data: bytearray) -> dict[str, Tensor]:
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    begin = _LENGTH_BYTES + length
    if len(data) < _LENGTH_BYTES or length > _MOST_HEADER_BYTES or begin > len(data):
        raise ValueError(f"its {len(data):,} bytes do not begin with a header of {length:,} bytes")
    header = json.loads(data[_LENGTH_BYTES:begin].decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    tensors, ranges = dict[str, Tensor](), list[tuple[int, int]]()
    for name, entry in header.items():
        if name == _ABOUT:
            continue
        dtype, shape, (lo, hi) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, lo, hi)):
            raise ValueError(f"{name[:80]!r} has a shape or place that is none")
        count = 1
        for n in shape:
            count *= n
        if hi - lo != count * dtype.itemsize or begin + hi > len(data):
            raise ValueError(f"{name[:80]!r} of shape {shape} lies at bytes {lo:,} to {hi:,} of {len(data) - begin:,}")
        flat = (
            torch.frombuffer(data, dtype=dtype, count=count, offset=begin + lo)
            if count
            else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.reshape(shape)
        ranges.append((lo, hi))
    at = 0
    for lo, hi in sorted(ranges):
        if lo != at:
            raise ValueError("its tensors overlap, or leave holes")
        at = hi
    if begin + at != len(data):
        raise ValueError(f"it has {len(data) - begin - at:,} bytes that belong to no tensor")
    return tensors
