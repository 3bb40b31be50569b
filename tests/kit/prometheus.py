"""How do tests query a real Prometheus? With the shipped configuration, at short intervals, on loopback."""

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
    """The path of prometheus or promtool; skips, or with THAWLINE_REQUIRE_PROMETHEUS=1 fails, without it."""
    beside = Path(sys.executable).with_name(program)
    path = str(beside) if beside.exists() else shutil.which(program)
    if path is None:
        reason = f"no {program} here: `make prometheus` installs Debian's"
        if os.environ.get("THAWLINE_REQUIRE_PROMETHEUS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`promtool ARGUMENTS` to its end."""
    command = [find("promtool"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def settings(*, scrape_s: float = 1.0, directories: tuple[str, ...] = ()) -> dict[str, Any]:
    """deploy/prometheus.yml with shorter intervals; its example of http_sd for each of these addresses."""
    text = (DEPLOY / "prometheus.yml").read_text()
    stock: dict[str, Any] = yaml.safe_load(re.sub(r"^    # (?=http_sd_configs:|  )", "    ", text, flags=re.M))
    stock["global"] = dict.fromkeys(stock["global"], f"{round(1000 * scrape_s)}ms")
    (job,) = stock["scrape_configs"]
    (http_sd,) = job.pop("http_sd_configs")
    for source in (*job["file_sd_configs"], http_sd):
        source["refresh_interval"] = "1s"
    if directories:
        job["http_sd_configs"] = [http_sd | {"url": url} for url in directories]
    return stock


@contextmanager
def serving(folder: Path, stock: dict[str, Any]) -> Iterator[str]:
    """Run Prometheus in folder/deploy, so that it reads folder/runs/*.targets.json; yield its address."""
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
    """A query's result at a time (unix seconds; None is now): {"metric": labels, "value": [time, text]} a series."""
    words = {"query": query} | ({} if at is None else {"time": f"{at:.3f}"})
    with urllib.request.urlopen(
        f"http://{address}/api/v1/query?{urllib.parse.urlencode(words)}", timeout=10
    ) as response:
        rows: list[dict[str, Any]] = json.load(response)["data"]["result"]
    return rows


def wait_for(address: str, query: str, *, series: int, timeout_s: float = 60) -> float:
    """Wait until a query has this many series; return when it had (unix seconds)."""
    until, count = time.monotonic() + timeout_s, -1
    while count != series:
        if time.monotonic() > until:
            raise AssertionError(f"{query} has {count} series after {timeout_s:g} s, not {series}")
        try:
            time_s = time.time()
            count = len(ask(address, query, time_s))
        except urllib.error.URLError:  # it has not started yet
            count = -1
        time.sleep(0.2)
    return time_s
