"""Do the shipped rules fire when they should and only then, and would a mistake in them be seen?"""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.observe.test_exporter import names_of_a_run
from tests.kit.prometheus import DEPLOY, promtool

pytestmark = pytest.mark.slow  # promtool is a process
MISTAKES = {
    "images of one rank only": ("sum by (run) (rate(thawline_images", "max by (run) (rate(thawline_images"),
    "steps of all ranks": ("max by (run) (rate(thawline_steps", "sum by (run) (rate(thawline_steps"),
    "the worst rank's wait": ("avg by (run) (rate(thawline_data", "max by (run) (rate(thawline_data"),
    "the slowest of all runs": ("max by (run) (rank:thawline_busy", "max (rank:thawline_busy"),
    "stalled, also before the first step": (" and on (run) max by (run) (thawline_steps_total) > 0", ""),
    "stalled by a validation": ("for: 5m", "for: 1m"),
    "never stalled": ("run:thawline_steps:rate5m == 0", "run:thawline_steps:rate5m < 0"),
    "not started, too soon": ("for: 30m", "for: 20m"),
    "others' workers": ('{job=~".*thawline.*"}', ""),
    "a worker that restarts": ("for: 2m", "for: 1m"),
    "bound too soon": ("> 0.25", "> 0.15"),
    "bound too late": ("> 0.25", "> 0.35"),
    "a straggler against the slowest": (
        "group_left () (quantile by (run) (0.5, rank:thawline_busy:ratio_rate5m) > 0)",
        "group_left () (quantile by (run) (1, rank:thawline_busy:ratio_rate5m) > 0)",
    ),
    "everyone a straggler": ("> 1.2", "> 1.0"),
    "a straggler without its rank": ("by (run, rank) (rate(thawline_busy", "by (run) (rate(thawline_busy"),
    "checkpoints never failing": ("checkpoint_failures_total[10m]", "checkpoint_failures_total[10s]"),
    "checkpoints failing for ever": (
        "increase(thawline_checkpoint_failures_total[10m])",
        "thawline_checkpoint_failures_total",
    ),
    "another severity": ("severity: critical", "severity: warning"),
}


def rules() -> list[dict[str, Any]]:
    """All rules, those that record and those that alert."""
    loaded = yaml.safe_load((DEPLOY / "rules.yml").read_text())
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    """The alerting ones."""
    return [rule for rule in rules() if "alert" in rule]


@pytest.mark.parametrize("file", sorted(file.name for file in DEPLOY.glob("*prometheus.yml")))
def test_prometheus_takes_the_configuration_and_the_rules(file: str) -> None:
    checked = promtool("check", "config", DEPLOY / file)
    assert checked.returncode == 0, checked.stderr
    assert f"SUCCESS: {len(rules())} rules found" in checked.stdout


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    tested = promtool("test", "rules", DEPLOY / "rules.test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    said = (DEPLOY / "rules.test.yml").read_text()
    assert {rule["alert"] for rule in alerts()} == set(re.findall(r'alertname="(\w+)"', said))
    assert all(f"expr: {rule['record']}\n" in said for rule in rules() if rule.get("record", "").startswith("run:"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(tmp_path: Path, mistake: str) -> None:
    right, wrong = MISTAKES[mistake]
    text = (DEPLOY / "rules.yml").read_text()
    assert right in text
    (tmp_path / "rules.yml").write_text(text.replace(right, wrong))
    shutil.copy(DEPLOY / "rules.test.yml", tmp_path)
    tested = promtool("test", "rules", tmp_path / "rules.test.yml")
    assert tested.returncode == 1
    assert "FAILED" in tested.stdout + tested.stderr


def test_an_alert_says_how_bad_it_is_and_what_helps() -> None:
    said = " ".join((DEPLOY / "rules.test.yml").read_text().split())
    labels = {
        found[1]: re.findall(r"(\w+)=", found[0]) for found in re.finditer(r'ALERTS\{alertname="(\w+)"[^}]*\}', said)
    }
    for rule in alerts():
        summary, description = rule["annotations"]["summary"], rule["annotations"]["description"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["for"]
        assert "{{ $labels." in summary
        assert set(re.findall(r"\$labels\.(\w+)", summary + description)) <= set(labels[rule["alert"]])
        assert len(description) > 100


def test_every_series_that_the_rules_read_is_one_that_a_worker_has() -> None:
    made = names_of_a_run() | {rule["record"] for rule in rules() if "record" in rule} | {"up"}
    for rule in rules():
        read = set(re.findall(r"\b(?:\w+:thawline_[\w:]+|thawline_\w+|up\b)", re.sub(r"\{.*?\}", "", rule["expr"])))
        assert read, rule
        assert read <= made, rule
