"""How does Prometheus find the workers? In a file that it reads on the same machine, or at the driver of a run.

The file is for `file_sd_configs`, and is replaced when the workers change. `Directory` serves `http_sd_configs`, for a
Prometheus that has access neither to the workers' machines nor to the storage.

The exporters already label every series with run and rank. The same labels on the target would make
Prometheus rename the exporter's to exported_run and exported_rank (unless honor_labels is set), so the targets
carry them only as `__meta_thawline_*`: shown on Prometheus' service discovery page, usable in
relabel_configs, never part of a series. `job` is not set either: the scrape config names it.

Prometheus allows `*` only in the last component of a path, and refuses runs/*/targets.json in its configuration. So
the file lies beside the run's folder, not in it. Prometheus cannot read an object store either: for a run there the
file lies in a folder of the user who runs rank 0.
"""

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thawline.cluster.observe.http_server import HttpServer
from thawline.cluster.run.folder import write_text
from thawline.dataio.closing import Closing
from thawline.dataio.store.atomic import sweep
from thawline.dataio.store.private import cache_home
from thawline.dataio.store.root import Root

Entry = dict[str, Any]
"""One of Prometheus' target groups: {"targets": ["host:port"], "labels": {...}}."""


def targets_file(storage: str | Path, run: str) -> Path:
    """Where deploy/prometheus.yml looks for the workers of `run`: STORAGE/RUN.targets.json.

    Where the storage is a URI: ~/.cache/thawline/targets/RUN.targets.json, or the same below $XDG_CACHE_HOME.
    """
    if not Root.of(storage).remote:
        return Path(storage) / f"{run}.targets.json"
    return cache_home() / "thawline" / "targets" / f"{run}.targets.json"


def entries_of(run: str, endpoints: Sequence[str]) -> list[Entry]:
    """The targets of a run. endpoints: 'host:port' by rank."""
    return [
        {"targets": [endpoint], "labels": {"__meta_thawline_run": run, "__meta_thawline_rank": str(rank)}}
        for rank, endpoint in enumerate(endpoints)
    ]


def write_targets(file: str | Path, run: str, endpoints: Sequence[str]) -> None:
    """Replace the targets in `file` by these endpoints, 'host:port' by rank."""
    _replace(Path(file), json.dumps(entries_of(run, endpoints), indent=1))


def clear_targets(file: str | Path) -> None:
    """Replace the targets in `file` by none; Prometheus drops the old ones when it next reads it."""
    _replace(Path(file), "[]")


def _replace(file: Path, text: str) -> None:
    root = Root.of(file.parent)
    sweep(root, of=file.name)  # the sweep of the run's folder does not reach the file beside it
    write_text(root, file.name, text + "\n")  # its temporary name begins with a dot: no glob finds it


class Directory(Closing):
    """Serves the targets of a run at http://HOST:PORT/targets, for `http_sd_configs`, until `close`; none until `set`.

    On any free port if `port` is taken, or 0, so that two drivers on a machine have one each. `url` names an address
    that other machines can reach where `host` means all of them. No authentication: workers' addresses are no secret,
    and their `/metrics` has none either.

    Raises:
        OSError: `host` is not an address of this machine.
    """

    def __init__(self, host: str, port: int) -> None:
        self._body = b"[]"
        self._server = HttpServer(self._respond, host=host, port=port, name="thawline-targets")
        self.url = f"http://{reachable(host)}:{self._server.port}/targets"

    def set(self, entries: Sequence[Entry]) -> None:
        """Replace all targets by these: see `entries_of`."""
        self._body = json.dumps(list(entries), indent=1).encode()

    def close(self) -> None:
        """Stop serving and free the port; a second call does nothing."""
        self._server.close()

    def _respond(self, environ: Mapping[str, Any], begin: Callable[[str, list[tuple[str, str]]], Any]) -> list[bytes]:
        """The WSGI application: GET /targets."""
        if environ["REQUEST_METHOD"] != "GET" or environ["PATH_INFO"] != "/targets":
            begin("501 Not Implemented" if environ["REQUEST_METHOD"] != "GET" else "404 Not Found", [])
            return []
        begin("200 OK", [("Content-Type", "application/json")])  # the only type that Prometheus accepts
        return [self._body]


def reachable(host: str) -> str:
    """`host`, or the address of the default route where `host` means every address of the machine."""
    if host not in ("0.0.0.0", "::"):
        return f"[{host}]" if ":" in host else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved, nobody's (RFC 5737); connecting a UDP socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
