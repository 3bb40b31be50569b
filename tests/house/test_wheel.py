"""Is what `pip install` installs thawline alone, and does it work beside a user's own `models/` and `trainer/`?

The wheel is built from the checkout and from the sdist, and installed into an environment that borrows this one's
libraries by a .pth file: their own .pth files do not count there, so this checkout is out of sight.
"""

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.kit import blocks
from tests.kit.runs import write_some_digits
from thawline.cluster.machine import provenance

pytestmark = pytest.mark.slow
FOREIGN = {
    "models/__init__.py": "MINE = 1",
    "models/classifier.py": "raise ImportError('not ours')",
    "trainer/__init__.py": "MINE = 2",
    "cluster.py": "MINE = 3",
    "dataio.py": "MINE = 4",
    "utils/__init__.py": "MINE = 5",
}
IMPORTS = """
import cluster, dataio, models, trainer, utils
assert [m.MINE for m in (models, trainer, cluster, dataio, utils)] == [1, 2, 3, 4, 5]
import sys, thawline
assert thawline.__file__.startswith(sys.prefix), thawline.__file__
"""


def run(*command: str | Path, cwd: Path) -> str:
    """What it prints. It must end with status 0."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hatchling(target: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist of the checkout at `source`."""
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out, cwd=source)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Built from the checkout, and from the sdist."""
    folder = tmp_path_factory.mktemp("wheels")
    sdist = hatchling("sdist", provenance.HOME, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return [hatchling("wheel", provenance.HOME, folder / "one"), hatchling("wheel", unpacked, folder / "other")]


@pytest.fixture(scope="module")
def installed(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that the sdist's wheel was installed into."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python")
    run(*pip, "install", "-q", "--no-deps", "--no-index", "--no-compile", wheels[1], cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    assert {entry.name for entry in site.iterdir() if entry.suffix != ".dist-info"} == {"thawline"}
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home / "bin"


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A folder of research code whose modules have our packages' names."""
    for name, text in FOREIGN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_both_wheels_hold_thawline_all_of_it_and_nothing_else(wheels: list[Path]) -> None:
    one, other = (set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels)
    assert one == other
    assert {name.split("/")[0].partition("-")[0] for name in one} == {"thawline"}
    assert "thawline/py.typed" in one
    tracked = run("git", "ls-files", "thawline", *provenance.PACKAGES, cwd=provenance.HOME).splitlines()
    sources = {name if name.startswith("thawline/") else f"thawline/{name}" for name in tracked if name.endswith(".py")}
    assert sources == {name for name in one if name.endswith(".py")}


def test_the_doctor_of_an_installed_wheel_finds_itself_there(installed: Path, beside: Path) -> None:
    said = run(installed / "thawline", "doctor", cwd=beside)
    assert str(installed.parent) in said
    assert str(provenance.HOME) not in said


def test_the_readme_s_example_runs_as_a_script_beside_folders_of_our_names(installed: Path, beside: Path) -> None:
    text = (provenance.HOME / "README.md").read_text()
    (example,) = (block.code for block in blocks.blocks("README.md", text) if block.language == "python")
    (beside / "train.py").write_text(IMPORTS + example)
    write_some_digits(beside / "data/digits", 300)
    assert "error_rate" in run(installed / "python", "train.py", cwd=beside)


def test_a_notebook_started_there_works_too(installed: Path, beside: Path) -> None:
    """Its kernel looks for modules in the folder that it is started in first: sys.path[0] is ''."""
    cells = """
import torch
print(sys.path[0] == "", thawline.create("tiny", 3, weights="none")(torch.ones(2, 3, 32, 32)).shape)
"""
    assert run(installed / "python", "-c", IMPORTS + cells, cwd=beside) == "True torch.Size([2, 3])\n"
