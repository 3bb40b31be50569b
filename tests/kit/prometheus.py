"""How do tests ask a real Prometheus? The shipped configuration, quickened, in a server on loopback."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def find(program: str) -> str:
    """prometheus or promtool; skips, or with THAWLINE_REQUIRE_PROMETHEUS=1 fails, where there is none."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        reason = f"no {program} here: `make prometheus` brings Debian's"
        if os.environ.get("THAWLINE_REQUIRE_PROMETHEUS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`promtool ARGUMENTS` to its end."""
    command = [find("promtool"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def settings(*, scrape_s: float = 1.0, directories: tuple[str, ...] = ()) -> dict[str, Any]:
    """deploy/prometheus.yml with quicker intervals; its example of http_sd for each of these addresses."""
    text = (DEPLOY / "prometheus.yml").read_text()
    stock: dict[str, Any] = yaml.safe_load(re.sub(r"^    # (?=http_sd_configs:|  )", "    ", text, flags=re.M))
    stock["global"] = dict.fromkeys(stock["global"], f"{round(1000 * scrape_s)}ms")
    (job,) = stock["scrape_configs"]
    (asked,) = job.pop("http_sd_configs")
    for source in (*job["file_sd_configs"], asked):
        source["refresh_interval"] = "1s"
    if directories:
        job["http_sd_configs"] = [asked | {"url": url} for url in directories]
    return stock


@contextmanager
def serving(folder: Path, stock: dict[str, Any]) -> Iterator[str]:
    """A Prometheus that stands in folder/deploy, so that it reads folder/runs/*.targets.json; its address."""
    program = find("prometheus")
    (folder / "deploy").mkdir()
    (folder / "deploy/prometheus.yml").write_text(yaml.safe_dump(stock))
    shutil.copy(DEPLOY / "rules.yml", folder / "deploy")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    server = subprocess.Popen(
        [
            *(program, f"--config.file={folder / 'deploy/prometheus.yml'}", f"--web.listen-address={address}"),
            *(f"--storage.tsdb.path={folder / 'tsdb'}", "--log.level=error"),
        ]
    )
    try:
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)


def ask(address: str, query: str, at: float | None = None) -> list[dict[str, Any]]:
    """What a query is at a time (unix seconds; None is now): one {"metric": labels, "value": [time, text]} a series."""
    words = {"query": query} | ({} if at is None else {"time": f"{at:.3f}"})
    with urllib.request.urlopen(f"http://{address}/api/v1/query?{urllib.parse.urlencode(words)}", timeout=10) as answer:
        rows: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return rows


def wait_for(address: str, query: str, *, series: int, timeout_s: float = 60) -> float:
    """Until a query has that many series; the time (unix seconds) at which it had."""
    until, seen = time.monotonic() + timeout_s, -1
    while seen != series:
        if time.monotonic() > until:
            raise AssertionError(f"{query} has {seen} series after {timeout_s:g} s, not {series}")
        try:
            at = time.time()
            seen = len(ask(address, query, at))
        except urllib.error.URLError:  # it has not come up
            seen = -1
        time.sleep(0.2)
    return at
