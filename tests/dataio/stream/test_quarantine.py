"""What happens when a file breaks or vanishes after it was indexed? Another takes its place, and it is named."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kit.images import PLAIN, colour_numbers, first, flat_colour
from thawline.dataio.batch import Batch
from thawline.dataio.errors import ManifestError, QuarantineError
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.reading.readers import Encoded, FileReader
from thawline.dataio.store.root import Root
from thawline.dataio.stream.loader import ImageLoader, loaders
from thawline.dataio.stream.plan import Training
from thawline.dataio.stream.renderer import EngineName
from thawline.dataio.table.manifest import Manifest

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
SPEC = ImageSpec(size_px=16, presize_px=20, **PLAIN)
both_engines = pytest.mark.parametrize("engine", ["dali", "reference"])


def pair(manifest: Manifest, engine: EngineName = "dali", **options: Any) -> tuple[ImageLoader, ImageLoader]:
    options = {"global_batch": 4, "seed": 5, "threads": 1, "max_quarantined": 0.99, **options}
    return loaders(manifest, SPEC, engine=engine, **options)


def file_of(manifest: Manifest, number: int) -> Path:
    (name,) = manifest.rows.slice(number, 1)["path"].to_pylist()
    return Path(manifest.root) / name


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def replaced(file: Path) -> None:
    Image.new("RGB", (40, 40), flat_colour(255)).save(file, "JPEG")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "vanished": (Path.unlink, "missing"),
    "truncated": (truncate, r"changed since it was indexed \(it has \d+ bytes now\)"),
    "a bit flipped": (flip_a_bit, "changed since it was indexed"),
    "another image": (replaced, "changed since it was indexed"),
    "a folder": (a_folder, "a folder, not a file"),
    "a pipe": (a_pipe, "not a regular file"),
    "without an end": (a_device, "not a regular file"),
    "grown": (
        lambda file: os.truncate(file, 20 << 30),
        r"changed since it was indexed \(it has 21,474,836,480 bytes now",
    ),
}


def filled(manifest: Manifest, bad: set[int], positions: range) -> list[int]:
    """Who stands at each position, from the plan alone: attempt after attempt until one is usable."""
    ids = manifest.subset("train").ids
    plan, stream = Training(n=len(ids), global_batch=4, seed=5), list[int]()
    for position in positions:
        attempt = 0
        while (number := int(ids[plan.at(np.array([position]), attempt)[1][0]])) in bad:
            attempt += 1
        stream.append(number)
    return stream


@both_engines
@pytest.mark.parametrize("how", SPOILT)
def test_a_hole_in_the_training_stream_is_filled_by_the_rule_and_the_file_is_named(
    own_flat: Manifest, engine: EngineName, how: str
) -> None:
    spoil, reason = SPOILT[how]
    train, _ = pair(own_flat, engine)
    victim = int(train.subset.ids[5])
    spoil(file_of(own_flat, victim))
    batches = first(train, 9)  # three epochs of twelve
    stream = [i for batch in batches for i in batch.ids.tolist()]
    assert stream == filled(own_flat, {victim}, range(36))
    assert [i for batch in batches for i in colour_numbers(train, batch)] == stream  # their pixels, too
    assert [int(t) for batch in batches for t in batch.targets] == [i % 3 for i in stream]
    assert list(train.quarantined) == [victim]
    assert train.quarantined[victim].startswith(f"{file_of(own_flat, victim)}: ")
    assert re.search(reason, train.quarantined[victim])


def test_the_rule_holds_when_the_next_in_line_is_gone_too(own_flat: Manifest) -> None:
    train, _ = pair(own_flat)
    bad = {int(i) for i in train.subset.ids[[0, 2, 3, 5, 7, 8, 9, 11]]}
    for number in bad:
        file_of(own_flat, number).unlink()
    stream = [i for batch in first(train, 12) for i in batch.ids.tolist()]
    assert stream == filled(own_flat, bad, range(48))
    assert not set(stream) & bad
    assert set(train.quarantined) <= bad


def test_every_world_and_every_continuation_fills_a_hole_alike(own_flat: Manifest) -> None:
    train, _ = pair(own_flat)
    for row in (1, 6):
        file_of(own_flat, int(train.subset.ids[row])).unlink()
    whole = first(train, 6)
    ranks = [first(pair(own_flat, rank=rank, world_size=3, global_batch=4)[0], 6) for rank in range(3)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert torch.equal(torch.cat([part.ids for part in parts]), whole[step].ids)
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole[step].inputs)
    for tail, expected in zip(first(pair(own_flat)[0], 3, step=3), whole[3:], strict=True):
        assert torch.equal(tail.inputs, expected.inputs)


def test_what_others_found_is_not_read_again(own_flat: Manifest) -> None:
    """A file that this rank could read, and another could not: both do without it."""
    train, _ = pair(own_flat)
    victim = int(train.subset.ids[4])
    train.quarantine({victim: "gone elsewhere"})
    stream = [i for batch in first(train, 9) for i in batch.ids.tolist()]
    assert stream == filled(own_flat, {victim}, range(36))


@both_engines
def test_validation_leaves_a_broken_file_out_and_says_so(own_flat: Manifest, engine: EngineName) -> None:
    _, valid = pair(own_flat, engine, global_batch=2)
    ids = valid.subset.ids.tolist()
    truncate(file_of(own_flat, ids[0]))
    file_of(own_flat, ids[1]).unlink()  # so that the first batch has nothing left
    truncate(file_of(own_flat, ids[3]))
    for _ in range(2):
        batches = list(valid.stream())
        assert [batch.ids.tolist() for batch in batches] == [[ids[2]]]
    assert sorted(valid.quarantined) == [ids[0], ids[1], ids[3]]


class Trusting(FileReader):
    """Reads without comparing: so that what is broken reaches the decoder, as from a manifest of another machine."""

    def read(self, rows: Any, i: int) -> Encoded | str:
        return super().read(replace(rows, hashes=np.zeros_like(rows.hashes), sizes=np.zeros_like(rows.sizes)), i)


@both_engines
@pytest.mark.parametrize("side", ["train", "valid"])
def test_what_only_the_decoder_finds_broken_rebuilds_the_pipeline_where_it_stood(
    own_flat: Manifest, engine: EngineName, side: str, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = [batch.ids.tolist() for batch in list(islice(pair(own_flat, engine)[0].stream(), 9))]
    loader = pair(own_flat, engine)[side == "valid"]
    loader = replace(loader, source=replace(loader.source, reader=Trusting(Root.of(own_flat.root))))
    bad = {int(i) for i in loader.subset.ids[[1, 3]]}
    for number in bad:
        truncate(file_of(own_flat, number))
    batches = list(islice(loader.stream(), 9))
    stream = [i for batch in batches for i in batch.ids.tolist()]
    if side == "train":
        assert stream == filled(own_flat, bad, range(36))
        assert stream != [i for batch in expected for i in batch]
        assert [len(batch.ids) for batch in batches] == [4] * 9
    else:
        assert stream == [i for i in loader.subset.ids.tolist() if i not in bad]
    assert [i for batch in batches for i in colour_numbers(loader, batch)] == stream
    assert set(loader.quarantined) == bad
    assert all("cannot be decoded" in why for why in loader.quarantined.values())
    capfd.readouterr()  # nvImageCodec writes to stderr by itself


def test_more_than_allowed_is_one_sentence_with_the_remedy(own_flat: Manifest) -> None:
    train, _ = pair(own_flat, max_quarantined=0.1)  # of twelve: two
    train.quarantine({1: "a.jpg: missing"})
    train.quarantine({2: "b.jpg: missing"})
    with pytest.raises(
        QuarantineError,
        match=r"3 of 12 training images turned out unusable.*\(a.jpg: missing; b.jpg: missing; c.jpg: missing\), more "
        r"than the 2 that max_quarantined=0.1 allows.*index again, or give a higher",
    ):
        train.quarantine({3: "c.jpg: missing"})


def test_when_everything_is_gone_the_stream_says_so(own_flat: Manifest) -> None:
    train, _ = pair(own_flat)
    for number in train.subset.ids:
        file_of(own_flat, int(number)).unlink()
    with pytest.raises(QuarantineError, match=r"no usable file was found in 100 attempts.*missing.*bring them back"):
        first(train, 1)
    with pytest.raises(ManifestError, match="12 of 16 files checked"):
        pair(own_flat, max_quarantined=0.5)
    pair(own_flat, max_quarantined=0.75)


def test_a_batch_never_mixes_a_substitutes_pixels_with_anothers_target(own_flat: Manifest) -> None:
    train, _ = pair(own_flat)
    file_of(own_flat, int(train.subset.ids[2])).unlink()
    batch: Batch
    for batch in first(train, 12):
        assert colour_numbers(train, batch) == batch.ids.tolist()
