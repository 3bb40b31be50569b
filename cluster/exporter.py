"""What does a worker tell Prometheus? One endpoint a worker; every series carries run and rank, nothing else.

The training loop adds to plain numbers; text is made only when somebody scrapes, in the server's own thread.
Rates and sums over ranks are left to PromQL: `sum(rate(thawline_images_total[30s]))` is images a second.

A counter has one writer; two threads that add to the same one could lose a step.
"""

import math
import socket
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trainer.recorder import metric_names

_COUNTERS = {
    "images": "Images this worker has trained on",
    "steps": "Optimiser steps",
    "step_seconds": "Seconds spent in steps, waiting for data left out",
    "data_wait_seconds": "Seconds that steps waited for their batch",
    "busy_seconds": "Seconds that this worker was at work in steps before it waited for the others",
    "checkpoints": "Checkpoints committed",
    "checkpoint_seconds": "Seconds that writing checkpoints took, beside the training",
    "checkpoint_failures": "Checkpoints that the storage refused",
    "skipped_steps": "Steps that fp16 lost to a loss scaled too high",
}
_GAUGES = {
    "loss": ("loss", "Training loss of the last logging window"),
    "lr": ("learning_rate", "Learning rate of the head"),
    "epoch": ("epoch", "Epochs, with their fraction"),
    "valid_loss": ("valid_loss", "Loss of the last validation"),
    "quarantined": ("quarantined_files", "Files that turned out unusable since the run began, over all workers"),
    "world_size": ("world_size", "Workers in this run"),
}
"""Column of a recorder's row -> the gauge that shows it; a validation's metrics come besides, under their own names."""


class Exporter(Collector):
    """A worker's counters and gauges behind http://`endpoint`/metrics, until `close`.

    `port` is used when free, any free port otherwise (0 asks for one). `endpoint` names an address that other
    machines can reach when `host` means every one.

    Raises:
        OSError: `host` is no address of this machine.
    """

    def __init__(self, *, run: str, rank: int, host: str, port: int) -> None:
        self._labels = [run, str(rank)]
        self._counters = dict.fromkeys(_COUNTERS, 0.0)
        self._gauges: dict[str, float] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError):  # taken, or beyond 65535
            self._server, self._thread = start_http_server(0, addr=host, registry=registry)
        self.endpoint = f"{_reachable(host)}:{self._server.server_port}"

    def step(self, images: int, step_s: float, data_wait_s: float) -> None:
        """Count one optimiser step over `images` images of this rank, in less than a microsecond."""
        counters = self._counters
        counters["images"] += images
        counters["steps"] += 1
        counters["step_seconds"] += step_s
        counters["data_wait_seconds"] += data_wait_s

    def busy(self, *, busy_s: float) -> None:
        """Count what a window's steps took this rank: see trainer.busy."""
        self._counters["busy_seconds"] += busy_s

    def observe(self, row: Mapping[str, float | int | str | None]) -> None:
        """Show the numbers of a recorder's row; other columns and empty cells change nothing."""
        seconds = row.get("checkpoint_s")
        if isinstance(seconds, float):
            self._counters["checkpoints"] += 1
            self._counters["checkpoint_seconds"] += seconds
        self._counters["checkpoint_failures"] += row.get("kind") == "checkpoint_failed"
        self._counters["skipped_steps"] += int(row.get("skipped") or 0)
        for column in (*_GAUGES, *metric_names([row])):
            value = row.get(column)
            if isinstance(value, int | float) and not math.isnan(value):
                self._gauges[column] = float(value)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at every scrape."""
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"thawline_{name}", text, labels=["run", "rank"])
            counter.add_metric(self._labels, self._counters[name])
            yield counter
        for column, value in self._gauges.copy().items():
            name, text = _GAUGES.get(
                column, (column, f"{column.replace('_', ' ').capitalize()} of the last validation")
            )
            gauge = GaugeMetricFamily(f"thawline_{name}", text, labels=["run", "rank"])
            gauge.add_metric(self._labels, value)
            yield gauge

    def close(self) -> None:
        """Stop serving and free the port; a second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reachable(host: str) -> str:
    """`host`, or the address of the default route where `host` means every address of the machine."""
    if host not in ("0.0.0.0", "::"):
        return f"[{host}]" if ":" in host else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nobody's address (RFC 5737); for UDP, connecting sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
