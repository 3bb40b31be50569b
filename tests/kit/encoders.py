"""How are the picture files written that no library writes? Byte by byte."""

import struct
import zlib
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def dc_jpeg(scene: Pixels, across: int, down: int) -> bytes:
    """A baseline JPEG of flat blocks, the luma sampled `across` x `down` times as often as the chroma."""
    height, width = scene.shape[:2]
    rows, cols = -(-height // (8 * down)), -(-width // (8 * across))
    grid = np.pad(scene, ((0, rows * down * 8 - height), (0, cols * across * 8 - width), (0, 0)), "edge")
    ycc = np.asarray(Image.fromarray(grid).convert("YCbCr")).astype(int)
    luma = ycc[::8, ::8, 0]
    chroma = ycc[:: 8 * down, :: 8 * across, 1:]
    codes, before = [], [0, 0, 0]

    def block(component: int, value: int) -> None:
        step = (value - 128) - before[component]  # the table is all 8, so a step of DC is a step of the value
        before[component] += step
        size = abs(step).bit_length()
        codes.append(f"{size:04b}")
        if size:
            codes.append(f"{step if step > 0 else step + (1 << size) - 1:0{size}b}")
        codes.append("00")  # and no more in this block

    for row, col in product(range(rows), range(cols)):
        for y, x in product(range(down), range(across)):
            block(0, int(luma[row * down + y, col * across + x]))
        for k in (0, 1):
            block(1 + k, int(chroma[row, col, k]))
    bits = "".join(codes)
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 255, marker, len(body) + 2) + body

    frame = struct.pack(">BHHB", 8, height, width, 3) + bytes([1, across << 4 | down, 0, 2, 0x11, 0, 3, 0x11, 0])
    tables = bytes([0, 0, 0, 0, 12] + [0] * 12) + bytes(range(12))  # twelve sizes of DC, each coded in four bits
    ends = bytes([0x10, 0, 1] + [0] * 14) + b"\0"  # of AC, the end of a block alone, in two
    return (
        b"\xff\xd8"
        + segment(0xDB, b"\0" + b"\x08" * 64)
        + segment(0xC0, frame)
        + segment(0xC4, tables)
        + segment(0xC4, ends)
        + segment(0xDA, bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0]))
        + data
        + b"\xff\xd9"
    )


# PNG --------------------------------------------------------------------------------------------------------

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def png_of(values: NDArray[Any], bits: int, colour: int, **chunks: bytes) -> bytes:
    """A PNG of (h, w, channels) values; chunks go in front of the pixels, by their names."""
    height, width = values.shape[:2]
    if bits == 16:
        rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    elif bits == 8:
        rows = values.astype(np.uint8).reshape(height, -1)
    else:
        shifts = np.arange(bits)[::-1]
        rows = np.packbits((values.reshape(height, -1, 1) >> shifts & 1).reshape(height, -1).astype(np.uint8), axis=1)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    middle = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    pixels = chunk(b"IDAT", zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes()))
    return b"\x89PNG\r\n\x1a\n" + head + middle + pixels + chunk(b"IEND", b"")


def bmp_of(
    rows: NDArray[np.uint8], width: int, bits: int, *, palette: bytes = b"", masks: tuple[int, ...] = ()
) -> bytes:
    """A BMP of (h, bytes) rows, the first the top one, stored from the bottom upwards; masks: BITFIELDS."""
    height = len(rows)
    body = np.pad(rows[::-1], ((0, 0), (0, -rows.shape[1] % 4))).tobytes()
    fields = struct.pack(f"<{len(masks)}I", *masks)
    start = 14 + 40 + len(fields) + len(palette)
    info = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, 3 if masks else 0, len(body), 0, 0, len(palette) // 4, 0
    )
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + fields + palette + body


def fax_tiff(bits: NDArray[np.bool_], *, long: bool) -> bytes:
    """One bit a pixel, white is zero, as scanners write it; `long`: every tag a LONG, which DALI's parser scolds."""
    height, width = bits.shape
    data = np.packbits(bits, axis=1).tobytes()
    tags = {
        256: width,
        257: height,
        258: 1,
        259: 1,
        262: 0,
        273: 8 + 2 + 12 * 9 + 4,
        277: 1,
        278: height,
        279: len(data),
    }
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if long or tag in (273, 279) else 3, 1, value)
        for tag, value in sorted(tags.items())
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data
