"""What does a worker tell Prometheus? One endpoint a worker; every series carries run and rank, nothing else.

The training loop adds to plain numbers; text is made only at a scrape, in the server's thread, where the GPU and the
loader are read, too. Rates and sums over ranks are left to PromQL:
`sum(rate(thawline_images_total[30s]))` is images a second.

A counter has one writer; two threads that add to the same one could lose a step.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from thawline.cluster.observe import gpus
from thawline.cluster.observe.discovery import reachable
from thawline.cluster.observe.http_server import HttpServer
from thawline.dataio.closing import Closing
from thawline.trainer.records.rows import metric_columns

BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
"""Upper edges of the histograms, in seconds: three a decade, for a factor rather than a percentage."""

_HISTOGRAMS = {
    "step_seconds": "Seconds that a step took, waiting for data left out",
    "data_wait_seconds": "Seconds that a step waited for its batch",
}
_COUNTERS = {
    "images": "Images this worker has trained on",
    "steps": "Optimiser steps",
    "busy_seconds": "Seconds that this worker was at work in steps before it waited for the others",
    "checkpoints": "Checkpoints committed",
    "checkpoint_seconds": "Seconds that writing checkpoints took, beside the training",
    "checkpoint_failures": "Checkpoints that the storage refused",
    "skipped_steps": "Steps that fp16 lost to a loss scaled too high",
    "restarts": "Times that this run's workers were started again",
}
_WATCHED = {
    "read": "Seconds that the making of batches waited for encoded files",
    "decode": "Seconds that the making of batches waited for decoding and warping",
    "finish": "Seconds that colours and normalisation took",
}
"""Names that `watch` may give -> help; others are shown under their own names."""
_GAUGES = {
    "loss": ("loss", "Training loss of the last logging window"),
    "lr": ("learning_rate", "Learning rate of the head"),
    "epoch": ("epoch", "Epochs, with their fraction"),
    "valid_loss": ("valid_loss", "Loss of the last validation"),
    "quarantined": ("quarantined_files", "Files that turned out unusable since the run began, over all workers"),
    "world_size": ("world_size", "Workers in this run"),
}
"""Column of a recorder's row -> gauge, help. Metrics of the validation are gauges under their own names."""
_GPU = {
    "gpu_memory_bytes": "Memory in use on this worker's GPU, by whomever",
    "gpu_utilisation_ratio": "Share of the last moments in which this worker's GPU ran a kernel",
    "jpeg_decoder_utilisation_ratio": "Share of the last moments in which the GPU's JPEG decoders worked",
}


class _Histogram:
    """Counts by bucket and their sum, as cheap as a list and a bisection."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """(upper edge as text, how many were at most that), the last "+Inf"."""
        return list(zip((*map(str, BUCKETS_S), "+Inf"), accumulate(self.counts.copy()), strict=True))


class Exporter(Closing, Collector):
    """A worker's counters and gauges behind http://`endpoint`/metrics, until `close`.

    `port` is used when free, any free port otherwise (0 asks for one). `endpoint` names an address that other
    machines can reach when `host` means every one. `restarts`: how often the run's workers were started again before.
    `gpu`: the index of this worker's CUDA device, None on a CPU.

    Raises:
        OSError: `host` is not an address of this machine.
    """

    def __init__(self, *, run: str, rank: int, host: str, port: int, restarts: int = 0, gpu: int | None = None) -> None:
        self._labels = [run, str(rank)]
        self._counters = dict.fromkeys(_COUNTERS, 0.0) | {"restarts": float(restarts)}
        self._step, self._data_wait = _Histogram(), _Histogram()
        self._times: Callable[[], Mapping[str, float]] = dict
        self._gpu = gpu
        self._gauges: dict[str, float] = {}
        registry = CollectorRegistry()
        registry.register(self)
        self._server = HttpServer(make_wsgi_app(registry), host=host, port=port, name="thawline-metrics")
        self.endpoint = f"{reachable(host)}:{self._server.port}"

    def step(self, images: int, step_s: float, data_wait_s: float) -> None:
        """Count one optimiser step over `images` images of this rank, in about a microsecond."""
        counters = self._counters
        counters["images"] += images
        counters["steps"] += 1
        self._step.add(step_s)
        self._data_wait.add(data_wait_s)

    def watch(self, times: Callable[[], Mapping[str, float]]) -> None:
        """Read cumulative seconds by name at every scrape: "decode" is shown as thawline_decode_seconds_total."""
        self._times = times

    def busy(self, *, busy_s: float) -> None:
        """Count the seconds that this rank was busy in a window's steps: see trainer.step.busy."""
        self._counters["busy_seconds"] += busy_s

    def observe(self, row: Mapping[str, object]) -> None:
        """Show the numbers of a recorder's row; other columns and empty cells change nothing."""
        seconds = row.get("checkpoint_s")
        if isinstance(seconds, float):
            self._counters["checkpoints"] += 1
            self._counters["checkpoint_seconds"] += seconds
        self._counters["checkpoint_failures"] += row.get("kind") == "checkpoint_failed"
        skipped = row.get("skipped")
        self._counters["skipped_steps"] += skipped if isinstance(skipped, int) else 0
        for column in (*_GAUGES, *metric_columns([row])):
            value = row.get(column)
            if isinstance(value, int | float) and not math.isnan(value):
                self._gauges[column] = float(value)

    def collect(self) -> Iterator[Metric]:
        """All series, for prometheus_client, at every scrape."""
        counters = {name: (text, self._counters[name]) for name, text in _COUNTERS.items()}
        for name, seconds in self._times().items():
            counters[f"{name}_seconds"] = (_WATCHED.get(name, f"Seconds that {name} took"), seconds)
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"thawline_{name}", text, labels=["run", "rank"])
            counter.add_metric(self._labels, value)
            yield counter
        for (name, text), histogram in zip(_HISTOGRAMS.items(), (self._step, self._data_wait), strict=True):
            family = HistogramMetricFamily(f"thawline_{name}", text, labels=["run", "rank"])
            family.add_metric(self._labels, histogram.buckets(), histogram.sum_s)
            yield family
        for name, (text, value) in self._all_gauges().items():
            gauge = GaugeMetricFamily(f"thawline_{name}", text, labels=["run", "rank"])
            gauge.add_metric(self._labels, value)
            yield gauge

    def _all_gauges(self) -> dict[str, tuple[str, float]]:
        """Name -> (help, value): the last numbers of rows, and those of the GPU now."""
        shown = {}
        for column, value in self._gauges.copy().items():
            own = (column, f"{column.replace('_', ' ').capitalize()} of the last validation")
            name, text = _GAUGES.get(column, own)
            shown[name] = (text, value)
        seen = gpus.read(self._gpu) if self._gpu is not None else None
        return shown | {name: (_GPU[name], value) for name, value in (seen or {}).items()}

    def close(self) -> None:
        """Stop serving and free the port; a second call does nothing."""
        self._server.close()
