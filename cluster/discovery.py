"""How does Prometheus find the workers? A file for `file_sd_configs`, replaced when the workers change.

The exporters already label every series with run and rank. The same labels on the target would make
Prometheus rename the exporter's to exported_run and exported_rank (unless honor_labels is set), so the file
carries them only as `__meta_thawline_*`: seen on Prometheus' service discovery page, usable in
relabel_configs, never part of a series. Nor is `job` set: the reader's own scrape config names it.

Prometheus allows `*` in a path's last part only, so it refuses runs/*/targets.json in its configuration. The
file therefore lies beside the run's folder, not in it. Nor can it read an object store: a run there has its file in
a folder of the user who runs rank 0, wherever that was started from.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from cluster.storage import write_text
from dataio import files


def targets_file(storage: str | Path, run: str) -> Path:
    """Where deploy/prometheus.yml looks for the workers of `run`: STORAGE/RUN.targets.json.

    Of a storage that is a URI: ~/.cache/thawline/targets/RUN.targets.json, or the same below $XDG_CACHE_HOME.
    """
    if not files.is_remote(str(storage)):
        return Path(storage) / f"{run}.targets.json"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "thawline" / "targets" / f"{run}.targets.json"


def write_targets(file: str | Path, run: str, endpoints: Sequence[str]) -> None:
    """Announce `endpoints` ('host:port', the rank-th for each rank), in place of what `file` said before."""
    entries = [
        {"targets": [endpoint], "labels": {"__meta_thawline_run": run, "__meta_thawline_rank": str(rank)}}
        for rank, endpoint in enumerate(endpoints)
    ]
    _replace(Path(file), json.dumps(entries, indent=1))


def clear_targets(file: str | Path) -> None:
    """Announce nobody: an empty list drops the targets as soon as Prometheus looks."""
    _replace(Path(file), "[]")


def _replace(file: Path, text: str) -> None:
    write_text(str(file.parent), file.name, text + "\n")  # its temporary name begins with a dot: no glob finds it
