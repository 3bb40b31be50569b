"""Is a job refused where a value is out of range or contradicts another, and only there?"""

from dataclasses import replace
from typing import Any

import pytest

from thawline.cluster.errors import JobError
from thawline.cluster.job.checks import check
from thawline.cluster.job.flags import override
from thawline.cluster.job.job import Augment, Data, Fit, Job, PhaseJob
from thawline.trainer.checkpoints.settings import CheckpointSettings
from thawline.trainer.errors import RecipeError
from thawline.trainer.optimisers.settings import OptimSettings

JOB = Job(manifest="pets.parquet")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--name", ""], "no run folder"),
        (["--name", ".."], "no run folder"),
        (["--name", "a/b"], "no run folder"),
        (["--manifest", ""], "thawline index"),
        (["--seed", "-1"], r"0 <= seed < 2\*\*63"),
        (["--seed", str(2**63)], r"0 <= seed < 2\*\*63"),
        (["--workers", "0"], "workers >= 1"),
        (["--workers", "33"], "fewer than 2 images.*global_batch >= 66"),
        (["--fit.epochs", "0"], r"fit\.epochs=0 .* fit\.epochs >= 1"),
        (["--fit.lr", "0"], "a finite number above 0"),
        (["--fit.lr", "nan"], "a finite number above 0"),
        (["--fit.lr", "1e-4", "-1"], "a finite number above 0"),
        (["--fit.pct-start", "1"], r"0 < fit\.pct_start < 1"),
        (["--optim.weight-decay", "-0.1"], r"optim\.weight_decay >= 0"),
        (["--checkpoint.keep", "0"], r"checkpoint\.keep >= 1"),
        (["--metrics.port", "65536"], r"metrics\.port < 65536"),
        (["--augment.mixup", "-1"], r"Beta.*give 0 <= augment\.mixup <= 100"),
        (["--augment.cutmix", "101"], r"Beta.*give 0 <= augment\.cutmix <= 100"),
        (["--data.max-quarantined", "1.5"], r"a share .*give 0 <= data\.max_quarantined <= 1"),
        (["--data.cache-gib", "0"], r"give data\.cache_gib > 0"),
        (["--fit.warmup", "1.5"], r"0 <= fit\.warmup <= 1"),
        (["--fit.accumulate", "0"], r"give fit\.accumulate >= 1"),
        (["--fit.clip", "0"], r"fit\.clip=0\.0 .* a finite number above 0"),
        (["--fit.clip", "inf"], r"fit\.clip=inf"),
        (["--fit.ema", "1"], r"0 <= fit\.ema < 1"),
        (["--fit.label-smoothing", "1"], r"0 <= fit\.label_smoothing < 1"),
        (["--fit.metrics", "accuracy", ""], r"names such as 'accuracy'"),
        (["--optim.momentum", "1"], r"0 <= optim\.momentum < 1"),
        (["--optim.beta2", "-0.1"], r"0 <= optim\.beta2 < 1"),
        (["--optim.eps", "0"], r"optim\.eps=0\.0"),
        (["--data.balance", "1.1"], r"inverse frequency.*give 0 <= data\.balance <= 1"),
        (["--fit.class-weights", "cat", "0"], r"finite numbers above 0 by class"),
    ],
)
def test_values_out_of_range_are_refused_with_what_to_give(args: list[str], sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        check(override(JOB, args))


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        ({"epochs": 0.0}, r"phases\[1\]\.epochs=0\.0 .* phases\[1\]\.epochs > 0"),
        ({"steps": 0}, r"phases\[1\]\.steps > 0"),
        ({"samples": -1}, r"phases\[1\]\.samples > 0"),
        ({"lr": 0.0}, r"phases\[1\]\.lr=0\.0"),
        ({"lr": (1e-4, -1.0)}, r"phases\[1\]\.lr="),
        ({"frozen_epochs": -1.0}, r"phases\[1\]\.frozen_epochs >= 0"),
        ({"div": 0.5}, r"phases\[1\]\.div >= 1"),
        ({"div_final": 0.5}, r"phases\[1\]\.div_final >= 1"),
        ({"pct_start": 1.0}, r"phases\[1\]\.pct_start < 1"),
        ({"momenta": (0.9, 1.0, 0.9)}, r"phases\[1\]\.momenta < 1"),
        ({"warmup": 1.5}, r"phases\[1\]\.warmup <= 1"),
        ({"size_px": 7}, r"phases\[1\]\.size_px >= 8"),
        ({}, r"phases\[1\] has no epochs, steps or samples: .*exactly one"),
        ({"epochs": 1.0, "steps": 5}, r"phases\[1\] has epochs=1\.0 and steps=5: .*exactly one"),
    ],
)
def test_a_phase_out_of_range_is_refused_by_its_place(phase: dict[str, Any], sentence: str) -> None:
    given = phase if {"epochs", "steps", "samples"} & {*phase} or not phase else {"epochs": 1.0, **phase}
    with pytest.raises(JobError, match=sentence):
        check(replace(JOB, phases=(PhaseJob(epochs=1.0), PhaseJob(**given))))


@pytest.mark.parametrize(
    ("recipe", "phase", "sentence"),
    [
        (
            "one_cycle",
            {"warmup": 0.1},
            r"phases\[0\]\.warmup=0\.1 with recipe one_cycle, .*give flat_cos, .* or constant",
        ),
        ("one_cycle", {"frozen_epochs": 1.0}, r"frozen_epochs=1\.0 with recipe one_cycle, .*give fine_tune"),
        ("fine_tune", {"freeze_to": -1}, r"freeze_to=-1 with recipe fine_tune, .*one_cycle, flat_cos, .* or constant"),
        ("flat_cos", {"momenta": (0.9, 0.8, 0.9)}, r"momenta=.* with recipe flat_cos, .*give fine_tune or one_cycle"),
        ("constant", {"pct_start": 0.5}, r"pct_start=0\.5 with recipe constant"),
        ("constant", {"div_final": 10.0}, r"div_final=10\.0 with recipe constant"),
    ],
)
def test_what_a_phase_s_recipe_would_not_read_is_refused(recipe: Any, phase: dict[str, Any], sentence: str) -> None:
    pairs: list[tuple[Any, Any]] = [(recipe, None), ("one_cycle", recipe)]
    for of_fit, of_phase in pairs:
        job = replace(JOB, fit=Fit(of_fit), phases=(PhaseJob("x", of_phase, epochs=1.0, **phase),))
        with pytest.raises(JobError, match=sentence):
            check(job)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--fit.warmup", ".1"], r"fit\.warmup=0\.1 with recipe fine_tune, .*give flat_cos, .* or constant"),
        (["--fit.recipe", "one_cycle", "--fit.warmup", ".1"], r"fit\.warmup=0\.1 with recipe one_cycle"),
        (["--fit.recipe", "constant", "--fit.pct-start", ".5"], r"fit\.pct_start=0\.5 with recipe constant"),
        (
            ["--fit.compile", "reduce-overhead", "--workers", "2"],
            r"with workers=2: .*BatchNorm under DDP \(pytorch#139207\).*'max-autotune-no-cudagraphs'",
        ),
        (["--fit.cache-features", "1"], r"with fit\.batch_norm='train': .*give fit\.batch_norm='frozen'"),
        (["--fit.class-weights", "balanced", "--data.balance", "1"], r"rare classes would count twice.*leave one of"),
        (["--optim.nesterov"], r"optim\.name='adamw' .*give optim\.name='sgd'"),
        (["--optim.nesterov", "--optim.name", "sgd", "--optim.momentum", "0"], r"optim\.momentum=0\.0: only sgd"),
        (
            ["--fit.accumulate", "33"],
            r"fit\.accumulate=33 micro-batches leaves .*fewer than 2 images a micro-batch.*>= 66",
        ),
        (
            ["--fit.accumulate", "9", "--workers", "4"],
            r"workers=4 in fit\.accumulate=9 micro-batches .*global_batch >= 72",
        ),
    ],
)
def test_values_that_contradict_one_another_are_refused(args: list[str], sentence: str) -> None:
    with pytest.raises((JobError, RecipeError), match=sentence):
        check(override(JOB, args))


def test_the_sizes_of_phases_and_of_stages_exclude_one_another() -> None:
    sized = replace(JOB, phases=(PhaseJob(epochs=1.0), PhaseJob(epochs=1.0, size_px=224)))
    assert check(sized) == sized
    with pytest.raises(JobError, match=r"phases\[1\]\.size_px=224 beside data\.stages: .*two sizes"):
        check(replace(sized, data=Data(stages=((0.0, 128), (1.0, 224)))))
    with pytest.raises(JobError, match=r"phases\[1\]\.size_px=224 is larger than data\.presize_px=200"):
        check(replace(sized, data=Data(size_px=128, presize_px=200)))


def test_what_any_phase_reads_may_stand_in_fit() -> None:
    two = (PhaseJob(epochs=1.0), PhaseJob(recipe="constant", epochs=1.0))
    job = replace(JOB, fit=Fit("one_cycle", warmup=0.1, pct_start=0.5), phases=two)
    assert check(job) == job
    with pytest.raises(JobError, match=r"fit\.warmup=0\.1 with recipe one_cycle"):
        check(replace(job, phases=two[:1]))


def test_the_ends_of_the_ranges_pass() -> None:
    edge = replace(
        JOB,
        name="a b..c",
        seed=0,
        workers=32,
        data=Data(size_px=8, presize_px=8, max_quarantined=1.0),
        augment=Augment(min_scale=0.01, mixup=100.0, cutmix=0.0),
    )
    assert check(edge) == edge
    parts = replace(JOB, workers=4, fit=Fit(accumulate=8, ema=0.0, label_smoothing=0.0, compile="default"))
    assert check(parts) == parts, "2 images a part"
    every = (
        PhaseJob("head", "one_cycle", epochs=0.5, freeze_to=-1, lr=1e-3, div=1.0, div_final=1.0, pct_start=0.01),
        PhaseJob(recipe="fine_tune", steps=1, frozen_epochs=0.0, lr="find", momenta=(0.0, 0.0, 0.99), size_px=8),
        PhaseJob(samples=1, lr=(1e-6, 1e-4), warmup=0.0, size_px=460),
    )
    phased = replace(JOB, fit=Fit("constant", compile="reduce-overhead"), phases=every)
    assert check(phased) == phased
    warm = replace(JOB, fit=Fit("constant", warmup=1.0))
    assert check(warm) == warm
    sgd = replace(JOB, optim=OptimSettings("sgd", nesterov=True, momentum=0.5))
    assert check(sgd) == sgd


@pytest.mark.parametrize(
    ("job", "problem"),
    [
        (Job(fit=Fit(budget="30")), r"fit\.budget='30' is out of range: it is no time; give a time above 0 "),
        (Job(fit=Fit(budget="0m")), r"fit\.budget='0m' is out of range"),
        (Job(fit=Fit(budget="9m", epochs=2)), r"fit\.epochs=2 beside fit\.budget='9m', .*one of the two"),
        (Job(fit=Fit(budget="9m"), data=Data(stages=((0.0, 128),))), r"fit\.budget='9m' beside data\.stages"),
        (Job(fit=Fit(budget="9m"), phases=(PhaseJob(epochs=1.0),)), r"fit\.budget='9m' beside \[\[phases\]\]"),
        (
            Job(fit=Fit(monitor="error_rate")),
            r"fit\.monitor='error_rate' without fit\.patience, fit\.restore_best or recipe plateau: ",
        ),
        (
            Job(fit=Fit(patience=2), data=Data(stages=((0.0, 128), (2.0, 224)))),
            r"fit\.patience=2 beside data\.stages: .*; leave it out",
        ),
        (
            Job(fit=Fit(restore_best=True), data=Data(stages=((0.0, 128), (2.0, 224)))),
            r"fit\.restore_best=true beside data\.stages: .* size_px in \[\[phases\]\]",
        ),
        (
            Job(fit=Fit(patience=2), phases=(PhaseJob(epochs=1.0), PhaseJob(epochs=1.0, size_px=224))),
            r"fit\.patience=2 beside size_px in \[\[phases\]\]: .* leave fit\.patience out",
        ),
        (
            Job(fit=Fit(restore_best=True), checkpoint=CheckpointSettings(best="error_rate")),
            r"checkpoint\.best='error_rate' beside fit\.restore_best by fit\.monitor='valid_loss': .*same metric",
        ),
        (
            Job(fit=Fit("one_cycle", cache_features=1, batch_norm="frozen")),
            r"fit\.cache_features=1, and the whole model trains in every phase: .*give fit\.recipe='fine_tune'",
        ),
    ],
)
def test_stopping_and_budgets_that_contradict_something_are_refused(job: Job, problem: str) -> None:
    with pytest.raises(JobError, match=problem):
        check(replace(job, manifest="a.parquet"))
    ok = Fit(patience=2, restore_best=True, monitor="error_rate")
    assert check(Job(manifest="a.parquet", fit=ok, checkpoint=CheckpointSettings(best="error_rate"))).fit == ok
