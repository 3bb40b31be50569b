"""What does an endpoint tell Prometheus? Counts and seconds; the labels are the run, and of a request its status."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Telemetry:
    """The series of one endpoint. Any thread may add to them."""

    def __init__(self, run: str) -> None:
        self._registry = registry = CollectorRegistry()
        self._run = run

        def counter(name: str, text: str) -> Counter:
            return Counter(f"thawline_serve_{name}", text, ["run"], registry=registry).labels(run)

        self._requests = Counter(
            "thawline_serve_requests", "Requests by the status of their answer", ["run", "status"], registry=registry
        )
        self.images = counter("images", "Images that something was said of")
        self.refused = counter("refused_images", "Images that cannot be used")
        self.batches = counter("batches", "Batches that went through the model")
        self.swaps = counter("swaps", "Times that another bundle took over")
        self.queue_s = counter("queue_seconds", "Seconds that images waited, for decoding and for the model")
        self.decode_s = counter("decode_seconds", "Seconds that images were checked and decoded for")
        self.model_s = counter("model_seconds", "Seconds that batches were rendered and went through the model for")
        self.queue = Gauge("thawline_serve_queue", "Images under way", ["run"], registry=registry).labels(run)
        self._seconds = Histogram(
            "thawline_serve_request_seconds",
            "Seconds from a request's first bytes to its answer",
            ["run"],
            registry=registry,
            buckets=BUCKETS_S,
        ).labels(run)

    def answered(self, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(self._run, str(status)).inc()
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
