"""How does Prometheus find the workers? By a file that it reads on the same machine, or by asking the driver of a run.

The file is for `file_sd_configs`, replaced when the workers change. `Directory` answers `http_sd_configs`, for a
Prometheus that sees neither the workers' machines nor the storage.

The exporters already label every series with run and rank. The same labels on the target would make
Prometheus rename the exporter's to exported_run and exported_rank (unless honor_labels is set), so the targets
carry them only as `__meta_thawline_*`: seen on Prometheus' service discovery page, usable in
relabel_configs, never part of a series. Nor is `job` set: the reader's own scrape config names it.

Prometheus allows `*` in a path's last part only, so it refuses runs/*/targets.json in its configuration. The
file therefore lies beside the run's folder, not in it. Nor can it read an object store: a run there has its file in
a folder of the user who runs rank 0, wherever that was started from.
"""

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thawline.cluster.observe.answers import Answers
from thawline.cluster.run.folder import write_text
from thawline.dataio.closing import Closing
from thawline.dataio.store.atomic import sweep
from thawline.dataio.store.private import cache_home
from thawline.dataio.store.root import Root

Entry = dict[str, Any]
"""One of Prometheus' target groups: {"targets": ["host:port"], "labels": {...}}."""


def targets_file(storage: str | Path, run: str) -> Path:
    """Where deploy/prometheus.yml looks for the workers of `run`: STORAGE/RUN.targets.json.

    Of a storage that is a URI: ~/.cache/thawline/targets/RUN.targets.json, or the same below $XDG_CACHE_HOME.
    """
    if not Root.of(storage).remote:
        return Path(storage) / f"{run}.targets.json"
    return cache_home() / "thawline" / "targets" / f"{run}.targets.json"


def entries_of(run: str, endpoints: Sequence[str]) -> list[Entry]:
    """The targets of a run: `endpoints` are 'host:port', the rank-th for each rank."""
    return [
        {"targets": [endpoint], "labels": {"__meta_thawline_run": run, "__meta_thawline_rank": str(rank)}}
        for rank, endpoint in enumerate(endpoints)
    ]


def write_targets(file: str | Path, run: str, endpoints: Sequence[str]) -> None:
    """Announce `endpoints` ('host:port', the rank-th for each rank), in place of what `file` said before."""
    _replace(Path(file), json.dumps(entries_of(run, endpoints), indent=1))


def clear_targets(file: str | Path) -> None:
    """Announce nobody: an empty list drops the targets as soon as Prometheus looks."""
    _replace(Path(file), "[]")


def _replace(file: Path, text: str) -> None:
    root = Root.of(file.parent)
    sweep(root, of=file.name)  # it lies beside the run's folder, which is swept when a launch takes it
    write_text(root, file.name, text + "\n")  # its temporary name begins with a dot: no glob finds it


class Directory(Closing):
    """The targets of a run behind http://HOST:PORT/targets, for `http_sd_configs`; nobody until `set`, until `close`.

    `port` is used when free, any free port otherwise (0 asks for one), so that two drivers on a machine have one each.
    `url` names an address that other machines can reach when `host` means every one. Nothing is asked of who reads:
    what it tells is where workers answer, which `/metrics` itself does not hide.

    Raises:
        OSError: `host` is no address of this machine.
    """

    def __init__(self, host: str, port: int) -> None:
        self._body = b"[]"
        self._answers = Answers(self._answer, host=host, port=port, name="thawline-targets")
        self.url = f"http://{reachable(host)}:{self._answers.port}/targets"

    def set(self, entries: Sequence[Entry]) -> None:
        """Announce these, in place of what was announced before: see `entries_of`; an empty list drops all."""
        self._body = json.dumps(list(entries), indent=1).encode()

    def close(self) -> None:
        """Stop answering and free the port; a second call does nothing."""
        self._answers.close()

    def _answer(self, asked: Mapping[str, Any], begin: Callable[[str, list[tuple[str, str]]], Any]) -> list[bytes]:
        """WSGI's: what a GET of /targets is told."""
        if asked["REQUEST_METHOD"] != "GET" or asked["PATH_INFO"] != "/targets":
            begin("501 Not Implemented" if asked["REQUEST_METHOD"] != "GET" else "404 Not Found", [])
            return []
        begin("200 OK", [("Content-Type", "application/json")])  # Prometheus takes no other
        return [self._body]


def reachable(host: str) -> str:
    """`host`, or the address of the default route where `host` means every address of the machine."""
    if host not in ("0.0.0.0", "::"):
        return f"[{host}]" if ":" in host else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nobody's address (RFC 5737); for UDP, connecting sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
