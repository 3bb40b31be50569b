"""Do a job's [[phases]] become the phases that they say, and do the images change their side where a phase begins?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.kit.images import first
from thawline.cluster.job.checks import check
from thawline.cluster.job.job import Data, Fit, Job, PhaseJob, from_toml
from thawline.cluster.job.recipes import image_spec, phases, stages
from thawline.cluster.run.vision import job_loaders, job_spec
from thawline.dataio.errors import SpecError
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.table.manifest import Manifest
from thawline.trainer.context import LocalContext
from thawline.trainer.errors import RecipeError
from thawline.trainer.schedule.phases import (
    Find,
    Phase,
    constant_phases,
    fine_tune_phases,
    flat_cos_phases,
    one_cycle_phases,
)

THREE = """
    manifest = "{manifest}"
    [data]
    size_px = 16
    presize_px = 24
    global_batch = 8
    engine = "reference"
    threads = 1
    [fit]
    recipe = "one_cycle"
    lr = [1e-6, 1e-4]
    div = 10
    [[phases]]
    name = "head"
    epochs = 0.5
    freeze_to = -1
    lr = 3e-3
    [[phases]]
    samples = 20
    [[phases]]
    name = "large"
    recipe = "flat_cos"
    steps = 4
    warmup = 0.25
    size_px = 24
"""


def test_three_phases_and_two_sizes_of_a_file(flat: Manifest, tmp_path: Path) -> None:
    """37 training images in batches of 8: half an epoch is 2.3 steps, 20 images are 2.5."""
    manifest, file = tmp_path / "flat.parquet", tmp_path / "job.toml"
    flat.save(manifest)
    file.write_text(THREE.format(manifest=manifest))
    job = check(from_toml(file))
    assert phases(job) == (
        Phase("head", epochs=0.5, freeze_to=-1, lr=3e-3, div=10.0, pct_start=0.25),
        Phase("one_cycle", samples=20, lr=(1e-6, 1e-4), div=10.0, pct_start=0.25),
        Phase("large", steps=4, lr=(1e-6, 1e-4), shape="flat_cos", div=10.0, pct_start=0.75, warmup=0.25),
    )
    train, valid = job_loaders(job, LocalContext(tmp_path))
    assert [train.size_px(step) for step in range(12)] == [16, 16, 16, 16, 16, 24, 24, 24, 24, 24, 24, 24]
    assert [batch.inputs.shape[-1] for batch in first(train, 7)] == [16] * 5 + [24] * 2
    assert [batch.inputs.shape[-1] for batch in first(train, 2, step=4)] == [16, 24], "also when the run goes on there"
    assert [next(valid.stream(step)).inputs.shape[-1] for step in (4, 5, 9)] == [16, 24, 24]
    assert train.spec.size_px == valid.spec.size_px == 24, "what the model is used at afterwards"


@pytest.mark.parametrize("batch", [2, 7, 24, 96])
@pytest.mark.parametrize("samples", [37, 1000, 5913, 1_281_167])
def test_a_size_begins_at_the_very_step_of_its_phase(samples: int, batch: int) -> None:
    lengths = [1, 3, 1000, 33_333, 2]
    sides = [32, 64, 32, 48, 96]
    tables = tuple(PhaseJob(steps=n, size_px=side) for n, side in zip(lengths, sides, strict=True))
    job = Job(data=Data(global_batch=batch), fit=Fit("one_cycle"), phases=tables)
    spec = ImageSpec(stages=stages(job, samples=samples), size_px=96)
    begins = 0
    for n, side in zip(lengths, sides, strict=True):
        steps = {begins, begins + n // 2, begins + n - 1}
        assert {spec.size_at(step * batch / samples) for step in steps} == {side}
        begins += n


@pytest.mark.parametrize(
    ("fit", "expected"),
    [
        (Fit(), fine_tune_phases(5, 3e-3)),
        (Fit(epochs=3, frozen_epochs=2, div=4.0, pct_start=0.5), None),
        (Fit(frozen_epochs=0, lr="find"), fine_tune_phases(5, Find(), frozen_epochs=0)),
        (Fit(lr="find"), fine_tune_phases(5, Find())),
        (Fit("one_cycle", lr=(1e-6, 1e-4)), one_cycle_phases(5, (1e-6, 1e-4))),
        (Fit("one_cycle", epochs=2, lr="find", pct_start=0.4), one_cycle_phases(2, Find(), pct_start=0.4)),
        (Fit("flat_cos", warmup=0.1, pct_start=0.5), flat_cos_phases(5, 3e-3, warmup=0.1, pct_start=0.5)),
        (Fit("constant", warmup=0.1, div=5.0), constant_phases(5, 3e-3, warmup=0.1, div=5.0)),
    ],
)
def test_a_job_without_phases_is_what_its_fit_says(fit: Fit, expected: tuple[Phase, ...] | None) -> None:
    found = phases(Job(fit=fit))
    assert found == (expected or fine_tune_phases(3, 3e-3, frozen_epochs=2, div=4.0, pct_start=0.5))


def test_what_a_phase_does_not_give_comes_from_fit_where_its_recipe_reads_it() -> None:
    fit = Fit("flat_cos", epochs=9, frozen_epochs=7, lr=1e-2, div=8.0, pct_start=0.6, warmup=0.2)
    tables = (
        PhaseJob(epochs=1.0),
        PhaseJob(epochs=1.0, lr=1e-4, div=2.0, pct_start=0.9, warmup=0.0, div_final=10.0),
        PhaseJob(recipe="constant", epochs=1.0),
        PhaseJob(recipe="one_cycle", epochs=1.0, momenta=(0.9, 0.8, 0.9)),
        PhaseJob(recipe="fine_tune", epochs=1.0),
    )
    assert phases(Job(fit=fit, phases=tables)) == (
        *flat_cos_phases(1, 1e-2, div=8, pct_start=0.6, warmup=0.2),
        *flat_cos_phases(1, 1e-4, div=2, pct_start=0.9, div_final=10),
        *constant_phases(1, 1e-2, div=8, warmup=0.2),
        *one_cycle_phases(1, 1e-2, div=8, pct_start=0.6, momenta=(0.9, 0.8, 0.9)),
        *fine_tune_phases(1, 1e-2, div=8, pct_start=0.6),
    )


def test_fine_tune_as_a_phase_is_two_and_its_length_the_second_s() -> None:
    tables = (PhaseJob("a", steps=30, frozen_epochs=0.5, lr="find"), PhaseJob(epochs=2.0, frozen_epochs=0.0))
    frozen, unfrozen, alone = phases(Job(phases=tables))
    assert (frozen.name, frozen.epochs, frozen.steps, frozen.freeze_to) == ("a frozen", 0.5, 0, -1)
    assert (unfrozen.name, unfrozen.epochs, unfrozen.steps, unfrozen.freeze_to) == ("a unfrozen", 0, 30, 0)
    assert (frozen.lr, unfrozen.lr) == (Find(slice(1.0)), Find(slice(0.005, 0.5), search=False))
    assert (alone.name, alone.epochs, alone.lr) == ("unfrozen", 2.0, slice(1.5e-5, 1.5e-3))
    sized = Job(data=Data(global_batch=10), phases=(*tables, PhaseJob(steps=1, size_px=32)))
    # 100 images: 5 + 30 + 20 steps of 10 before it.
    assert stages(sized, samples=100) == ((0.0, 224), (5.5, 32))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([None, None, None], ()),
        ([None, None, 64], ((0.0, 48), (2.0, 64))),
        ([32, None, 64], ((0.0, 32), (2.0, 64))),
        ([32, 64, None], ((0.0, 32), (1.0, 64))),
        ([32, 32, 32], ((0.0, 32),)),
        ([64, 32, 64], ((0.0, 64), (1.0, 32), (2.0, 64))),
        ([48, None, 48], ((0.0, 48),)),
    ],
)
def test_a_phase_without_a_size_keeps_the_one_before(sizes: list[int | None], expected: Any) -> None:
    tables = tuple(PhaseJob(recipe="constant", epochs=1.0, size_px=side) for side in sizes)
    job = Job(data=Data(size_px=48, global_batch=10), phases=tables)
    assert stages(job, samples=100) == expected
    spec = job_spec(job, samples=100)
    assert (spec.stages, spec.size_px) == (expected, expected[-1][1] if expected else 48)
    assert replace(spec, stages=(), size_px=48) == image_spec(job), "and nothing else of it"


def test_phases_that_make_no_sense_are_refused_before_anything_starts() -> None:
    with pytest.raises(RecipeError, match=r"lr=\(1e-06, 0\.0001\) with fine_tune"):
        phases(Job(phases=(PhaseJob(epochs=1.0, lr=(1e-6, 1e-4)),)))
    with pytest.raises(RecipeError, match=r"warmup=0\.9 is more than pct_start=0\.5"):
        phases(Job(phases=(PhaseJob(recipe="flat_cos", steps=5, warmup=0.9, pct_start=0.5),)))
    with pytest.raises(SpecError, match=r"presize_px=40 is smaller than size_px=48"):
        job_spec(Job(data=Data(size_px=32, presize_px=40), phases=(PhaseJob(steps=5, size_px=48),)), samples=10)
