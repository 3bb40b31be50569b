"""Does a scrape over HTTP show what the worker counted?"""

import re
import socket
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.kit.nvml import Nvml, install
from thawline.cluster.observe.exporter import BUCKETS_S, Exporter

LINE = re.compile(r"(\w+)\{(.*)\} (\S+)")


def read(endpoint: str) -> str:
    """What /metrics answers."""
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def scrape(endpoint: str) -> dict[str, tuple[str, float]]:
    """Metric -> (labels, value), as Prometheus would read them; of histograms sum and count."""
    lines = [line for line in read(endpoint).splitlines() if not line.startswith("#") and "_bucket{" not in line]
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches)
    return {match[1]: (match[2], float(match[3])) for match in matches if match}


def names_of_a_run() -> set[str]:
    """Every series that a worker with a GPU has once it has trained, validated and kept a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, Nvml({"GPU-0a-1b": {"memory_bytes": 1, "gpu": 1, "jpeg": 1}}))
        with Exporter(run="a", rank=0, host="127.0.0.1", port=0, gpu=0) as exporter:
            exporter.watch(lambda: {"read": 0.0, "decode": 0.0, "finish": 0.0})
            exporter.observe(
                {"loss": 1.0, "lr": 1.0, "epoch": 1.0, "valid_loss": 1.0, "quarantined": 0, "world_size": 1}
            )
            return set(re.findall(r"^(thawline_\w+)", read(exporter.endpoint), re.M))


def test_a_scrape_shows_the_sums_of_what_was_counted() -> None:
    with Exporter(run="pets", rank=1, host="127.0.0.1", port=0, restarts=3) as exporter:
        for _ in range(8):
            exporter.step(images=32, step_s=0.25, data_wait_s=0.125)
        exporter.busy(busy_s=0.5)
        exporter.observe({"checkpoint_s": 1.5})
        exporter.observe({"kind": "checkpoint_failed"})
        exporter.observe({"kind": "train", "skipped": 2})
        exporter.observe({"loss": 0.5, "lr": 3e-3, "epoch": 2, "error_rate": None, "world_size": 2, "kind": "train"})
        exporter.observe({"loss": None, "error_rate": float("nan"), "lr": 1e-3})
        exporter.observe({"kind": "quarantine", "id": 17, "reason": "a.jpg: missing", "quarantined": 3})
        seen = scrape(exporter.endpoint)
    assert {labels for labels, _ in seen.values()} == {'rank="1",run="pets"'}, "run and rank only"
    assert {name: value for name, (_, value) in seen.items()} == {
        "thawline_images_total": 256,
        "thawline_steps_total": 8,
        "thawline_step_seconds_sum": 2.0,
        "thawline_step_seconds_count": 8,
        "thawline_data_wait_seconds_sum": 1.0,
        "thawline_data_wait_seconds_count": 8,
        "thawline_busy_seconds_total": 0.5,
        "thawline_checkpoints_total": 1,
        "thawline_checkpoint_failures_total": 1,
        "thawline_skipped_steps_total": 2,
        "thawline_restarts_total": 3,
        "thawline_checkpoint_seconds_total": 1.5,
        "thawline_loss": 0.5,
        "thawline_learning_rate": 1e-3,
        "thawline_epoch": 2,
        "thawline_world_size": 2,
        "thawline_quarantined_files": 3,
    }


def test_the_histograms_count_each_step_in_the_buckets_that_it_fits_into() -> None:
    steps = [0.0, 0.0005, 0.001, 0.0011, 0.3, 0.5, 59.0, 60.0, 61.0]
    waits = [2.0, 3.0] + [0.0] * 7
    with Exporter(run="pets", rank=0, host="127.0.0.1", port=0) as exporter:
        for step_s, data_wait_s in zip(steps, waits, strict=True):
            exporter.step(images=1, step_s=step_s, data_wait_s=data_wait_s)
        families = {family.name: family for family in text_string_to_metric_families(read(exporter.endpoint))}
    for name, values in (("step", steps), ("data_wait", waits)):
        family = families[f"thawline_{name}_seconds"]
        assert family.type == "histogram"
        buckets = [sample for sample in family.samples if sample.name.endswith("_bucket")]
        edges = [float(sample.labels["le"]) for sample in buckets]
        assert edges == [*BUCKETS_S, float("inf")]
        assert [sample.value for sample in buckets] == [sum(value <= edge for value in values) for edge in edges]
    assert (BUCKETS_S[0], BUCKETS_S[-1]) == (0.001, 60)


def test_watched_seconds_are_asked_for_at_scrapes_alone() -> None:
    asked, seconds = [0], {"decode": 2.5, "finish": 0.5}

    def times() -> dict[str, float]:
        asked[0] += 1
        return seconds

    with Exporter(run="pets", rank=0, host="127.0.0.1", port=0) as exporter:
        assert "thawline_decode_seconds_total" not in scrape(exporter.endpoint)
        exporter.watch(times)
        for _ in range(5):
            exporter.step(images=32, step_s=0.25, data_wait_s=0.125)
        assert asked == [0]
        assert scrape(exporter.endpoint)["thawline_decode_seconds_total"] == ('rank="0",run="pets"', 2.5)
        seconds["decode"] = 3.0
        seen = scrape(exporter.endpoint)
    assert (seen["thawline_decode_seconds_total"][1], seen["thawline_finish_seconds_total"][1]) == (3.0, 0.5)
    assert asked == [2]


def test_the_gpu_of_the_worker_is_told_of_at_scrapes_and_a_cpu_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    idle: dict[str, int | None] = {"memory_bytes": 0, "gpu": 0, "jpeg": 0}
    nvml = Nvml({"GPU-0": idle, "GPU-1": {"memory_bytes": 2**30, "gpu": 90, "jpeg": None}})
    install(monkeypatch, nvml, uuids=("0", "1"))
    with Exporter(run="pets", rank=0, host="127.0.0.1", port=0) as exporter:
        assert not any("gpu" in name for name in scrape(exporter.endpoint))
    with Exporter(run="pets", rank=0, host="127.0.0.1", port=0, gpu=1) as exporter:
        assert nvml.opened == 0
        seen = scrape(exporter.endpoint)
        assert seen["thawline_gpu_utilisation_ratio"] == ('rank="0",run="pets"', 0.9)
        assert seen["thawline_gpu_memory_bytes"][1] == 2**30
        assert "thawline_jpeg_decoder_utilisation_ratio" not in seen
        nvml.devices.clear()
        nvml.devices["GPU-1"] = {"memory_bytes": None, "gpu": None, "jpeg": None}
        assert not any("gpu" in name for name in scrape(exporter.endpoint)), (
            "no value is kept that is not true any more"
        )


def test_half_requests_take_few_of_the_processs_files_and_keep_nobody_from_reading() -> None:
    with Exporter(run="pets", rank=0, host="127.0.0.1", port=0) as exporter, ExitStack() as stack:
        host, port = exporter.endpoint.split(":")
        before = psutil.Process().num_fds()
        for _ in range(100):
            half = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            half.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
        assert "thawline_steps_total" in scrape(exporter.endpoint)
        held = psutil.Process().num_fds() - before - 100  # those of this test's side
        assert held < 50


def test_every_metric_of_a_validation_gets_a_gauge_of_its_own() -> None:
    row: dict[str, Any] = {
        "kind": "valid",
        "step": 8,
        "epoch": 2.0,
        "train_loss": 0.7,
        "valid_loss": 0.5,
        "valid_s": 3.0,
    }
    with Exporter(run="pets", rank=0, host="127.0.0.1", port=0) as exporter:
        exporter.observe({**row, "error_rate": 0.25, "f_beta_beta_2": 0.5})
        exporter.observe({**row, "error_rate": 0.125, "f_beta_beta_2": float("nan")})
        seen = scrape(exporter.endpoint)
    gauges = {name: value for name, (_, value) in seen.items() if not name.endswith(("_total", "_sum", "_count"))}
    expected = {"epoch": 2.0, "valid_loss": 0.5, "error_rate": 0.125, "f_beta_beta_2": 0.5}
    assert gauges == {f"thawline_{name}": value for name, value in expected.items()}


def test_counters_stand_at_zero_before_the_first_step_and_gauges_are_absent() -> None:
    with Exporter(run="pets", rank=0, host="127.0.0.1", port=0) as exporter:
        seen = scrape(exporter.endpoint)
    assert len(seen) == 12
    assert {value for _, value in seen.values()} == {0}


def test_two_exporters_take_two_ports_and_do_not_mix() -> None:
    with Exporter(run="a", rank=0, host="127.0.0.1", port=0) as first:
        port = int(first.endpoint.rpartition(":")[2])
        with Exporter(run="b", rank=1, host="127.0.0.1", port=port) as second:
            first.step(images=3, step_s=1, data_wait_s=0)
            second.step(images=5, step_s=1, data_wait_s=0)
            assert scrape(first.endpoint)["thawline_images_total"] == ('rank="0",run="a"', 3)
            assert scrape(second.endpoint)["thawline_images_total"] == ('rank="1",run="b"', 5)


def test_a_port_beyond_the_last_one_falls_back_to_a_free_one() -> None:
    with Exporter(run="a", rank=0, host="127.0.0.1", port=65536) as exporter:
        assert scrape(exporter.endpoint)["thawline_steps_total"][1] == 0


def test_close_frees_the_port() -> None:
    exporter = Exporter(run="a", rank=0, host="127.0.0.1", port=0)
    exporter.close()
    exporter.close()
    with pytest.raises(urllib.error.URLError):
        scrape(exporter.endpoint)
    with Exporter(run="a", rank=0, host="127.0.0.1", port=int(exporter.endpoint.rpartition(":")[2])) as again:
        assert again.endpoint == exporter.endpoint


def test_an_exporter_on_every_address_names_one_that_answers() -> None:
    with Exporter(run="a", rank=0, host="0.0.0.0", port=0) as exporter:
        assert not exporter.endpoint.startswith("0.0.0.0")
        assert scrape(exporter.endpoint)["thawline_steps_total"][1] == 0
