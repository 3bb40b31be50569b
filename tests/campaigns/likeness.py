"""By how much do the engines' pictures of the gallery differ from Pillow's? `-m tests.campaigns.likeness SEEDS`."""

import io
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tests.kit.gallery import gallery
from tests.kit.hostile import saved
from thawline.dataio.labels.labels import by_function, from_lists, label
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import split_loader
from thawline.dataio.stream.renderer import EngineName
from thawline.dataio.table.splits import by_function as divide
from thawline.dataio.table.splits import split


@dataclass
class Row:
    """What became of a picture: by how many levels of 255 each engine differs from Pillow, and how many it may."""

    status: str
    codec: str | None
    allowed: int
    levels: dict[str, int] = field(default_factory=dict)


def truth(data: bytes) -> NDArray[np.int64]:
    """(H, W, 3): Pillow's pixels, upright; deep grey ones scaled to 8 bits, since Pillow would clip them."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            grey = (np.asarray(upright).astype(np.int64) * 255 + 32767) // 65535
            return np.repeat(grey[..., None], 3, axis=-1)
        return np.asarray(upright.convert("RGB")).astype(np.int64)


def compare(seed: int, folder: Path) -> dict[str, Row]:
    """Index the gallery and render it in both engines, each picture's largest square as it is: name -> Row."""
    files = {**gallery(seed), "black.png": saved(Image.new("RGB", (64, 64)), "PNG")}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    paths = [str(folder / name) for name in files]
    table = label(from_lists(paths), by_function(lambda row: "ab"[len(row["path"]) % 2]))
    manifest = split(table, divide(lambda row: not row["path"].endswith("black.png")), max_bad=1)
    names, rows = dict[int, str](), dict[str, Row]()
    for row in manifest.rows.to_pylist():
        name = Path(row["path"]).name
        names[row["id"]] = name
        rows[name] = Row(row["status"], row["codec"], 3 if row["format"] in ("JPEG", "MPO") else 1)
    side = min(Image.open(io.BytesIO(files["24.bmp"])).size)
    spec = ImageSpec(size_px=side, presize_px=side, mean=(0, 0, 0), std=(1, 1, 1))
    engines: tuple[EngineName, ...] = ("dali", "reference")
    for engine in engines:
        loader = split_loader(manifest, spec, "valid", global_batch=64, engine=engine)
        for batch in loader.stream():
            for number, image in zip(batch.ids.tolist(), batch.inputs, strict=True):
                seen = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.int64)
                whole = truth(files[names[number]])
                top, left = ((length - side) // 2 for length in whole.shape[:2])
                off = np.abs(seen - whole[top : top + side, left : left + side])
                rows[names[number]].levels[engine] = int(off.max())
        loader.close()
    del rows["black.png"]
    return rows


def main(seeds: list[int]) -> int:
    """The campaign: a line a seed, and each picture that is shown wrongly; 1 if there is any."""
    wrong = 0
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(seed, Path(folder))
        ok = [row for row in rows.values() if row.status == "ok"]
        bad = {name: row for name, row in rows.items() if max(row.levels.values(), default=0) > row.allowed}
        wrong += len(bad) + sum(len(row.levels) != 2 for row in ok)
        by_dali = sum(row.codec == "dali" for row in ok)
        print(f"seed {seed}: {len(rows)} pictures, {by_dali} by DALI, {len(ok) - by_dali} by Pillow, ", end="")
        print(f"{len(rows) - len(ok)} refused, {len(bad)} shown wrongly", flush=True)
        for name, row in bad.items():
            print(f"  {name}: {row}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]] or [1]))
