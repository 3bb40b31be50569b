"""What does the command line say of itself? Help, misuse, version and completion: the right verb's, and at once."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.kit.runs import environment
from thawline.cluster.cli import main
from thawline.cluster.cli.train import Train
from thawline.cluster.cli.verbs import JobVerb, parse, with_job
from thawline.cluster.job import job as jobs
from thawline.cluster.job.job import Augment, Data, Fit, Job, PhaseJob

Told = Callable[..., tuple[int, str, str]]
OWN = {"show": "--out", "lr-find": "--out", "train": "--address", "submit": "--address --follow --package --fresh"}


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """(exit status, stdout, stderr) of what `thawline WORDS` says without being run."""

    def tell(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main.check_arguments(words)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return tell


@pytest.mark.parametrize("verb", main.VERBS)
def test_help_is_the_verbs_own(verb: str, told: Told) -> None:
    status, out, err = told(verb, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: thawline {verb} [-h] ")
    assert not re.search(r"^\W+(STR|PATH)\b", out, re.MULTILINE), "what is given by place is called what it is"
    if not issubclass(main.VERBS[verb], JobVerb):
        return
    places = [out.index(f" {word} ") for word in ["JOB", *OWN.get(verb, "").split(), "--name", "--fit.lr"]]
    assert places[0] == min(places)
    assert max(places[1:-2], default=0) < places[-2] < places[-1], "the verb's flags come before the job's"
    phases = out[out.index("[[phases]] in JOB") :]
    assert re.findall(r"^  (\w+) ", phases, re.MULTILINE) == [field.name for field in fields(PhaseJob)]


STATUS = """
import ray.job_submission, socket
from types import SimpleNamespace
from thawline.cluster.jobs import client, log_records, token
token.use_token = lambda: None
socket.create_connection = lambda *_, **__: SimpleNamespace(close=lambda: None)
rows = [
    {"kind": "train", "step": 8, "epoch": 2.0, "loss": 0.5, "images_per_s": 9.0},
    {"kind": "valid", "step": 8, "valid_loss": 0.25, "error_rate": 0.125},
]
info = dict(submission_id="a.1", status=SimpleNamespace(value="RUNNING"), metadata={"thawline": "a"}, message="")
info |= dict(driver_exit_code=None, start_time=1000, end_time=None, runtime_env={})
there = SimpleNamespace(
    list_jobs=lambda: [SimpleNamespace(**info)],
    get_job_logs=lambda known: "\\n".join(map(log_records.encode, rows)),
)
client.Cluster._open = lambda self: there
"""
"""In place of a cluster on which job `a` runs; Ray's own client is imported as it would be."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "before", "status", "said", "heavy"),
    [
        ("--help", "", 0, "thawline VERB --help", "torch ray pyarrow numpy matplotlib rich"),
        ("show --help", "", 0, "--out FILE", "torch ray pyarrow numpy matplotlib rich"),
        ("index --help", "", 0, "SOURCE", "torch ray pyarrow numpy matplotlib rich"),
        ("status a --address http://h:1", STATUS, 3, '"valid_loss": 0.25, "error_rate": 0.125}', "torch matplotlib"),
    ],
)
def test_what_needs_no_torch_waits_for_none(words: str, before: str, status: int, said: str, heavy: str) -> None:
    code = f"""
import sys
sys.argv[1:] = {words.split()}
{before}
from thawline.cluster.cli.main import main
try:
    main()
finally:
    print(sorted({{*{heavy.split()}}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == status, done.stderr
    assert said in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("submit j.toml --address --workers 2", "Missing value for argument '--address'"),
        ("train j.toml --name --debug", "Missing value for argument '--name'"),
        ("show j.toml", "--out"),
        ("train j.toml --out a.png", "Unrecognized options: --out, a.png"),
        ("train j.toml --fit.epoch 3", "--fit.epochs INT"),
        ("train j.toml --fit.lr abc", "expected argument count"),
        ("train j.toml --workers 1 2 3", "expected argument count"),
        ("logs", "NAME"),
        ("trian j.toml", "did you mean train?"),
    ],
)
def test_misuse_is_told_without_markup(words: str, said: str, told: Told) -> None:
    status, out, err = told(*words.split())
    assert (status, out) == (2, "")
    assert said in err
    assert "bold]" not in err
    assert "in thawline show" not in err, "other verbs' options are no hint"


def test_an_option_of_a_verb_may_be_a_value() -> None:
    words = ["train", "j.toml", "--name=--debug", "--model.weights", "fresh"]
    verb = with_job(parse(Train, words), words, file=Job(manifest="a.parquet"))
    assert (verb.debug, verb.fresh, verb.fields.name) == (False, False, "--debug")
    flagged = parse(Train, [*words, "--debug", "--fresh", "--address", "auto"])
    assert (flagged.debug, flagged.fresh, flagged.address) == (True, True, "auto")


def test_flags_go_on_top_of_the_file_and_options_are_not_lost() -> None:
    words = ["train", "--fresh", "j.toml", "--augment.no-flip", "--fit.epochs", "7"]
    file = Job(manifest="/a.parquet", storage="/runs", data=Data(global_batch=8), augment=Augment(dihedral=True))
    verb = with_job(parse(Train, words), words, file=file)
    assert verb.fresh
    assert verb.fields == replace(file, augment=Augment(dihedral=True, flip=False), fit=Fit(epochs=7))


def test_the_version_is_the_distributions(told: Told) -> None:
    assert told("--version") == (0, f"thawline {version('thawline')}\n", "")


@pytest.mark.slow
def test_a_shell_completes_verbs_options_and_choices(tmp_path: Path) -> None:
    env = environment()
    script = subprocess.run(
        [sys.executable, "-m", "thawline.cluster.cli", "completion", "bash"], stdout=-1, env=env, check=True
    )
    (tmp_path / "completion").write_bytes(script.stdout)
    (tmp_path / "try").write_text("""
        source "$1/completion"
        complete=$(complete -p thawline | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        try() {
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
            $complete thawline "${@: -1}" "${@: -2:1}"; echo "${COMPREPLY[*]}"
        }
        try thawline su; try thawline train j.toml --fit.ep; try thawline submit j.toml --package ""
    """)
    done = subprocess.run(["bash", tmp_path / "try", tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["submit", "--fit.epochs", "ship installed"]


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (Job(), ""),
        (Job(manifest="a.parquet", fit=Fit(lr=(1e-6, 1e-4))), 'manifest = "a.parquet"\n\n[fit]\nlr = [\n    1e-06,'),
        (
            replace(Job(), augment=Augment(preset="plain", flip=False, rotate_deg=0.0, max_zoom=1.0)),
            "[augment]\nmax_warp = 0.2",
        ),
        (Job(phases=(PhaseJob(epochs=1.0), PhaseJob(steps=3, lr="find"))), "phases = [\n    { epochs = 1.0 },"),
    ],
)
def test_what_is_printed_of_a_job_is_what_makes_it(job: Job, text: str) -> None:
    brief = jobs.to_toml(job, brief=True)
    assert brief.startswith(text)
    assert len(brief.splitlines()) < 12
    assert jobs.from_dict(tomllib.loads(brief)) == jobs.from_dict(tomllib.loads(jobs.to_toml(job))) == job
