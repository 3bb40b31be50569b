"""What do tests of shards pack? Small hand-made manifests of every task; and loaders over any reader."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from PIL import Image

from tests.kit.images import EVERYTHING, encode, photo
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.reading.readers import Reader
from thawline.dataio.reading.shards import open_reader
from thawline.dataio.stream.loader import ImageLoader
from thawline.dataio.stream.plan import Once, Training
from thawline.dataio.stream.renderer import Renderer, choose_engine
from thawline.dataio.stream.source import Source
from thawline.dataio.table.manifest import Manifest, Shard, build

SMALL = 4000
"""Bytes of a shard: the photos fill several."""
SPEC = ImageSpec(size_px=16, presize_px=20, **EVERYTHING)
LABELS: dict[str, Any] = {
    "single_label": lambda i: f"class{i % 3}",
    "multi_label": lambda i: [f"class{i % 3}", *(["even"] if i % 2 == 0 else [])],
    "points": lambda i: [1.0 + i, 2.0, 20.5, float("nan") if i == 4 else 9.25],
    "mask": lambda i: f"masks/{i:02}.png",
}
CLASSES = {
    "single_label": ("class0", "class1", "class2"),
    "multi_label": ("class0", "class1", "class2", "even"),
    "points": ("nose", "tail"),
    "mask": ("sky", "sea"),
}


def gif(seed: int) -> bytes:
    """A file that Pillow decodes and DALI does not."""
    file = io.BytesIO()
    Image.fromarray(photo(36, 30, seed=seed)).quantize(64).save(file, "GIF")
    return file.getvalue()


def photos(folder: Path, *, task: str = "single_label", count: int = 14, side: int = 36) -> Manifest:
    """`count` JPEGs, every fourth for validation; image 5 is a GIF, 7 turned by EXIF, 9 was quarantined."""
    rows: dict[str, Any] = {name: [] for name in ("path", "width", "height", "bytes", "hash", "codec", "status")}
    rows |= {"split": [], "format": [], "orientation": [], "mask_hash": [], "id": range(count)}
    for i in range(count):
        width, height = side + i, side - 3
        orientation = 6 if i == 7 else 1
        data = gif(i) if i == 5 else encode(photo(width, height, seed=i), orientation=orientation).tobytes()
        if i in (5, 7):
            width, height = (36, 30) if i == 5 else (height, width)
        name = f"a/{i:02}.{'gif' if i == 5 else 'jpg'}"
        for file_name, content in ((name, data), (f"masks/{i:02}.png", _mask(i))):
            (folder / file_name).parent.mkdir(parents=True, exist_ok=True)
            (folder / file_name).write_bytes(content)
        bad = i == 9
        row = {
            "path": name,
            "width": width,
            "height": height,
            "bytes": len(data),
            "hash": xxhash.xxh3_64_intdigest(data),
            "codec": "pillow" if i == 5 else "dali",
            "format": "GIF" if i == 5 else "JPEG",
            "orientation": orientation,
            "mask_hash": xxhash.xxh3_64_intdigest(_mask(i)),
            "split": None if bad else ("valid" if i % 4 == 0 else "train"),
            "status": "not an image" if bad else "ok",
        }
        for key, value in row.items():
            rows[key].append(value)
    columns = {**rows, "label": [LABELS[task](i) for i in range(count)]}
    values = (0, 200) if task == "mask" else ()
    return build(columns, root=str(folder), task=task, classes=CLASSES[task], values=values)


def _mask(i: int) -> bytes:
    pixels = np.where(photo(18, 15, seed=50 + i)[..., 0] > 127, 200, 0).astype(np.uint8)
    return encode(pixels, "PNG", mode="L").tobytes()


def loader(manifest: Manifest, reader: Reader, *, engine: Any = "dali", split: str = "train") -> ImageLoader:
    """A loader of four images a step over that reader."""
    subset = manifest.subset(split)
    order = Training(n=len(subset), global_batch=4, seed=5) if split == "train" else Once(n=len(subset), global_batch=4)
    return ImageLoader(
        order=order,
        source=Source(manifest=manifest, subset=subset, order=order, spec=SPEC, reader=reader, seed=5),
        renderer=Renderer(spec=SPEC, local_batch=4, masks=manifest.task == "mask", choice=choose_engine(engine)),
        epoch_samples=8,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in the folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def every(manifest: Manifest) -> list[Any]:
    """(path, bytes as read) of each image of both splits, training first."""
    reader, images = open_reader(manifest), list[Any]()
    for split in ("train", "valid"):
        subset = manifest.subset(split)
        rows = subset.take(np.arange(len(subset)))
        images += [(rows.paths[i], reader.read(rows, i)) for i in range(len(rows))]
    reader.close()
    return images


def rebuilt(manifest: Manifest, rows: dict[str, Any]) -> Manifest:
    """The manifest with other rows."""
    return build(rows, root=manifest.root, task=manifest.task, classes=manifest.classes, values=manifest.values)


def as_before(packed: Manifest) -> Manifest:
    """The pack in the format without checksums of samples; its shards are rewritten."""
    home, shards = Path(packed.home), list[Shard]()
    for shard in packed.shards:
        with pa.ipc.open_file(str(home / shard.name)) as arrow:
            batches = [arrow.get_batch(b) for b in range(arrow.num_record_batches)]
        batches = [batch.drop_columns(["data_hash"]) for batch in batches]
        with pa.ipc.new_file(str(home / f"{shard.name}.tmp"), batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        (home / f"{shard.name}.tmp").replace(home / shard.name)
        data = (home / shard.name).read_bytes()
        shards.append(Shard(shard.name, shard.first, shard.rows, len(data), xxhash.xxh3_128_hexdigest(data)))
    return replace(packed, shards=tuple(shards))


def wear(packed: Manifest, path: str) -> Path:
    """Damage the middle of a packed image, which still decodes; return the shard that holds it."""
    packed_image = dict(every(packed))[path]
    image = packed_image.image.tobytes()
    for shard in packed.shards:
        file = Path(packed.home) / shard.name
        data = bytearray(file.read_bytes())
        if image in data:
            start = data.find(image) + len(image) * 6 // 10
            data[start : start + 8] = bytes(255 - byte for byte in data[start : start + 8])
            file.write_bytes(data)
            return file
    raise AssertionError(path)
