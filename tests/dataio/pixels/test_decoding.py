"""Does a file that DALI cannot read end no process, and is what DALI says about a file heard by nobody?"""

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
answers = decodable(files)
print(answers[:7] + answers[8:] == [(96, 96)] * 63, answers[7])

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


def test_a_file_that_no_codec_knows_ends_no_process_however_large_its_batch() -> None:
    done = subprocess.run([sys.executable, "-c", FATAL], capture_output=True, text=True, timeout=200)
    why = "image7 cannot be decoded (it is no image): the batch cannot be made; remove or mend the file and index again"
    expected = ["True it begins like no format that DALI knows", str({7: why}), "True", why]
    assert (done.returncode, done.stdout.splitlines()) == (0, expected), done.stderr


def test_a_process_that_dies_over_a_file_is_replaced_and_the_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [saved(photo(20, 10 + i, seed=i), "PNG") for i in range(4)]
    shown = [decode(np.frombuffer(file, np.uint8)) for file in files]
    ask, deadly = probe.Child.ask, files[2]

    def dying(child: probe.Child, encoded: list[bytes], pixels: list[Any]) -> list[probe.Found]:
        if deadly in encoded:
            os.kill(child.pid, signal.SIGSEGV)
        return ask(child, encoded, pixels)

    monkeypatch.setattr(probe.Child, "ask", dying)
    with probe.dali() as dali:
        assert dali is not None
        found = dali(files, shown)
    assert found[2] == "DALI's process ended over it"
    for i in (0, 1, 3):
        assert found[i] is shown[i]


def test_what_dali_talks_about_is_told_from_the_rest_of_its_batch(capfd: pytest.CaptureFixture[str]) -> None:
    bits = photo(32, 32)[..., 0] > 128
    files = [saved(bits, "PNG"), fax_tiff(bits, long=True), fax_tiff(bits, long=False), saved(bits, "BMP")]
    shown = [decode(np.frombuffer(file, np.uint8)) for file in files]
    with probe.dali() as dali:
        assert dali is not None
        found = dali(files, shown)
    assert [isinstance(answer, str) for answer in found] == [False, True, True, False]
    assert found[2] == "DALI talks about it on stderr"
    assert capfd.readouterr() == ("", "")
