"""Does every panel of the dashboard show something? Its queries, asked of a real Prometheus that read two real runs."""

import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.nvml import Nvml, install
from tests.kit.prometheus import DEPLOY, ask, serving, settings, wait_for
from thawline.cluster.job import job as jobs
from thawline.cluster.job.job import Augment, Data, Fit, Job
from thawline.cluster.job.model import Model
from thawline.cluster.observe.discovery import Directory, targets_file
from thawline.cluster.observe.exporter import Exporter
from thawline.cluster.observe.settings import Metrics
from thawline.cluster.run import run as life
from thawline.cluster.run.folder import run_dir
from thawline.dataio.table.manifest import Manifest
from thawline.trainer.checkpoints.settings import CheckpointSettings
from thawline.trainer.context import LocalContext

BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/thawline.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{panel['title']}: {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}
BATCH = {"a": 8, "b": 12}
RATE_S = 5


# Its structure ---------------------------------------------------------------------------------------------


def test_a_link_to_the_dashboard_stays_and_runs_are_chosen_by_name() -> None:
    assert BOARD["uid"] == "thawline"
    assert "id" not in BOARD, "the number of one Grafana's database"
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert [(name, variable["type"]) for name, variable in variables.items()] == [
        ("datasource", "datasource"),
        ("run", "query"),
    ]
    assert variables["run"]["multi"]


def test_the_first_row_asks_whether_the_gpu_waits_and_for_what() -> None:
    first, *others = [panel for panel in BOARD["panels"] if panel["type"] == "row"]
    assert (first["title"], first["gridPos"]["y"]) == ("Is the GPU waiting, and for what?", 0)
    below = [panel["title"] for panel in PANELS if panel["gridPos"]["y"] < others[0]["gridPos"]["y"]]
    assert below[:2] == ["Waits for data", "Waits for the slowest rank"]


def test_panels_stand_beside_one_another_and_have_an_own_number() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_has_a_unit_words_and_queries_that_choose_the_source_and_the_run(panel: dict[str, Any]) -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["datasource"] == source
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
    for target in panel["targets"]:
        selectors = re.findall(r"thawline_\w+(\{.*?\})?", target["expr"])
        assert selectors
        assert set(selectors) == {'{run=~"$run"}'}
        assert target["datasource"] == source
        assert "{{run}}" in target["legendFormat"] or panel.get("repeat") == "run"


# Its queries -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A Prometheus, and when it had seen both runs for a while."""

    address: str
    at: float

    def ask(self, query: str, run: str = "(a|b)") -> dict[tuple[tuple[str, str], ...], float]:
        """Labels -> value, with Grafana's variables filled in."""
        filled = query.replace("$__rate_interval", f"{RATE_S}s").replace("$run", run)
        assert "$" not in filled
        rows = ask(self.address, filled, self.at)
        return {tuple(sorted(row["metric"].items())): float(row["value"][1]) for row in rows}


class OnAGpu(Exporter):
    """As on a machine with GPUs: each run has its own."""

    def __init__(self, *, run: str, **options: Any) -> None:
        super().__init__(run=run, **(options | {"gpu": list(BATCH).index(run)}))


def tiny(name: str, folder: Path) -> Job:
    """A run that goes on until it is stopped: a ResNet-18 on the few flat images."""
    return jobs.resolved(
        Job(
            name=name,
            manifest=str(folder / "flat.parquet"),
            storage=str(folder / {"a": "runs", "b": "elsewhere"}[name]),
            device="cpu",
            log_every=1,
            data=replace(Data(), size_px=32, presize_px=40, global_batch=BATCH[name], threads=1),
            augment=Augment(flip=False),
            model=replace(Model(), name="resnet18", weights="none"),
            fit=replace(Fit(), recipe="one_cycle", epochs=10_000, lr=1e-3),
            checkpoint=CheckpointSettings(every_s=2.0),
            metrics=replace(Metrics(), port=0),
        )
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, flat: Manifest) -> Iterator[Seen]:
    """Run "a" is found through its file, run "b" through a driver; both have ended when the tests ask."""
    folder = tmp_path_factory.mktemp("dashboard")
    flat.save(folder / "flat.parquet")
    made = [tiny(name, folder) for name in BATCH]
    contexts = [LocalContext(run_dir(job)) for job in made]
    with pytest.MonkeyPatch.context() as patch, Directory("127.0.0.1", 0) as directory, ThreadPoolExecutor(2) as pool:
        nvml = {f"GPU-{i}": {"memory_bytes": (i + 1) * 2**30, "gpu": 90 - i, "jpeg": 40 - i} for i in range(2)}
        install(patch, Nvml(nvml), uuids=("0", "1"))
        patch.setattr(life, "Exporter", OnAGpu)
        with serving(folder, settings(directories=(directory.url,))) as address:
            runs = [pool.submit(life.run, job, context) for job, context in zip(made, contexts, strict=True)]
            try:
                announced = targets_file(made[1].storage, "b")
                while not announced.exists() and not runs[1].done():
                    time.sleep(0.1)
                directory.set(json.loads(announced.read_text()))
                often = f"count_over_time(thawline_valid_loss[{RATE_S}s]) >= {RATE_S - 1}"
                at = wait_for(address, f"thawline_checkpoints_total > 0 and thawline_valid_loss and {often}", series=2)
            finally:
                for context in contexts:
                    context.request_stop()
                for run in runs:
                    assert run.result(timeout=60)["status"] == "stopped"
            yield Seen(address, at)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUERIES)
def test_a_query_has_data_of_each_run_and_none_of_another(seen: Seen, name: str) -> None:
    both = seen.ask(QUERIES[name])
    assert {dict(labels)["run"] for labels in both} == {"a", "b"}
    assert all(math.isfinite(value) for value in both.values())
    for run in ("a", "b"):
        assert seen.ask(QUERIES[name], run) == {labels: v for labels, v in both.items() if dict(labels)["run"] == run}


@pytest.mark.slow
def test_the_numbers_are_those_of_the_runs(seen: Seen) -> None:
    images, steps = seen.ask("thawline_images_total"), seen.ask("thawline_step_seconds_count")
    rank = {run: next(labels for labels in images if ("run", run) in labels) for run in BATCH}
    assert {("rank", "0")} == {pair for labels in rank.values() for pair in labels if pair[0] == "rank"}
    for run, batch in BATCH.items():
        count = sum(value for labels, value in steps.items() if ("run", run) in labels)
        assert images[rank[run]] == pytest.approx(batch * count, abs=batch)  # a scrape may fall into a step
    parts = next(panel for panel in PANELS if panel["title"].startswith("Where a second goes"))["targets"]
    whole = [sum(seen.ask(target["expr"], run).popitem()[1] for target in parts) for run in BATCH]
    assert whole == pytest.approx([1, 1], abs=0.3)  # a window's work is counted at its end, maybe not within these 5 s
    assert seen.ask(QUERIES["GPU in use: A"]) == {(("run", "a"),): 0.9, (("run", "b"),): 0.89}


@pytest.mark.slow
def test_the_variable_lists_the_runs(seen: Seen) -> None:
    (query,) = (each["query"]["query"] for each in BOARD["templating"]["list"] if each["name"] == "run")
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
    assert found
    words = urllib.parse.urlencode({"match[]": found[1]})
    with urllib.request.urlopen(f"http://{seen.address}/api/v1/label/{found[2]}/values?{words}", timeout=5) as answer:
        assert json.load(answer)["data"] == ["a", "b"]


@pytest.mark.slow
def test_what_the_rules_record_is_there_for_each_run(seen: Seen) -> None:
    groups = yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"]
    records = [rule["record"] for group in groups for rule in group["rules"] if "record" in rule]
    assert records
    for record in records:
        assert {dict(labels)["run"] for labels in seen.ask(record)} == {"a", "b"}, record
