"""The kill tests themselves: do a few of them hold, and would they notice if one did not? Many: campaigns.kills."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.campaigns.kills import Campaign, Hit, Trial, differences, leftovers, verdict
from tests.kit.moments import KINDS, PARTS, Kill
from thawline.trainer.checkpoints import checkpoint


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("kills"), seed=3)


@pytest.mark.slow
def test_a_run_killed_in_each_kind_of_moment_ends_as_the_unbroken_one(campaign: Campaign) -> None:
    trials = [campaign.trial(number) for number in range(len(KINDS))]
    assert verdict(trials) == []
    assert {trial.kind for trial in trials} == {*KINDS}
    for trial in trials:
        assert trial.hits[0].kill.kind == trial.kind
        assert trial.hits[0].inside
        assert trial.hits[0].resumed <= trial.hits[0].steps


def spoil_result(run: Path, **values: Any) -> None:
    file = run / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def spoil_table(file: Path, column: str) -> None:
    """The last number of a column becomes the next float after it."""
    table = pq.read_table(file)
    values = table[column].to_pylist()
    at = max(i for i, value in enumerate(values) if value is not None)
    values[at] = float(torch.nextafter(torch.tensor(values[at], dtype=torch.float64), torch.tensor(9.0).double()))
    changed = pa.array(values, type=pa.float64())
    pq.write_table(table.set_column(table.column_names.index(column), column, changed), file)


def spoil_weights(run: Path, part: str) -> None:
    """A single bit of a single weight, in a checkpoint that is whole in every other way."""
    saved, _ = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    parts = {name: saved.load(name) for name in saved.parts}
    weights = next(iter(parts[part].values())).view(torch.int32)
    weights[(0,) * weights.ndim] ^= 1
    checkpoint.save(run / "checkpoints", saved.step, parts, keep=3)


SPOILED: dict[str, Callable[[Path], None]] = {
    "stream_hash is ": lambda run: spoil_result(run, stream_hash="00"),
    "samples_seen is ": lambda run: spoil_result(run, samples_seen=1),
    "another row: ": lambda run: spoil_table(run / "rows.parquet", "loss"),
    "other predictions": lambda run: spoil_table(run / "valid.parquet", "loss"),
    "other weights in model.pt": lambda run: spoil_weights(run, "model"),
    "other weights in ema.pt": lambda run: spoil_weights(run, "ema"),
}


@pytest.mark.slow
@pytest.mark.parametrize("told", SPOILED)
def test_the_smallest_difference_is_seen(campaign: Campaign, tmp_path: Path, told: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(campaign.unbroken, run)
    assert differences(campaign.unbroken, run) == []
    assert leftovers(run) == ""
    SPOILED[told](run)
    assert any(text.startswith(told) for text in differences(campaign.unbroken, run))


@pytest.mark.slow
def test_what_an_unfinished_checkpoint_leaves_is_seen(campaign: Campaign, tmp_path: Path) -> None:
    folder = shutil.copytree(campaign.unbroken / "checkpoints", tmp_path / "checkpoints") / "step_00000001"
    folder.mkdir()
    (folder / "model.pt").touch()
    assert leftovers(tmp_path) == "left behind: {'step_00000001': ['model.pt']}"


def struck(kind: str, *, inside: bool = True, unfinished: dict[str, set[str]] | None = None) -> Trial:
    kill = Kill(kind, KINDS[kind][0], 1, 0.1)
    left = {"step_00000003": {*PARTS}} if unfinished is None else unfinished
    return Trial(0, kind, True, [Hit(kill, inside, steps=4, resumed=3, unfinished=left)], [])


def test_kills_that_miss_their_moment_fail_the_command_though_every_run_came_out_equal() -> None:
    for kind in KINDS:
        assert verdict([struck(kind)]) == []
        assert verdict([struck(kind, inside=False)]) == [f"1 of 1 kills missed their moment: {kind}"]
        assert verdict([replace(struck(kind), hits=[])]) == [f"0 of 0 kills missed their moment: {kind}"]
    (text,) = verdict([struck("before manifest", unfinished={"step_00000003": {"model.pt"}})])
    assert text == "a kill before the manifest left no checkpoint that lacked it alone"
    (text,) = verdict([struck("checkpoint", unfinished={})])
    assert text == "most kills while a checkpoint was written left none unfinished"


def test_a_run_that_came_out_different_fails_the_command() -> None:
    assert verdict([replace(struck("step"), number=7, wrong=["other predictions"])]) == ["trial 7: other predictions"]
