"""Do imports run downward only? Every import is read with ast, also those inside functions and type checks.

The rules, as CONTRIBUTING.md draws them and the code stands:
- dataio and models are floor 1, trainer 2, cluster 3, benchmarks 4; a package imports itself and lower floors only,
  so dataio and models never see one another, and nobody imports tests or benchmarks;
- of dataio, trainer knows `batch` (the Batch and the Loader protocol), `hashing`, `errors`, and where files lie and
  appear whole (`files`, `root`, `atomic`); of models, `groups` and `errors`;
- nvidia.dali is imported in dataio/pixels/dali.py and dataio/pixels/decoding.py (and by benchmarks, which measure it bare), ray
  within cluster, ray.train in cluster/launch/ray_train.py and cluster/launch/ray_policies.py, apex in trainer/optim.py.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {"dataio": 1, "models": 1, "trainer": 2, "cluster": 3, "benchmarks": 4, "tests": 5}
TRAINER_KNOWS = (
    *(
        "thawline.dataio.batch",
        "thawline.dataio.hashing",
        "thawline.dataio.errors",
        "thawline.dataio.store.files",
        "thawline.dataio.store.root",
        "thawline.dataio.store.atomic",
    ),
    "thawline.dataio.store.private",
    *("thawline.models.groups", "thawline.models.errors"),
)
ONLY_IN = {
    "nvidia.dali": ("dataio/pixels/dali.py", "dataio/pixels/decoding.py", "benchmarks/"),
    "ray": ("cluster/",),
    "ray.train": ("cluster/launch/ray_train.py", "cluster/launch/ray_policies.py"),
    "apex": ("trainer/optim.py",),
}


def imported(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) that a file imports; `from a import b` gives a.b, whatever b is."""
    package = path.removesuffix(".py").removesuffix("/__init__").split("/")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from ((node.lineno, name) for name in names if isinstance(name, str))


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def violations(files: Mapping[str, str]) -> list[str]:
    """What is wrong with these sources, by their path from the root: a sentence each."""
    wrong = []
    for path, source in files.items():
        mine = path.split("/")[0]
        for line, name in imported(path, source):
            other = name.split(".")[0]
            at = f"{path}:{line} imports {name}"
            if other in FLOORS and other != mine and FLOORS[other] >= FLOORS[mine]:
                wrong.append(f"{at}: {mine} is floor {FLOORS[mine]}, {other} {FLOORS[other]}")
            known = any(within(name, module) for module in TRAINER_KNOWS)
            if mine == "trainer" and other in ("dataio", "models") and not known:
                wrong.append(f"{at}: trainer knows only {', '.join(TRAINER_KNOWS)}")
            wrong += [
                f"{at}: {module} belongs to {' and '.join(places)}"
                for module, places in ONLY_IN.items()
                if within(name, module) and not path.startswith(places)
            ]
    return wrong


def product() -> dict[str, str]:
    folders = [name for name in FLOORS if name != "tests"]
    return {
        file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
        for folder in folders
        for file in sorted((ROOT / folder).rglob("*.py"))
    }


def test_imports_run_downward_only() -> None:
    assert violations(product()) == []


def test_the_walk_sees_every_room_and_the_edges_that_are_known() -> None:
    files = product()
    assert {path.split("/")[0] for path in files} == {"dataio", "models", "trainer", "cluster", "benchmarks"}
    for path, name in (
        ("dataio/pixels/dali.py", "nvidia.dali.fn"),
        ("cluster/launch/ray_train.py", "ray.train"),  # inside a function
        ("trainer/optim.py", "apex.optimizers"),  # a string given to import_module
        ("trainer/learner.py", "thawline.models.groups"),
        ("cluster/run/run.py", "thawline.trainer.learner.Learner"),
    ):
        assert name in {found for _, found in imported(path, files[path])}, f"{name} in {path}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dataio/x.py", "import trainer"),
        ("dataio/x.py", "from thawline.models import groups"),
        ("models/x.py", "import thawline.dataio.batch as b"),
        ("models/x.py", "def f():\n    from thawline.cluster.run.run import run"),
        (
            "trainer/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from thawline.cluster.job.job import Job",
        ),
        ("trainer/x.py", "from thawline.dataio.stream.loader import ImageLoader"),
        ("trainer/x.py", "from thawline.dataio import ImageSpec"),
        ("trainer/x.py", "import models"),
        ("trainer/x.py", "import nvidia.dali.fn as fn"),
        ("trainer/x.py", "import importlib\nimportlib.import_module('ray.train')"),
        ("cluster/x.py", "import benchmarks.presize"),
        ("cluster/x.py", "from ray import train"),
        ("cluster/x.py", "async def f():\n    import ray.train.torch"),
        ("cluster/x.py", "__import__('apex')"),
        ("cluster/sub/x.py", "from ...benchmarks import harness"),
        ("benchmarks/x.py", "from tests.kit.images import photo"),
        ("dataio/stream/loader.py", "from nvidia import dali"),
    ],
)
def test_a_planted_edge_is_caught(path: str, source: str) -> None:
    assert any(sentence.startswith(f"{path}:") for sentence in violations({path: source}))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "trainer/x.py",
            "from thawline.dataio.batch import Batch, Loader\nfrom dataio import hashing\nfrom models import groups",
        ),
        ("trainer/x.py", "from . import world\nfrom .schedule import cosine"),
        ("trainer/__init__.py", "from .learner import Learner"),
        ("cluster/x.py", "import ray\nimport dataio, models, trainer"),
        ("benchmarks/x.py", "from thawline.cluster.run.run import run"),
        ("dataio/x.py", "import datasets\nimport rayon"),
    ],
)
def test_what_the_house_allows_passes(path: str, source: str) -> None:
    assert violations({path: source}) == []
