"""Do the files of deploy/ hold, and would their checks notice if they did not?

Every check is run on the files as they are, which must have no problems, and on files with a mistake planted.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import thawline
from tests.kit import deploy_checks as checks
from tests.kit import deploy_commands as commands
from tests.kit.prometheus import promtool
from thawline.cluster.observe.settings import Metrics

DEPLOY, ROOT = checks.DEPLOY, checks.DEPLOY.parent
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))


def read(name: str) -> str:
    return (DEPLOY / name).read_text()


def of_manifests(name: str, text: str) -> list[str]:
    """The problems of one manifest, and of all of them together, if `name` had this text."""
    texts = {file.name: file.read_text() for file in MANIFESTS} | {Path(name).name: text}
    objects = {file: checks.documents(content) for file, content in texts.items()}
    alone = [problem for document in objects[Path(name).name] for problem in checks.manifest(document)]
    return alone or checks.together([document for file in objects.values() for document in file])


def of_dockerfile(name: str, text: str) -> list[str]:
    return checks.dockerfile(text, (ROOT / ".dockerignore").read_text())


CHECKED: dict[str, Callable[[str, str], list[str]]] = {
    **{f"kuberay/{file.name}": of_manifests for file in MANIFESTS},
    "compose.yaml": lambda name, text: checks.compose(text),
    "ray-up.yaml": lambda name, text: checks.ray_up(text),
    "slurm.sbatch": lambda name, text: checks.slurm(text),
    "Dockerfile": of_dockerfile,
}


@pytest.mark.parametrize("name", CHECKED)
def test_file_has_no_problem(name: str) -> None:
    assert CHECKED[name](name, read(name)) == []


@pytest.mark.parametrize(
    ("name", "right", "wrong", "said"),
    [
        # a field, a type, a value that the schema does not know
        ("kuberay/raycluster.yaml", "workerGroupSpecs:", "workerGroupSpec:", "'workerGroupSpec' was unexpected"),
        ("kuberay/raycluster.yaml", "replicas: 2", 'replicas: "2"', "'2' is not of type 'integer'"),
        ("kuberay/raycluster.yaml", 'num-cpus: "0"', "num-cpus: 0", "0 is not of type 'string'"),
        ("kuberay/raycluster.yaml", "mode: token", "mode: disabled", "'disabled' is not one of"),
        ("kuberay/raycluster.yaml", "containerPort: 8265", 'containerPort: "8265"', "containerPort"),
        ("kuberay/raycluster.yaml", "fsGroup:", "fsgroup:", "'fsgroup' was unexpected"),
        ("kuberay/rayjob.yaml", "HTTPMode", "HttpMode", "'HttpMode' is not one of"),
        ("kuberay/rayjob.yaml", "shutdownAfterJobFinishes: true", "shutdownAfterJobFinish: true", "was unexpected"),
        ("kuberay/networkpolicy.yaml", "podSelector:", "podSelectors:", "'podSelectors' was unexpected"),
        ("kuberay/podmonitor.yaml", "interval: 15s", "interval: 15", "15 is not of type 'string'"),
        ("kuberay/storage.yaml", "v1", "v2", "not an object that Kubernetes"),
        # what the schema allows and the house does not
        ("kuberay/raycluster.yaml", 'num-cpus: "0"', 'num-cpus: "4"', "the head trains, too"),
        ("kuberay/raycluster.yaml", 'limits: {cpu: "12"', 'limits: {cpu: "16"', "requests and limits differ"),
        (
            "kuberay/raycluster.yaml",
            "medium: Memory, sizeLimit: 16Gi",
            "sizeLimit: 16Gi",
            "/dev/shm is not held in memory",
        ),
        ("kuberay/raycluster.yaml", "runAsUser: 10001", "runAsUser: 0", "may run as root"),
        ("kuberay/raycluster.yaml", "name: shared, mountPath", "name: runs, mountPath", "runs, which is no volume"),
        # objects that do not fit one another
        ("kuberay/podmonitor.yaml", "port: thawline-1", "port: thawline-2", "no pod offers port thawline-2"),
        ("kuberay/networkpolicy.yaml", "port: 9401", "port: 9410", "no pod offers port 9410"),
        (
            "kuberay/networkpolicy.yaml",
            "  podSelector:\n    matchLabels: {app.kubernetes.io/part-of: thawline}",
            "  podSelector:\n    matchLabels: {app: thawline}",
            "leaves out 4 of the 4",
        ),
        (
            "kuberay/storage.yaml",
            "name: thawline-shared",
            "name: shared",
            "nothing makes the volume claim thawline-shared",
        ),
        ("kuberay/rayjob.yaml", 'cpu: "12"', 'cpu: "6"', "describe different pods"),
        # compose
        ("compose.yaml", "shm_size:", "shm_sise:", "'shm_sise' was unexpected"),
        ("compose.yaml", "condition: service_healthy", "condition: healthy", "'condition': 'healthy'"),
        ("compose.yaml", "127.0.0.1:8265:8265", "8265:8265", "head: port 8265:8265 is open to the network"),
        ("compose.yaml", "127.0.0.1:9090:9090", "127.0.0.1:9091:9091", "no service offers head:9090"),
        ("compose.yaml", "secrets: [ray_token]", "secrets: [token]", "token is none of the secrets"),
        ("compose.yaml", "service:head", "service:header", "header is no service"),
        ("compose.yaml", "./rules.yml:", "./rule.yml:", "deploy/./rule.yml does not exist"),
        ("compose.yaml", "prom/prometheus:v3.5.0", "prom/prometheus:latest", "is not pinned"),
        ("compose.yaml", "${THAWLINE_UID:-1000}", "${THAWLINE_UID}", "has no default"),
        # Ray's launcher
        ("ray-up.yaml", "file_mounts:", "file_mount:", "'file_mount' was unexpected"),
        ("ray-up.yaml", "head_node_type: head", "head_node_type: master", "must be one of `available_node_types`"),
        ("ray-up.yaml", "min_workers: 2", "min_workers: none", "'none' is not of type 'integer'"),
        ("ray-up.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "open to the network"),
        ("ray-up.yaml", "~/.ray/auth_token: ", "~/.ray/token: ", "no token reaches the nodes"),
        # shell
        ("slurm.sbatch", '"$pid_file" "$job" "$@" &', '"$pid_file" $job "$@" &', "SC2086"),
        ("slurm.sbatch", "fi\nexit", "exit", "SC1"),
        (
            "slurm.sbatch",
            "--signal=B:TERM@300",
            "--signal=TERM@300",
            "is not a directive of sbatch that this script needs",
        ),
        (
            "slurm.sbatch",
            "--ntasks-per-node=1",
            "--task-per-node=1",
            "is not a directive of sbatch that this script needs",
        ),
        ("slurm.sbatch", "#SBATCH --requeue\n", "", "there is no --requeue"),
        ("slurm.sbatch", "set -euo pipefail\n", "set -euo pipefail\n#SBATCH --exclusive\n", "after the first command"),
        # the image
        ("Dockerfile", "26.09-py3", "latest", "there is not one base with a release in its name"),
        ("Dockerfile", "USER 10001:0", "USER root", "the last USER is root"),
        ("Dockerfile", "USER 10001:0", "USER thawline", "has no number"),
        ("Dockerfile", "--no-cache-dir /wheels", "/wheels", "DL3042"),
        ("Dockerfile", "COPY models models", "COPY data data", "data is copied, but ignored"),
        ("Dockerfile", '"$kept" > /opt', "$kept > /opt", "SC2086"),
    ],
)
def test_planted_mistake_is_noticed(name: str, right: str, wrong: str, said: str) -> None:
    assert right in read(name)
    problems = CHECKED[name](name, read(name).replace(right, wrong))
    assert any(said in problem for problem in problems), problems


# Commands -----------------------------------------------------------------------------------------------------

WITH_COMMANDS = sorted(
    *[[*DEPLOY.glob("**/*.y*ml"), *DEPLOY.glob("*.md"), DEPLOY / "slurm.sbatch", DEPLOY / "Dockerfile"]],
)


@pytest.mark.parametrize("file", WITH_COMMANDS, ids=lambda file: str(file.relative_to(DEPLOY)))
def test_every_command_is_understood(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")  # whoever reads an alert has set it
    assert [problem for words in commands.in_file(file) for problem in commands.parse_command(words)] == []


def test_commands_are_found_wherever_they_stand(tmp_path: Path) -> None:
    cases = {
        "a.sbatch": 'export A=1\nsrun --x=1 ray symmetric-run --address "$a" -- \\\n'
        ' bash -c \'exec thawline train "$0" "$@"\' &\n',
        "b.yaml": "a: [ray, start, --head]\nb: thawline train x.toml  # thawline in a comment\nname: thawline\n",
        "c.md": "The thawline of spring; `thawline list` and `thawline stop x`.\n```sh\n"
        'kubectl a="$(thawline token)" && thawline status\n```\n```text\nthawline says\n```\n',
    }
    found = dict[str, list[str]]()
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
        found[name] = [" ".join(words) for words in commands.in_file(tmp_path / name)]
    assert found["a.sbatch"][1:] == ["thawline train 0"]
    assert found["a.sbatch"][0].startswith("ray symmetric-run --address a -- bash -c")
    assert found["b.yaml"] == ["ray start --head", "thawline train x.toml"]
    assert found["c.md"] == ["thawline token", "thawline status", "thawline list --help", "thawline stop x"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("thawline submitt JOB --address http://127.0.0.1:8265", "submitt"),
        ("thawline submit JOB --adress http://127.0.0.1:8265", "adress"),
        ("thawline train JOB --address auto --metrics.hots 0.0.0.0", "hots"),
        ("thawline train JOB --address auto --workers many", "many"),
        ("thawline stop --now", "Required options"),
        ("ray start --head --dashboard-hots=127.0.0.1", "--dashboard-hots"),
        ("ray symmetric-run --address H:6379 --min-nodes two -- thawline train JOB", "two"),
        ("ray symmetric-run --address H:6379 --head -- thawline train JOB", "--head"),
        ("ray symmetric-run --address H:6379 --num-cpu 3 -- thawline train JOB", "--num-cpu"),
        ("ray upp deploy/ray-up.yaml", "no command of Ray's"),
    ],
)
def test_mistaken_command_is_noticed(command: str, said: str) -> None:
    problems = commands.parse_command(command.split())
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("group", ["headGroupSpec", "workerGroupSpecs"])
def test_start_parameters_of_kuberay_are_options_of_ray_start(group: str) -> None:
    spec = checks.cluster_spec(checks.documents(read("kuberay/raycluster.yaml"))[0])
    groups = spec[group] if isinstance(spec[group], list) else [spec[group]]
    for one in groups:
        options = [f"--{name}={value}" for name, value in one["rayStartParams"].items()]
        assert commands.parse_command(["ray", "start", *options]) == []


def test_scripts_in_other_files_pass_shellcheck() -> None:
    fences = [code for code in commands.code_of(read("README.md")) if "\n" in code]
    config = yaml.safe_load(read("ray-up.yaml"))
    keys = ("head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    entrypoint = checks.documents(read("kuberay/rayjob.yaml"))[0]["spec"]["entrypoint"]
    scripts = [*fences, *(command for key in keys for command in config[key]), entrypoint]
    assert len(scripts) > 10
    assert [problem for script in scripts for problem in checks.shell(script)] == []


# What belongs together ----------------------------------------------------------------------------------------


def test_all_say_the_same_version_of_ray_and_of_thawline() -> None:
    image = f"thawline:{thawline.__version__}"
    assert {
        spec["rayVersion"] for file in MANIFESTS if (spec := checks.cluster_spec(checks.documents(file.read_text())[0]))
    } == {version("ray")}
    assert re.findall(r"^ARG RAY=(.+)$", read("Dockerfile"), re.M) == [version("ray")]
    named = {
        found
        for file in (*WITH_COMMANDS, DEPLOY / "Dockerfile")
        for found in re.findall(r"\bthawline:\d[\w.]*", file.read_text())
    }
    assert named == {image}


def test_readme_names_every_file_and_no_other() -> None:
    text = read("README.md")
    named = {
        *re.findall(r"(?<!tests/)\bdeploy/([\w./-]+\w)", text),
        *re.findall(r"`([\w./-]+\.(?:ya?ml|json)|Dockerfile)`", text),
    }
    there = {str(file.relative_to(DEPLOY)) for file in DEPLOY.rglob("*") if file.is_file()}
    there |= {Path(name).name for name in there}
    assert [name for name in named if name not in there and name != "job.toml"] == []
    for file in (
        "Dockerfile",
        "compose.yaml",
        "ray-up.yaml",
        "slurm.sbatch",
        *(f"kuberay/{m.name}" for m in MANIFESTS),
    ):
        assert file in text, file


def test_prometheus_of_compose_reads_its_configuration_and_asks_where_a_driver_answers() -> None:
    checked = promtool("check", "config", DEPLOY / "compose.prometheus.yml")
    assert checked.returncode == 0, checked.stderr
    ports = re.findall(r"http://127\.0\.0\.1:(\d+)/targets", read("compose.prometheus.yml"))
    assert ports == [str(Metrics().sd_port)]


# The scripts, with stand-ins for the programs that they call --------------------------------------------------


def stand_ins(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which these programs are bash scripts of the given text."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


SLURM = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >>"$SAID"',
    # As Ray's: the words before -- are its own; the command is run, and its status is handed on.
    "ray": 'echo "ray $*" >>"$SAID"; while [[ $1 != -- ]]; do shift; done; shift; "$@"',
}


def start_slurm(tmp_path: Path, thawline: str) -> tuple[subprocess.Popen[bytes], Path]:
    said, token = tmp_path / "said", tmp_path / "token"
    token.write_text("secret")
    environment = stand_ins(tmp_path / "bin", **SLURM, thawline=thawline)
    environment |= {
        "SAID": str(said),
        "RAY_AUTH_TOKEN_PATH": str(token),
        "HEAD_IP": "10.0.0.1",
        "TMPDIR": str(tmp_path),
    }
    environment |= {"SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "17"}
    script = subprocess.Popen(["bash", DEPLOY / "slurm.sbatch", "my job.toml", "--workers", "16"], env=environment)
    return script, said


def test_slurm_script_runs_the_job_once_and_hands_on_its_end(tmp_path: Path) -> None:
    script, said = start_slurm(tmp_path, 'printf "<%s>" thawline "$@" >>"$SAID"; echo >>"$SAID"; exit 3')
    assert script.wait(timeout=20) == 3
    ray, thawline = said.read_text().splitlines()
    assert ray.startswith("ray symmetric-run --address 10.0.0.1:6379 --min-nodes 2 --num-cpus 8 -- ")
    assert thawline == "<thawline><train><my job.toml><--address><auto><--workers><16>"


@pytest.mark.parametrize(("end", "requeued"), [(0, []), (143, ["scontrol requeue 17"]), (1, [])])
def test_slurm_notice_reaches_the_run_which_then_is_requeued(tmp_path: Path, end: int, requeued: list[str]) -> None:
    thawline = f'trap "echo checkpoint >>$SAID; exit {end}" TERM; echo ready >>"$SAID"; for ((;;)); do sleep 0.05; done'
    script, said = start_slurm(tmp_path, thawline)
    while not (said.exists() and "ready" in said.read_text()):
        assert script.poll() is None
    script.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM does
    assert script.wait(timeout=20) == end
    assert said.read_text().splitlines()[1:] == ["ready", "checkpoint", *requeued]


def test_slurm_script_says_when_there_is_no_token(tmp_path: Path) -> None:
    environment = {**stand_ins(tmp_path / "bin", **SLURM), "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    done = subprocess.run(
        ["bash", DEPLOY / "slurm.sbatch", "job.toml"], env=environment, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 1
    assert "thawline token --create" in done.stderr


def test_wheel_is_made_of_what_the_builder_gets(tmp_path: Path) -> None:
    for line in re.findall(r"^COPY (.+)", read("Dockerfile"), re.M):
        *sources, target = line.split()
        for source in (ROOT / name for name in sources):
            if source.is_dir():
                shutil.copytree(source, tmp_path / target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tmp_path)
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path / "wheels"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "wheels").iterdir()
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packages = ("cluster", "dataio", "models", "trainer", "benchmarks")
    ours = {f"thawline/{file.relative_to(ROOT)}" for package in packages for file in (ROOT / package).rglob("*.py")}
    assert ours | {"thawline/cluster/results/report.html.j2", "thawline/py.typed"} <= packed
    assert {name.partition("/")[0] for name in packed} == {"thawline"}


@pytest.mark.parametrize(
    ("after", "builds"),
    [
        ("torch==2.14.0a0+b2c\nnvidia-dali-cuda130==2.4.0\napex==0.1\nray==2.60.0\nnumpy==2.4.1", True),
        ("torch==2.15.0\nnvidia-dali-cuda130==2.4.0\napex==0.1\nray==2.60.0\nnumpy==2.4.0", False),
        ("torch==2.14.0a0+b2c\nnvidia-dali-cuda130==2.4.0\nnvidia-dali-cuda120==2.4.0\napex==0.1\nray==2.60.0", False),
        ("torch==2.14.0a0+b2c\nnvidia-dali-cuda130==2.4.0\nray==2.60.0", False),
    ],
    ids=["only others moved", "torch was replaced", "a second DALI came", "apex went"],
)
def test_image_is_built_only_if_pip_left_the_base_as_it_was(tmp_path: Path, after: str, builds: bool) -> None:
    run = re.search(r"^RUN --mount=\S+ \\\n((?:.+\\\n)*.+\n)", read("Dockerfile"), re.M)
    assert run
    before = "torch==2.14.0a0+b2c\nnvidia-dali-cuda130==2.4.0\napex==0.1\nnumpy==2.4.0"
    (tmp_path / "list").write_text(f"{before}\n")
    python = f'''case "$3" in
list) cat {tmp_path}/list ;;
install) cp "$PIP_CONSTRAINT" {tmp_path}/constraint; printf '%s\\n' "{after}" >{tmp_path}/list ;;
esac'''
    environment = {**stand_ins(tmp_path / "bin", python=python), "RAY": "2.60.0"}
    script = run[1].replace("/opt/", f"{tmp_path}/")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], env=environment, capture_output=True, timeout=20)
    assert (done.returncode == 0) == builds
    constraint = (tmp_path / "constraint").read_text().splitlines()
    assert constraint == ["torch==2.14.0a0+b2c", "nvidia-dali-cuda130==2.4.0", "apex==0.1"]
