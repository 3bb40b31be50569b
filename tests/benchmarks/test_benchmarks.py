"""Do the benchmarks measure what they say? Their arithmetic against numpy; no test looks at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from thawline.benchmarks import (
    decode,
    finetune,
    harness,
    imbalance,
    overhead,
    profile,
    ray_overhead,
    step,
)
from thawline.benchmarks.bodies import BODIES
from thawline.benchmarks.photos import write_photos
from thawline.cluster.machine import provenance
from thawline.dataio.pixels import pictures
from thawline.models.classifier import create
from thawline.models.groups import parameter_groups
from thawline.trainer.learner import Learner
from thawline.trainer.step.precision import choose_precision

CPU = torch.device("cpu")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(
        command, cwd=provenance.HOME, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


def clock(*durations: float) -> Callable[[], float]:
    """A clock that is read at the start and at the end of each of these durations, one second apart."""
    steps = [part for duration in durations for part in (duration, 1.0)]
    return iter(accumulate(steps, initial=100.0)).__next__


def test_statistics_are_numpys_over_every_repeat_and_none_of_the_warm_up() -> None:
    wall, cpu = [2.0, 1.0, 4.0, 8.0, 1.5, 3.0], [3.0, 3.5, 5.0, 4.0, 2.0, 1.0]
    calls = count()
    timing = harness.measure(
        lambda: next(calls),
        images_per_call=12,
        device=CPU,
        warmup=3,
        repeats=6,
        wall=clock(*wall),
        cpu=clock(*cpu),
    )
    assert next(calls) == 3 + 6
    expected = {
        "images_per_s": 12 / np.array(wall),
        "ms_per_image": 1000 * np.array(wall) / 12,
        "cpu_ms_per_image": 1000 * np.array(cpu) / 12,
    }
    summary = timing.summary()
    assert list(summary) == list(expected)
    for name, values in expected.items():
        mad = np.percentile(np.abs(values - np.percentile(values, 50)), 50)
        assert list(summary[name]) == ["median", "min", "max", "mad"]
        np.testing.assert_allclose(
            list(summary[name].values()), [np.percentile(values, 50), values.min(), values.max(), mad], rtol=1e-12
        )
    assert timing.images_per_s == pytest.approx(np.percentile(expected["images_per_s"], 50))


def test_too_few_repeats_are_refused() -> None:
    with pytest.raises(harness.BenchmarkError, match=r"repeats=4 .* give 5 or more"):
        harness.measure(lambda: None, images_per_call=1, device=CPU, repeats=4)


def test_a_report_ends_in_the_json_that_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "results.json"
    results: dict[str, dict[str, Any]] = {
        "one": {"images_per_s": harness.spread([1.0, 2.0, 4.0]), "share": 0.5},
        "two": {"psnr_db": 40.0},
    }
    found = harness.report("step", "why?", {"batch": 4}, results, out=out)
    printed = capsys.readouterr()
    *table, last = printed.out.splitlines()
    assert json.loads(last) == json.loads(out.read_text()) == found
    assert found["results"] == results
    assert found["settings"] == {"batch": 4}
    assert found["hardware"] == provenance.hardware()
    assert found["versions"] == provenance.versions()
    assert found["commit"] == provenance.commit()
    assert [line.split() for line in table[1:]] == [
        ["images_per_s", "share", "psnr_db"],
        ["one", "2", "±1", "0.5", "-"],
        ["two", "-", "-", "40"],
    ]
    assert list(out.parent.iterdir()) == [out]
    assert str(out) in printed.err


def test_a_result_that_cannot_be_written_is_printed_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(harness.BenchmarkError, match="cannot be written"):
        harness.report("step", "why?", {}, {"one": {"share": 0.5}}, out=tmp_path / "file" / "results.json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"] == {"one": {"share": 0.5}}


@pytest.mark.parametrize(("name", "parameters"), [("convnext_tiny", 28_589_128), ("vit_small", 22_050_664)])
def test_bare_bodies_have_their_papers_parameters_each_in_one_group(name: str, parameters: int) -> None:
    body = BODIES[name](1000, 224)
    groups = parameter_groups(body)
    assert [len(group) for group in groups][1:] == [2]  # a head of weight and bias
    assert sum(p.numel() for group in groups for _, p in group) == parameters


def test_the_decoder_gives_each_jpeg_in_turn_and_begins_again() -> None:
    jpegs = write_photos(4, width=60, height=40, seed=3)
    pipe = decode.decoder(jpegs, batch=2, threads=1, device=CPU, load=0.0)
    for first, second in (jpegs[:2], jpegs[2:], jpegs[:2]):
        (images,) = pipe.run()
        for i, jpeg in enumerate((first, second)):
            assert np.abs(np.asarray(images.at(i)).astype(int) - pictures.decode(jpeg)).max() <= 4


def test_a_profile_adds_up_what_has_the_same_name_by_the_step() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(6):
            torch.ones(3, 3) @ torch.ones(3, 3)
    found = profile.costs(profiler.key_averages(), steps=2, took_s=0.5, on_gpu=False)
    assert found["aten::mm"]["calls"] == 3
    spent_us = sum(event.self_cpu_time_total for event in profiler.key_averages() if event.key == "aten::mm")
    assert found["aten::mm"]["ms"] == pytest.approx(spent_us / 2000)
    assert found["aten::mm"]["share"] == pytest.approx(spent_us / 500_000)
    assert profile.costs(profiler.key_averages(), steps=2, took_s=0.5, on_gpu=True) == {}


def small_batch() -> Any:
    return step.noise(4, 32, step.CLASSES, device=CPU, dtype=torch.float32)


def test_the_learner_s_part_of_a_turn_is_compared_with_the_bare_turns_before_and_after_it() -> None:
    """Steps of windows of three; a clock that only goes on in turns, and another speed for the CPU's."""
    now, log = [0.0], list[tuple[str, int]]()
    bare, learner = iter([10.0, 2.0, 4.0, 8.0]), iter([6.0, 3.0, 3.0])

    def take_bare_turn() -> None:
        now[0] += next(bare)
        log.append(("bare", at))

    turns = overhead.Turns(take_bare_turn, 3, CPU, wall=lambda: now[0], cpu=lambda: 2 * now[0])
    for at in range(12):
        if at % 3 == 2 and at > 2:
            now[0] += next(learner)
        turns(at)
    assert log == [("bare", 2), ("bare", 5), ("bare", 8), ("bare", 11)]
    assert turns.bare_s == [(10.0, 20.0), (2.0, 4.0), (4.0, 8.0), (8.0, 16.0)]
    assert turns.learner_s == [(6.0, 12.0), (3.0, 6.0), (3.0, 6.0)]
    for shares in turns.extra():
        np.testing.assert_allclose(shares, [6 / 6 - 1, 3 / 3 - 1, 3 / 6 - 1])
    rows = overhead.compared({"learner": turns}, steps=3)
    assert rows["bare"]["ms_per_step"] == harness.spread([10e3 / 3, 2e3 / 3, 4e3 / 3, 8e3 / 3])
    assert rows["learner"]["cpu_ms_per_step"] == harness.spread([4000.0, 2000.0, 2000.0])
    assert rows["learner"]["extra_percent"] == harness.spread([0.0, 0.0, -50.0])
    assert rows["learner"]["extra_percent_stderr"] == 0


def test_the_bare_loop_takes_the_step_that_the_trainer_takes() -> None:
    """Same dropout, loss and update; but it decays norms and biases, too, which plain torch does not leave out."""
    ends, batch, precision = [], small_batch(), choose_precision("fp32", CPU)
    for bare in (True, False):
        network = step.prepared("resnet18", step.CLASSES, device=CPU)
        if bare:
            torch.manual_seed(0)
            loss = overhead.bare_loop(network, iter([batch]), precision=precision, steps=1)()
        else:
            loss = float(step.stepping(network, batch, precision=precision).step(lambda: batch, seed=0).losses.mean())
        ends.append((loss, [p.detach() for p in network.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=2 * 0.01 * step.LR, atol=1e-6)


@pytest.mark.slow
def test_overhead_ends_in_rows_of_both_learners_and_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_CALLS", 1)
    found = overhead.main(model="tiny", size_px=32, batch=2, steps=2, repeats=5, threads=1)["results"]
    compared = ["bare", "learner", "learner, a checkpoint a window"]
    assert list(found)[:4] == [*compared, overhead.MINUTE]
    a_minute, plain, with_one = found.pop(overhead.MINUTE), found["learner"], found["learner, a checkpoint a window"]
    turn_s = 2 * found["bare"]["ms_per_step"]["median"] / 1000
    plain_percent, percent = plain["extra_percent"]["median"], with_one["extra_percent"]["median"]
    assert a_minute["extra_percent"] == pytest.approx(plain_percent + (percent - plain_percent) * turn_s / 60)
    assert a_minute["extra_percent_stderr"] == plain["extra_percent_stderr"] > 0
    for name, row in found.items():
        measured = ["ms_per_step", "cpu_ms_per_step"] if name in compared else ["ms", "cpu_ms"]
        assert list(row)[:2] == measured
        assert all(0 < row[key]["min"] <= row[key]["median"] <= row[key]["max"] for key in measured)
    step_ms = found["bare"]["cpu_ms_per_step"]["median"]
    for name in list(found)[3:]:
        assert found[name]["cpu_percent"] == pytest.approx(100 * found[name]["cpu_ms"]["median"] / step_ms)


def test_a_benchmark_s_batch_that_does_not_fit_is_refused_and_not_split() -> None:
    class Full(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, step.CLASSES)

        def groups(self) -> list[list[torch.nn.Module]]:
            return [[self.head]]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("injected")

    call = step.training(Full(), small_batch(), precision=choose_precision("fp32", CPU))
    with pytest.raises(harness.BenchmarkError, match=r"a batch of 4 does not fit .* give a smaller --batch"):
        call()


def test_few_labels_are_so_many_of_each_class_by_the_seed_and_all_others_validate() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 200).astype(str)
    rows = pa.table({"label": labels.tolist()})
    sides = finetune.by_class(finetune.few(7), seed=1)(rows)
    assert set(sides) == {"train", "valid"}
    for digit in "01234":
        assert (sides[labels == digit] == "train").sum() == 7
    assert (finetune.by_class(finetune.few(7), seed=1)(rows) == sides).all()
    assert (finetune.by_class(finetune.few(7), seed=2)(rows) != sides).any()
    known = finetune.by_class(finetune.held_out, seed=1)(rows)
    for digit in "01234":
        assert (known[labels == digit] == "valid").sum() == round(0.1 * (labels == digit).sum())
    with pytest.raises(harness.BenchmarkError, match=r"labels=60 leaves nothing of a class's \d+ images"):
        finetune.by_class(finetune.few(60), seed=1)(rows)


def test_a_rare_class_has_few_training_images_and_all_others_validate() -> None:
    rows = pa.table({"label": ["rare"] * 30 + ["other"] * 500})
    sides = imbalance.by_class({"rare": 4, "other": 400}, seed=1)(rows)
    assert [(sides[part] == "train").sum() for part in (slice(0, 30), slice(30, None))] == [4, 400]
    assert set(sides) == {"train", "valid"}
    assert (imbalance.by_class({"rare": 4, "other": 400}, seed=2)(rows) != sides).any()


@pytest.mark.slow
def test_finetune_starts_one_way_from_the_body_alone_and_gives_both_as_many_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sklearn.datasets", reason="scikit-learn carries the digits")
    origins, steps = list[str](), list[int]()

    def remembered(*arguments: Any, **options: Any) -> Any:
        model = create(*arguments, **options)
        origins.append(model.origin)
        return model

    def close(learner: Learner) -> None:
        steps.append(learner.progress.step)
        closed(learner)

    closed = Learner.close
    monkeypatch.setattr(finetune, "create", remembered)
    monkeypatch.setattr(Learner, "close", close)
    monkeypatch.setattr(finetune, "KNOWN", "01")
    monkeypatch.setattr(finetune, "NEW", "56")
    monkeypatch.setattr(finetune, "held_out", finetune.few(20))
    options = {"size_px": 16, "labels": 10, "epochs": (2,), "known_epochs": 1, "batch": 20, "seeds": 2, "threads": 1}
    found = finetune.main(**options)["results"]  # type: ignore[arg-type]
    scratch, body = "random weights", "body; the file has no head of ours, so the head is as initialised"
    assert [origin.rpartition(": ")[2] for origin in origins] == 2 * [scratch, body, scratch]
    assert steps == [2] * 6
    ways = ["2 epochs, fine_tune", "2 epochs, scratch", "2 epochs, scratch - fine_tune"]
    assert list(found) == ["known", *ways]
    for row in found.values():
        one, other = row["seed 0"], row["seed 1"]
        assert row["mean_percent"] == pytest.approx((one + other) / 2)
        assert row["standard_error"] == pytest.approx(abs(one - other) / 2)
    for seed in ("seed 0", "seed 1"):
        tuned, plain, difference = (found[way][seed] for way in ways)
        assert all(0 <= rate <= 100 for rate in (tuned, plain))
        assert difference == pytest.approx(plain - tuned)


def test_ray_overhead_compares_pairs_of_runs_over_the_same_samples() -> None:
    ends = {10.2: 1.0, 12.0: 1.4, 14.0: 2.0, 18.0: 4.0, 22.5: 0.5}  # of windows, by when they ended: their seconds
    rows = [{"images": 64, "window_s": s, "unix_s": end} for end, s in ends.items()]
    # Of the first turn the second and third; the fourth was frozen within; the fifth begins before things have settled.
    assert ray_overhead.images_per_s(rows, [(10.0, 15.0), (21.9, 23.0)]) == pytest.approx(128 / 3.4)
    with pytest.raises(harness.BenchmarkError, match="no window lies within a turn"):
        ray_overhead.images_per_s(rows, [(30.0, 35.0)])
    runs = {
        "ray": [ray_overhead.Run(speed, 20.0, "h") for speed in (98.0, 110.0, 99.0)],
        "torchrun": [ray_overhead.Run(speed, 10.0, "h") for speed in (100.0, 100.0, 90.0)],
    }
    found = ray_overhead.compared(runs)
    assert found["ray"]["images_per_s"] == harness.spread([98.0, 110.0, 99.0])
    ratios = np.array([0.98, 1.1, 1.1])
    assert found["ray / torchrun"]["ratio"] == pytest.approx(harness.spread(ratios))
    assert found["ray / torchrun"]["mean"] == pytest.approx(ratios.mean())
    assert found["ray / torchrun"]["stderr"] == pytest.approx(ratios.std(ddof=1) / 3**0.5)
    runs["ray"].append(ray_overhead.Run(1.0, 1.0, "another"))
    with pytest.raises(harness.BenchmarkError, match="different samples"):
        ray_overhead.compared(runs)


def test_an_unknown_name_is_misuse_and_the_list_is_shown() -> None:
    done = run("presise")
    assert done.returncode == 2
    assert done.stdout == ""
    named = (
        "'presise'",
        "decode",
        "profile",
        "presize ",
        "presize_quality",
        "prefilter",
        "step",
        "train",
        "overhead",
        "finetune",
        "ray_overhead",
        "shards",
        "scale",
    )
    assert all(f" {name}" in done.stderr for name in named)
