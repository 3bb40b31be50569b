"""Does a file that DALI cannot read crash no process, and are DALI's warnings about a file kept from the console?"""

import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.kit.encoders import fax_tiff
from tests.kit.hostile import saved
from tests.kit.images import photo
from thawline.dataio.pixels import probe
from thawline.dataio.pixels.pictures import decode

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")

FATAL = """
import numpy as np, torch
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.dali import DaliEngine, decodable
from thawline.dataio.errors import EngineError
from thawline.dataio.pixels.spec import ImageSpec
from tests.kit.images import PLAIN, encode, make_work, photo, take_work

files = [encode(photo(96, 96, seed=i)) for i in range(64)]
files[7] = np.concatenate([np.zeros(64, np.uint8), files[7][64:]])
sizes_found = decodable(files)
print(sizes_found[:7] + sizes_found[8:] == [(96, 96)] * 63, sizes_found[7])

spec, sizes = ImageSpec(size_px=96, presize_px=96, **PLAIN), np.full(64, 96, np.int32)
work = make_work(files, geometry.centred(spec, widths=sizes, heights=sizes), size_px=96)
def engine():
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "threads": 2, "max_batch": 64}
    return DaliEngine(spec, **options)
def mend(work, reasons):
    print(reasons)
    return take_work(work, [i for i in range(64) if i not in reasons])
(batch,) = engine().run(iter([work]), mend)
print(batch.ids.tolist() == [i for i in range(64) if i != 7])
try:
    next(engine().run(iter([work])))
except EngineError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_file_that_no_codec_knows_crashes_no_process_however_large_its_batch() -> None:
    done = subprocess.run([sys.executable, "-c", FATAL], capture_output=True, text=True, timeout=200)
    why = "image7 cannot be decoded (it is no image): the batch cannot be made; remove or mend the file and index again"
    expected = ["True it begins like no format that DALI knows", str({7: why}), "True", why]
    assert (done.returncode, done.stdout.splitlines()) == (0, expected), done.stderr


def test_a_child_that_a_file_crashes_is_replaced_and_the_other_files_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [saved(photo(20, 10 + i, seed=i), "PNG") for i in range(4)]
    expected = [decode(np.frombuffer(file, np.uint8)) for file in files]
    decode_in_child, deadly = probe.Child.decode, files[2]

    def dying(child: probe.Child, encoded: list[bytes], pixels: list[Any]) -> list[probe.Decoded]:
        if deadly in encoded:
            os.kill(child.pid, signal.SIGSEGV)
        return decode_in_child(child, encoded, pixels)

    monkeypatch.setattr(probe.Child, "decode", dying)
    with probe.dali_decoder() as dali:
        assert dali is not None
        results = dali(files, expected)
    assert results[2] == "DALI crashed while decoding it"
    for i in (0, 1, 3):
        assert results[i] is expected[i]


def test_a_file_that_dali_warns_about_is_told_from_the_rest_of_its_batch(capfd: pytest.CaptureFixture[str]) -> None:
    bits = photo(32, 32)[..., 0] > 128
    files = [saved(bits, "PNG"), fax_tiff(bits, long=True), fax_tiff(bits, long=False), saved(bits, "BMP")]
    expected = [decode(np.frombuffer(file, np.uint8)) for file in files]
    with probe.dali_decoder() as dali:
        assert dali is not None
        results = dali(files, expected)
    assert [isinstance(result, str) for result in results] == [False, True, True, False]
    assert results[2] == "DALI warns about it on stderr"
    assert capfd.readouterr() == ("", "")
