"""How do weights come over the network? Each file once for a machine, checked, into torch hub's cache.

The Hub's own client does this for timm's networks; here is what torchvision's and a user's addresses need.
"""

import contextlib
import fcntl
import hashlib
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import torch

from thawline.models.errors import WeightsError

CONNECT_TIMEOUT_S = 5.0
"""How long a download may stand still; torch itself would wait for ever."""
_SUM = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
"""In a file's name, as torch hub has it: the beginning of its SHA-256."""


def is_url(weights: str | Path) -> bool:
    """Whether weights are an address that `fetch` takes."""
    return str(weights).startswith(("https://", "http://"))


def cache() -> Path:
    """Torch hub's folder for weights, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(url: str) -> Path:
    """The file at an address, downloaded unless it is in the cache already.

    Where the address ends with `#sha256=...`, or the file's name with the beginning of it as torch hub's do, the file
    must be so. Raises WeightsError within seconds when offline, on an HTTP error or a wrong checksum.
    """
    address, _, wanted = url.partition("#sha256=")
    name = Path(urlsplit(address).path).name or "weights"
    wanted = wanted.lower() or (found[1] if (found := _SUM.search(name)) else "")
    folder = cache() / f"url-{hashlib.sha256(address.encode()).hexdigest()[:16]}"
    file = folder / name
    try:
        with alone(folder), network_timeout():
            if not _is_whole(file, wanted):
                _download(address, file, wanted)
    except Exception as error:  # the network, the disk, the checksum
        raise WeightsError(
            f"{url} could not be fetched ({error}): no weights to start from; check the address, or put the file on "
            'this machine and give model.weights = "FILE"'
        ) from error
    return file


def _download(address: str, file: Path, wanted: str) -> None:
    torch.hub.download_url_to_file(address, str(file), hash_prefix=wanted or None, progress=sys.stderr.isatty())
    _sum_of(file).write_text(_sha256(file), encoding="ascii")


def _is_whole(file: Path, wanted: str) -> bool:
    """Whether the file is there as it was downloaded, and as it is wanted."""
    if not (file.is_file() and _sum_of(file).is_file()):
        return False
    found = _sha256(file)
    return found == _sum_of(file).read_text(encoding="ascii") and found.startswith(wanted)


def _sum_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder of this machine: other ranks that want the same file wait, and then find it."""
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(folder.with_name(f".{folder.name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file closes, also by a kill
        except OSError:
            pass  # a cache that others fill may be read alone
        yield


@contextlib.contextmanager
def network_timeout() -> Iterator[None]:
    """Within it, a connection that stands still ends."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_TIMEOUT_S if before is None else before)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
