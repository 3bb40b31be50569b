"""Does a job mean what its file says, and does a mistake get its sentence?"""

import os
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tests.kit.images import grown
from tests.kit.jobs import JOB
from thawline.cluster.errors import JobError
from thawline.cluster.job.checks import check
from thawline.cluster.job.flags import override
from thawline.cluster.job.job import (
    Augment,
    Data,
    Fit,
    Job,
    PhaseJob,
    differences,
    from_dict,
    from_toml,
    load,
    resolved,
    to_toml,
)
from thawline.cluster.job.model import Model
from thawline.cluster.job.recipes import image_spec
from thawline.dataio.pixels.spec import PRESETS, ImageSpec
from thawline.trainer.checkpoints.settings import CheckpointSettings
from thawline.trainer.optimisers.settings import OptimSettings

EVERY = (
    PhaseJob("head", "one_cycle", epochs=0.5, freeze_to=-1, lr=1e-3, div=10.0, div_final=1e3, pct_start=0.5),
    PhaseJob("all", "fine_tune", steps=100, frozen_epochs=2.0, lr="find", momenta=(0.9, 0.8, 1 / 3), size_px=128),
    PhaseJob(samples=10_000, lr=(1e-6, 1e-4), warmup=0.2, size_px=224),
)
"""Every field of a phase."""


def test_a_job_survives_toml_exactly(tmp_path: Path) -> None:
    job = replace(
        JOB,
        name='pets "2" \\ é',
        seed=2**63 - 1,
        data=Data(stages=((0.0, 128), (2.5, 224)), mean=(0.1, 0.2, 1 / 3), cache_gib=0.5),
        augment=Augment(flip=False, rotate_deg=1 / 3, preset="satellite", ratio=(0.5, 1.0)),
        fit=Fit(
            lr=(1e-6, 0.1 + 0.2), div=25.0, pct_start=None, metrics=("accuracy", "f_beta(beta=2)"), compile="default"
        ),
        optim=OptimSettings("sgd", engine="apex", nesterov=True, momentum=1 / 3),
        checkpoint=CheckpointSettings(best="f_beta"),
    )
    phased = replace(JOB, fit=Fit(recipe="constant", lr="find", warmup=0.1, clip=1.0), phases=EVERY)
    file = tmp_path / "job.toml"
    for one in (Job(), JOB, job, phased):
        file.write_text(to_toml(one), encoding="utf-8")
        assert from_toml(file) == one
    assert not {"pct_start", "std"} & {line.split(" ")[0] for line in to_toml(job).splitlines()}


BEFORE = """
name = "run"\nmanifest = "a.parquet"\nstorage = "runs"\nseed = 42\nworkers = 1\ndevice = "auto"\nlog_every = 10
failures = 3\npreemptions = -1\nphases = []
[data]\nsize_px = 224\nstages = []\npresize_px = 460\nglobal_batch = 64\nengine = "auto"\nthreads = 0\nvalid = ""
root = ""\npresize = "crop"\nmax_quarantined = 0.01\ncache = ""\ncache_gib = 100.0
[augment]\npreset = "default"\nflip = "auto"\ndihedral = false\nrotate_deg = 10.0\nmin_zoom = 1.0\nmax_zoom = 1.1
max_warp = 0.2\nmax_lighting = 0.2\nmax_saturation = 0.0\np_affine = 0.75\np_lighting = 0.75\nmin_scale = 1.0
ratio = [0.75, 1.3333333333333333]\nborder = "reflect"\nmixup = 0.0\ncutmix = 0.0
[model]\nname = "resnet34"\nweights = "imagenet"\ndropout = 0.5
[fit]\nrecipe = "fine_tune"\nepochs = 5\nfrozen_epochs = 1\nlr = 0.003\nwarmup = 0.0\nprecision = "auto"
accumulate = 1\nema = 0.0\nlabel_smoothing = 0.0\ncompile = "off"\nbatch_norm = "train"\nmetrics = []
[optim]\nname = "adamw"\nengine = "torch"\nweight_decay = 0.01\nmomentum = 0.9\nnesterov = false\nbeta2 = 0.99
eps = 1e-05
[checkpoint]\nevery_s = 60.0\nkeep = 3\nbest = ""
[metrics]\nport = 9400\nhost = "127.0.0.1"\nsd_port = 9399
[cluster]\ncpus_per_worker = 1.0\naccelerator_type = ""\nplacement = "pack"\nwait_s = 0.0\nstart_s = 30.0
resize_s = 30.0\nfirst_step_s = 1800.0\nhang_s = 180.0\nresources = {}
"""
"""What to_toml wrote of a job with all defaults before settings stood beside their owners."""


def test_the_keys_and_defaults_of_a_job_are_those_of_runs_that_go_on() -> None:
    assert from_dict(tomllib.loads(BEFORE)) == Job(manifest="a.parquet")
    written = tomllib.loads(to_toml(Job(manifest="a.parquet")))
    for name, value in tomllib.loads(BEFORE).items():  # what is new since may stand beside it
        assert (value.items() <= written[name].items()) if isinstance(value, dict) else (value == written[name])


def test_absent_fields_have_their_defaults_and_whole_numbers_become_floats() -> None:
    job = from_dict({"manifest": "x.parquet", "fit": {"lr": 1, "epochs": 2}, "checkpoint": {"every_s": 60}})
    assert job == Job(manifest="x.parquet", fit=Fit(lr=1.0, epochs=2))
    assert type(job.fit.lr) is float
    data = from_dict({"data": {"stages": [[0, 128], [3, 224]], "mean": [0, 0.5, 1]}}).data
    assert data == Data(stages=((0.0, 128), (3.0, 224)), mean=(0.0, 0.5, 1.0))
    assert [type(value) for value in (*data.stages[0], *(data.mean or ()))] == [float, int, float, float, float]


def test_a_phase_is_a_table_of_a_list(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("""
        [fit]
        recipe = "one_cycle"
        [[phases]]
        name = "head"
        epochs = 3
        freeze_to = -1
        [[phases]]
        epochs = 12
        lr = [1e-6, 1e-4]
        [[phases]]
        steps = 500
        lr = "find"
        size_px = 224
    """)
    three = (
        PhaseJob("head", epochs=3.0, freeze_to=-1),
        PhaseJob(epochs=12.0, lr=(1e-6, 1e-4)),
        PhaseJob(steps=500, lr="find", size_px=224),
    )
    job = from_toml(file)
    assert job == Job(fit=Fit(recipe="one_cycle"), phases=three)
    assert type(job.phases[0].epochs) is float
    assert override(job, ["--fit.lr", "find", "--seed", "3"]) == replace(job, seed=3, fit=replace(job.fit, lr="find"))
    assert override(job, ["--augment.preset", "satellite"]).phases == three


def test_a_manifest_is_a_job_with_all_defaults(tmp_path: Path) -> None:
    manifest = tmp_path / "digits.parquet"
    manifest.touch()
    assert load(manifest) == Job(name="digits", manifest=str(manifest))
    with pytest.raises(JobError, match=r"none\.parquet does not exist"):
        load(tmp_path / "none.parquet")
    packed = tmp_path / "pets" / "manifest.arrow"
    packed.parent.mkdir()
    packed.touch()
    assert load(packed) == Job(name="pets", manifest=str(packed))
    store = "s3://bucket/packed/manifest.arrow?endpoint_override=127.0.0.1"
    assert load(store) == Job(name="packed", manifest=store)
    assert resolved(load(store)).manifest == store
    assert load("s3://bucket/all.arrow") == Job(name="all", manifest="s3://bucket/all.arrow")


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"fit": {"epoch": 5}}, r"unknown field fit\.epoch in x\.toml: .*; did you mean fit\.epochs\?"),
        ({"epochs": 5}, r"unknown field epochs in x\.toml: .*; did you mean fit\.epochs\?"),
        ({"data": {"lr": 5}}, r"unknown field data\.lr in x\.toml: .*; did you mean fit\.lr\?"),
        ({"optimizer": {}}, r"unknown field optimizer in .* did you mean optim\?"),
        ({"checkpoint": {"zzz": 5}}, r"there are checkpoint\.every_s, checkpoint\.keep, checkpoint\.best$"),
        ({"fit": {"epochs": "5"}}, r"fit\.epochs='5' in x\.toml is of type str.*a whole number$"),
        ({"fit": {"epochs": True}}, r"fit\.epochs=True in x\.toml is of type bool.*a whole number$"),
        ({"fit": {"epochs": 5.0}}, r"of type float.*a whole number$"),
        ({"augment": {"flip": 1}}, r"of type int.*true or false or 'auto'$"),
        ({"fit": {"lr": [1e-6, 1e-5, 1e-4]}}, r"of type list.*a number or two numbers in"),
        ({"fit": {"lr": [1e-6, True]}}, r"of type list.*a number or two numbers in"),
        ({"fit": {"div": "x"}}, r"of type str.*a number$"),
        ({"augment": {"ratio": 1.5}}, r"of type float.*give two numbers in \[ \]$"),
        ({"augment": {"ratio": [1.0, "2"]}}, r"of type list.*give two numbers in"),
        (
            {"data": {"mean": [0.5, 0.5]}},
            r"data\.mean=\[0\.5, 0\.5\] in .* of type list.*three numbers in \[ \]$",
        ),
        ({"data": {"stages": [0, 128]}}, r"of type list.*\[ \] of pairs, each \[a number, a whole number\]$"),
        ({"data": {"stages": [[0, 128.0]]}}, r"of type list.*pairs"),
        ({"augment": {"preset": "satelite", "flip": True}}, r"not one of default, .*did you mean 'satellite'\?"),
        ({"augment": 3}, r"augment=3 in x\.toml is not a table"),
        ({"name": 5}, r"of type int.*a string$"),
        ({"fit": {"recipe": "finetune"}}, r"not one of fine_tune, one_cycle.*did you mean 'fine_tune'\?"),
        ({"device": 0}, r"device=0 in x\.toml is not one of auto, cpu, cuda"),
        ({"fit": 5}, r"fit=5 in x\.toml is not a table"),
        ({"fit": {"lr": "fnd"}}, r"fit\.lr='fnd' in x\.toml is not one of find.*did you mean 'find'\?"),
        ({"fit": {"lr": True}}, r"of type bool.*a number or two numbers in \[ \] or 'find'$"),
        ({"fit": {"metrics": "accuracy"}}, r"of type str.*strings in \[ \]$"),
        ({"phases": {"epochs": 3}}, r"phases=.* is not a list of tables.*write \[\[phases\]\]"),
        ({"phases": [3]}, r"phases=\[3\] in x\.toml is not a list of tables"),
        ({"phases": [{}, {"epoch": 3}]}, r"unknown field phases\[1\]\.epoch in .*mean phases\[1\]\.epochs\?"),
        ({"phases": [{"weight_decay": 3}]}, r"did you mean optim\.weight_decay\?"),
        ({"phases": [{"steps": 1.5}]}, r"phases\[0\]\.steps=1\.5 in x\.toml is of type float.*a whole number$"),
        ({"phases": [{"recipe": "flat_cosine"}]}, r"phases\[0\]\.recipe=.* not one of .*did you mean 'flat_cos'\?"),
    ],
)
def test_what_a_file_gets_wrong_is_named_with_the_right_one(mapping: dict[str, Any], sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        from_dict(mapping, source="x.toml")


def test_a_file_that_is_no_job_says_why(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    with pytest.raises(JobError, match=r"x\.toml does not exist"):
        load(file)
    file.write_text('name = "a"\nseed = = 1\n')
    with pytest.raises(JobError, match=r"not valid TOML.*line 2"):
        load(file)
    file.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(JobError, match="cannot be read as a job"):
        load(file)
    with pytest.raises(JobError, match="cannot be read as a job"):
        load(tmp_path)


def test_a_choice_made_in_python_is_checked_too() -> None:
    with pytest.raises(JobError, match="did you mean 'one_cycle'"):
        check(replace(JOB, fit=Fit(recipe="onecycle")))  # type: ignore[arg-type]
    with pytest.raises(JobError, match=r"phases\[0\]\.lr='fin'.* did you mean 'find'"):
        check(replace(JOB, phases=(PhaseJob(epochs=1.0, lr="fin"),)))  # type: ignore[arg-type]


def test_flags_go_on_top_of_the_file() -> None:
    assert override(JOB, []) == JOB
    assert override(JOB, ["--fit.lr", "1e-3"]).fit == Fit(lr=1e-3)
    assert override(JOB, ["--fit.lr", "1e-6", "1e-4"]).fit == Fit(lr=(1e-6, 1e-4))
    assert override(JOB, ["--fit.lr", "find"]).fit == Fit(lr="find")
    assert override(JOB, ["--fit.metrics", "a", "b(c='d')"]).fit == Fit(metrics=("a", "b(c='d')"))
    assert override(replace(JOB, fit=Fit(lr=(1.0, 2.0))), ["--fit.epochs", "7"]).fit == Fit(lr=(1.0, 2.0), epochs=7)
    assert override(JOB, ["--augment.no-flip"]).augment == Augment(flip=False)
    assert override(JOB, ["--augment.flip", "--augment.dihedral"]).augment == Augment(flip=True, dihedral=True)
    assert override(JOB, ["--augment.flip", "auto"]) == JOB
    assert differences(JOB, override(JOB, ["--augment.flip"])) == [], "runs from before there was auto go on"
    assert override(JOB, ["--augment.ratio", "1", "2"]).augment == Augment(ratio=(1.0, 2.0))
    staged = override(JOB, ["--data.stages", "0", "128", "2.5", "224", "--data.std", ".1", ".2", ".3"])
    assert staged.data == Data(stages=((0.0, 128), (2.5, 224)), std=(0.1, 0.2, 0.3))
    assert override(staged, ["--data.stages", "--data.std", "None"]) == JOB
    assert override(JOB, ["--data.global_batch", "8"]) == override(JOB, ["--data.global-batch", "8"])
    assert override(JOB, ["--workers", "2", "--name", "b", "--storage", "s3://c"]) == replace(
        JOB, workers=2, name="b", storage="s3://c"
    )


def test_a_job_offers_the_presets_and_every_field_of_an_image() -> None:
    assert list(get_args(get_type_hints(Augment)["preset"])) == list(PRESETS)
    offered = {f.name for section in (Data, Augment) for f in fields(section)}
    assert {f.name for f in fields(ImageSpec)} <= offered
    for preset in PRESETS:
        job = from_dict({"augment": {"preset": preset}, "data": {"size_px": 64, "stages": [[0, 32], [1, 64]]}})
        assert image_spec(job) == ImageSpec.preset(preset, size_px=64, stages=((0.0, 32), (1.0, 64)))
        for name, value in PRESETS[preset].items():
            assert type(value) is type(getattr(Augment(), name)) or name == "flip"  # auto, or one of both


def test_an_image_has_the_statistics_of_the_job_if_it_gives_some() -> None:
    given = image_spec(replace(JOB, data=Data(mean=(0.1, 0.2, 0.3))))
    assert (given.mean, given.std) == ((0.1, 0.2, 0.3), ImageSpec().std)
    assert image_spec(JOB) == ImageSpec()


def test_an_unknown_flag_exits_with_2_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        override(JOB, ["--fit.epoch", "7"])
    assert stop.value.code == 2
    assert "--fit.epochs" in capsys.readouterr().err


def test_resolved_paths_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = resolved(replace(JOB, data=Data(root="images", cache="c"), model=Model(weights="w.pt")))
    paths = [job.manifest, job.storage, job.data.root, job.data.cache, job.model.weights]
    assert paths == [str(tmp_path / name) for name in ("pets.parquet", "runs", "images", "c", "w.pt")]
    assert resolved(job) == job
    remote = resolved(replace(JOB, storage="s3://bucket/runs"))
    assert (remote.storage, remote.data.root, remote.data.cache) == ("s3://bucket/runs", "", "")
    assert remote.model.weights == "imagenet"


def test_only_what_changes_the_result_makes_it_another_run() -> None:
    moved = ["--name", "b", "--manifest", "c", "--workers", "2", "--device", "cpu", "--data.engine", "dali"]
    moved += ["--data.root", "d", "--data.threads", "3", "--checkpoint.keep", "1", "--metrics.port", "0"]
    moved += ["--checkpoint.best", "error_rate"]
    moved += ["--data.cache", "e", "--data.cache-gib", "1", "--data.max-quarantined", "0"]
    assert differences(JOB, override(JOB, moved)) == []
    other = override(JOB, ["--seed", "1", "--fit.epochs", "6", "--fit.lr", "1e-6", "1e-4", "--model.name", "resnet18"])
    assert differences(JOB, other) == [
        "seed: 42 -> 1",
        "model.name: resnet34 -> resnet18",
        "fit.epochs: 5 -> 6",
        "fit.lr: 0.003 -> (1e-06, 0.0001)",
    ]
    assert differences(JOB, override(JOB, ["--name", "b"]), ignore=()) == ["name: run -> b"]
    numbers = ["--fit.compile", "default", "--fit.accumulate", "2", "--optim.engine", "apex", "--fit.ema", ".9"]
    assert len(differences(JOB, override(JOB, numbers))) == 4, "each changes the weights, if only a little"


def test_a_phase_more_or_another_makes_it_another_run() -> None:
    one = replace(JOB, phases=(PhaseJob(epochs=1.0),))
    assert differences(one, replace(JOB, phases=(PhaseJob(epochs=1.0, lr="find"),))) == ["phases[0].lr: None -> find"]
    added = ["phases[1].steps: None -> 5"]
    assert differences(one, replace(JOB, phases=(*one.phases, PhaseJob(steps=5)))) == added
    assert differences(one, JOB) == ["phases[0].epochs: 1.0 -> None"]


@pytest.mark.parametrize(
    ("fit", "phases", "said"),
    [
        (Fit(epochs=3), (PhaseJob(epochs=1.0),), r"fit\.epochs=3 beside \[\[phases\]\], which say how long they are"),
        (Fit(frozen_epochs=2), (PhaseJob(epochs=1.0),), r"fit\.frozen_epochs=2 beside"),
        (Fit(lr=1.0), (PhaseJob(epochs=1.0, lr=1e-3), PhaseJob(steps=5, lr="find")), r"fit\.lr=1\.0 beside"),
        (Fit(lr=1.0), (PhaseJob(epochs=1.0, lr=1e-3), PhaseJob(steps=5)), ""),
        (Fit("one_cycle"), (PhaseJob(epochs=1.0, recipe="flat_cos"),), r"fit\.recipe='one_cycle' beside"),
        (Fit(div=4.0), (PhaseJob(epochs=1.0, div=3.0), PhaseJob("b", "constant", steps=5, div=2.0)), r"fit\.div=4"),
        (Fit(warmup=0.1), (PhaseJob(epochs=1.0), PhaseJob("b", "constant", steps=5)), ""),
        (Fit("one_cycle", frozen_epochs=3), (), r"fit\.frozen_epochs=3 with recipe one_cycle"),
        (Fit(epochs=3, frozen_epochs=2, lr=1.0), (), ""),
    ],
)
def test_what_nothing_would_read_is_refused(fit: Fit, phases: tuple[PhaseJob, ...], said: str) -> None:
    job = replace(JOB, fit=fit, phases=phases)
    if not said:
        assert check(job) == job
        return
    with pytest.raises(JobError, match=rf"{said}.*: nothing would read it"):
        check(job)


def test_a_job_file_says_nothing_that_does_not_count(tmp_path: Path) -> None:
    job = replace(JOB, phases=(PhaseJob(epochs=1.0),))
    assert "fit" in tomllib.loads(to_toml(job))
    assert "epochs" not in tomllib.loads(to_toml(job))["fit"]
    (tmp_path / "job.toml").write_text(to_toml(job))
    assert from_toml(tmp_path / "job.toml") == job
    older = replace(job, fit=replace(job.fit, epochs=3))  # which was ignored, so that its run may go on
    assert differences(older, job) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = " + 900 * "[" + 900 * "]", "maximum recursion depth|unknown field a"),
        ("a = " + 5000 * "[" + 5000 * "]", "maximum recursion depth"),
        ("[" + ".".join(900 * "a") + "]\nb = 1", "unknown field a"),
        ("name = " + 400 * "[" + 400 * "]", "name=.* is of type list"),
        ('manifest = "a\\u0000b"', r"manifest='a\\x00b' holds a zero byte"),
        ('manifest = "a.parquet"\n[data]\nroot = "/a\\u0000"', r"data\.root='/a\\x00' holds a zero byte"),
    ],
)
def test_what_is_no_job_gets_a_short_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(JobError, match=said) as refused:
        check(from_toml(tmp_path / "job.toml"))
    assert len(str(refused.value)) < 500 + len(str(tmp_path))


def test_a_job_that_is_no_file_of_text_is_not_read(tmp_path: Path) -> None:
    grown(tmp_path / "grown.toml")
    with pytest.raises(JobError, match=r"grown\.toml cannot be read as a job \(too large: 1,099,511,627,776 bytes"):
        load(tmp_path / "grown.toml")
    os.mkfifo(tmp_path / "pipe.arrow")
    with pytest.raises(JobError, match=r"pipe\.arrow is not a regular file, so there is nothing to train on"):
        load(tmp_path / "pipe.arrow")


def test_reading_a_job_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'nvidia', 'pyarrow', 'numpy', 'tyro'} & set(sys.modules)"
    code = f"import sys, thawline.cluster.job.job; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_long_values_and_names_are_cut_in_sentences(tmp_path: Path) -> None:
    long = "x" * 100_000
    mappings: list[dict[str, Any]] = [
        {"fit": {"recipe": long}},
        {"fit": {"epochs": long}},
        {"fit": {"lr": [1.0] * 50_000}},
        {long: 1},
        {"data": [long]},
        {"name": f"a/{long}"},
    ]
    for mapping in mappings:
        with pytest.raises(JobError) as caught:
            check(from_dict(mapping))
        assert len(str(caught.value)) < 600, str(caught.value)[:200]
    (tmp_path / "job.toml").write_text("manifest = " + "[" * 100_000)
    with pytest.raises(JobError, match=r"job\.toml (is not valid TOML|cannot be read as a job)") as caught:
        from_toml(tmp_path / "job.toml")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("name", "fits"), [(100 * "é", True), (101 * "é", False), (201 * "n", False)])
def test_a_name_leaves_room_for_the_files_called_after_it(name: str, fits: bool) -> None:
    job = Job(name=name, manifest="a.parquet")
    if fits:
        assert check(job) == job
    else:
        with pytest.raises(JobError, match="at most 200 bytes"):
            check(job)
