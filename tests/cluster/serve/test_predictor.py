"""Does `thawline.load(RUN).predict` say of the validation files what the run's own validation said of them?"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import thawline
from tests.cluster.run.test_tasks import job_of
from thawline.cluster.launch.launch import in_process
from thawline.cluster.serve.predictor import Predictor
from thawline.dataio.shapes import SETS
from thawline.dataio.table.manifest import Manifest

pytestmark = pytest.mark.slow  # trains a run of each task, once


class Trained:
    """A run, its validation files in the order of their rows, and what it says of them."""

    def __init__(self, folder: Path, task: str, engine: str) -> None:
        job = job_of(folder, task, data={"engine": engine}, fit={"epochs": 1})
        in_process(job)
        self.run = folder / "runs" / task
        self.manifest = Manifest.load(job.manifest)
        self.rows = pq.read_table(self.run / "valid.parquet").to_pylist()
        paths = dict(zip(*(self.manifest.rows[name].to_pylist() for name in ("id", "path")), strict=True))
        self.files = [Path(self.manifest.root, paths[row["id"]]) for row in self.rows]
        self.predictor: Predictor = thawline.load(self.run)


ENGINES = {"single_label": "dali", "multi_label": "reference"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Trained]]:
    """By task; one with DALI, which the others need not start."""
    folder = tmp_path_factory.mktemp("predict")
    trained = {task: Trained(folder, task, ENGINES.get(task, "reference")) for task in SETS}
    with ExitStack() as opened:
        for run in trained.values():
            opened.enter_context(run.predictor)
        yield trained


@pytest.mark.parametrize("task", ["single_label", "multi_label", "number"])
def test_what_is_predicted_is_what_validation_wrote(runs: dict[str, Trained], task: str) -> None:
    """Bitwise in validation's batches, to 1e-5 in others."""
    trained = runs[task]
    for batch, tolerance in ((10, 0.0), (3, 1e-5)):
        said = trained.predictor.predict(trained.files, batch=batch)
        assert [each.name for each in said] == [str(file) for file in trained.files]
        for each, row in zip(said, trained.rows, strict=True):
            if task == "number":
                assert each.prediction == pytest.approx(row["prediction"], rel=tolerance, abs=0)
                continue
            assert each.prediction == row["prediction"]
            assert each.probability == pytest.approx(row["probability"], rel=tolerance, abs=0)
            assert each.probability == max(each.probabilities.values())
            assert each.probabilities.keys() == set(trained.manifest.classes)
