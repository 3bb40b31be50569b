"""Are lines that cannot be printed dropped and counted, and does no message land where data go?"""

import subprocess
import sys
from pathlib import Path

import pytest

from thawline.cluster.observe.console import Console
from thawline.cluster.outputs import SafeStream, reason

TALKS = """
import sys
from thawline.cluster.outputs import safe_streams
with safe_streams():
    file = open(sys.argv[1], "w")
    for number in range(5000):
        print("talk", number, file=sys.stderr)
    print("datum é")
    file.write("the user's")
    file.close()
"""


def talk(tmp_path: Path, redirection: str, **env: str) -> "subprocess.CompletedProcess[bytes]":
    """TALKS under a shell's redirection: 5,000 lines of talk, one of data, and a file that is written meanwhile."""
    words = ["sh", "-c", f'exec "$0" -c "$1" "$2" {redirection}', sys.executable, TALKS, str(tmp_path / "file")]
    done = subprocess.run(words, capture_output=True, env={"PYTHONPATH": "", **env}, timeout=60)
    assert (tmp_path / "file").read_text() == "the user's", "an output took the file's number"
    return done


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "0<&- 2>&-"])
def test_talk_that_nobody_hears_ends_nothing_and_stays_off_stdout(tmp_path: Path, redirection: str) -> None:
    done = talk(tmp_path, redirection)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "datum é\n", b"")


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["1>&-", "1>/dev/full", "0<&- 1>&- 2>&-"])
def test_data_that_nobody_takes_ends_nothing(tmp_path: Path, redirection: str) -> None:
    done = talk(tmp_path, redirection)
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.slow
def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    assert talk(tmp_path, "", PYTHONIOENCODING="ascii").stdout == b"datum \\xe9\n"


def test_lines_that_could_not_be_printed_are_counted() -> None:
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115  # its close fails; by the line, as stderr is
    stream = SafeStream(full)
    console = Console(full)
    for _ in range(3):
        stream.write("a line\n")
        console.show([{"kind": "note", "text": "a line"}])
    stream.flush()
    assert stream.lost == console.lost == 3
    assert reason(stream.why) == "No space left on device"
    with pytest.raises(OSError, match="No space"):
        full.close()
    stream.write("to a closed file\n")
    assert stream.lost == 4
