"""Does a scrape over HTTP show what the worker counted, and does discovery point at it?"""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cluster.discovery import clear_targets, targets_file, write_targets
from cluster.exporter import Exporter

LINE = re.compile(r"(\w+)\{(.*)\} (\S+)")


def scrape(endpoint: str) -> dict[str, tuple[str, float]]:
    """Metric -> (labels, value), as Prometheus would read them."""
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    matches = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    return {match[1]: (match[2], float(match[3])) for match in matches if match}


def test_a_scrape_shows_the_sums_of_what_was_counted() -> None:
    with Exporter(run="pets", rank=1, host="127.0.0.1", port=0) as exporter:
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
    assert {labels for labels, _ in seen.values()} == {'rank="1",run="pets"'}
    assert {name: value for name, (_, value) in seen.items()} == {
        "thawline_images_total": 256,
        "thawline_steps_total": 8,
        "thawline_step_seconds_total": 2.0,
        "thawline_data_wait_seconds_total": 1.0,
        "thawline_busy_seconds_total": 0.5,
        "thawline_checkpoints_total": 1,
        "thawline_checkpoint_failures_total": 1,
        "thawline_skipped_steps_total": 2,
        "thawline_checkpoint_seconds_total": 1.5,
        "thawline_loss": 0.5,
        "thawline_learning_rate": 1e-3,
        "thawline_epoch": 2,
        "thawline_world_size": 2,
        "thawline_quarantined_files": 3,
    }


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
    gauges = {name: value for name, (_, value) in seen.items() if not name.endswith("_total")}
    expected = {"epoch": 2.0, "valid_loss": 0.5, "error_rate": 0.125, "f_beta_beta_2": 0.5}
    assert gauges == {f"thawline_{name}": value for name, value in expected.items()}


def test_counters_stand_at_zero_before_the_first_step_and_gauges_are_absent() -> None:
    with Exporter(run="pets", rank=0, host="127.0.0.1", port=0) as exporter:
        seen = scrape(exporter.endpoint)
    assert len(seen) == 9
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


def test_the_discovery_file_names_every_rank_and_clashes_with_no_label_of_a_series(tmp_path: Path) -> None:
    file = targets_file(tmp_path / "runs", "pets")
    write_targets(file, "pets", ["old:1", "old:2", "old:3"])
    write_targets(file, "pets", ["a:9400", "b:9401"])
    entries = json.loads(file.read_text())
    assert [entry["targets"] for entry in entries] == [["a:9400"], ["b:9401"]]
    assert all(label.startswith("__meta_") for entry in entries for label in entry["labels"])
    clear_targets(file)
    assert json.loads(file.read_text()) == []
    assert list(file.parent.iterdir()) == [file]


def test_the_shipped_configuration_finds_the_file_beside_the_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "deploy" / "prometheus.yml").read_text()
    (pattern,) = re.findall(r'files: \["(.*)"\]', text)
    assert re.fullmatch(r"[^*]*(\*[^/]*)?\.json", pattern)  # Prometheus takes * in the last part only
    write_targets(targets_file(tmp_path / "runs", "pets"), "pets", ["a:9400"])
    (tmp_path / "deploy").mkdir()
    assert len([*(tmp_path / "deploy").glob(pattern)]) == 1
