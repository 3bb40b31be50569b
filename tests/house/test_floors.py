"""Do imports run downward only, and in no circle? Every import is read with ast, wherever it stands.

The rules, as CONTRIBUTING.md draws them and the code stands:
- everything of ours is imported as `thawline...`; the folders' own names are those of other people's packages, too;
- dataio and models are floor 1, trainer 2, cluster 3, benchmarks 4; a package imports itself and lower floors only,
  so dataio and models never see one another, and nobody imports tests or benchmarks;
- within a package no chain of imports comes back to where it began, and nothing of cluster imports the command line,
  which stands on all of it;
- of dataio, trainer knows the Batch and the Loader protocol, hashing, errors, ranges, and where files lie and
  appear whole; of models, groups, errors, and how a user's code is found;
- nvidia.dali, ray, ray.train, peft, segmentation_models_pytorch, onnx, onnxruntime, onnxscript, fastapi, starlette,
  uvicorn, httpx2 and apex are imported where ONLY_IN says.
"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {"dataio": 1, "models": 1, "trainer": 2, "cluster": 3, "benchmarks": 4}
TRAINER_KNOWS = (
    *("dataio.batch", "dataio.hashing", "dataio.errors", "dataio.ranges"),
    *("dataio.store.files", "dataio.store.root", "dataio.store.atomic", "dataio.store.private"),
    *("models.groups", "models.folding", "models.errors", "models.code"),
)
ONLY_IN = {
    "nvidia.dali": ("dataio/pixels/dali.py", "dataio/pixels/decoding.py", "benchmarks/"),
    "ray": ("cluster/",),
    "ray.train": ("cluster/launch/ray_train.py", "cluster/launch/ray_policies.py"),
    "peft": ("models/lora.py",),
    "segmentation_models_pytorch": ("models/decoders.py",),
    "onnx": ("cluster/serve/export/onnx_file.py",),
    "onnxruntime": ("cluster/serve/export/onnx_file.py",),
    "onnxscript": ("cluster/serve/export/onnx_file.py",),
    "fastapi": ("cluster/serve/endpoint/",),
    "starlette": ("cluster/serve/endpoint/",),
    "uvicorn": ("cluster/serve/endpoint/",),
    "httpx2": ("cluster/serve/endpoint/",),
    "apex": ("trainer/optimisers/optim.py",),
}


def imported(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) that a file imports; `from a import b` gives a.b, whatever b is."""
    package = ["thawline", *path.removesuffix(".py").removesuffix("/__init__").split("/")]
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
            at = f"{path}:{line} imports {name}"
            if name.split(".")[0] in FLOORS:
                wrong.append(f"{at}: write thawline.{name}, others have packages of that name")
            if name.split(".")[0] == "tests" and mine != "tests":
                wrong.append(f"{at}: tests are above every floor")
            ours = name.removeprefix("thawline.")
            other = ours.split(".")[0] if ours != name else ""
            if mine in FLOORS and other in FLOORS and other != mine and FLOORS[other] >= FLOORS[mine]:
                wrong.append(f"{at}: {mine} is floor {FLOORS[mine]}, {other} {FLOORS[other]}")
            if mine == "cluster" and within(ours, "cluster.cli") and not path.startswith("cluster/cli/"):
                wrong.append(f"{at}: the command line stands on the rest of cluster")
            known = any(within(ours, module) for module in TRAINER_KNOWS)
            if mine == "trainer" and other in ("dataio", "models") and not known:
                wrong.append(f"{at}: trainer knows only {', '.join(TRAINER_KNOWS)}")
            wrong += [
                f"{at}: {module} belongs to {' and '.join(places)}"
                for module, places in ONLY_IN.items()
                if within(name, module) and not path.startswith(places) and mine in FLOORS
            ]
    return wrong


def circle(files: Mapping[str, str]) -> list[str]:
    """The modules of one circle of imports, if there is any; a package's `__init__` binds late: it does not count."""
    modules = {f"thawline.{path.removesuffix('.py').replace('/', '.')}": path for path in files}
    graph = dict[str, set[str]]()
    for module, path in modules.items():
        if path.endswith("__init__.py"):
            continue
        edges = {name if name in modules else name.rpartition(".")[0] for _, name in imported(path, files[path])}
        graph[module] = {other for other in edges & modules.keys() if other != module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def sources(*folders: str) -> dict[str, str]:
    return {
        file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
        for folder in folders
        for file in sorted((ROOT / folder).rglob("*.py"))
    }


def test_imports_run_downward_only_and_by_our_own_name() -> None:
    assert violations(sources(*FLOORS, "tests", "deploy")) == []


@pytest.mark.parametrize("package", FLOORS)
def test_no_package_holds_a_circle(package: str) -> None:
    assert circle(sources(package)) == []


def test_a_planted_circle_is_seen_also_where_an_import_is_late() -> None:
    files = {
        "dataio/table/a.py": "from thawline.dataio.table.b import x",
        "dataio/table/b.py": "def f():\n    from thawline.dataio.table import c",
        "dataio/table/c.py": "from thawline.dataio.table import a",
        "dataio/table/d.py": "from thawline.dataio.table import a",
    }
    assert len(set(circle(files))) == 3
    assert circle({path: text for path, text in files.items() if not path.endswith("c.py")}) == []


def test_the_walk_sees_every_room_and_the_edges_that_are_known() -> None:
    files = sources(*FLOORS)
    for path, name in (
        ("dataio/pixels/dali.py", "nvidia.dali.fn"),
        ("cluster/launch/ray_train.py", "ray.train"),  # inside a function
        ("trainer/optimisers/optim.py", "apex.optimizers"),  # a string given to import_module
        ("cluster/cli/__main__.py", "thawline.cluster.cli.main.main"),
        ("cluster/run/vision.py", "thawline.trainer.learner.Learner"),
    ):
        assert name in {found for _, found in imported(path, files[path])}, f"{name} in {path}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dataio/x.py", "import thawline.trainer"),
        ("dataio/x.py", "from thawline.models import groups"),
        ("dataio/x.py", "from dataio.batch import Batch"),
        ("models/x.py", "import thawline.dataio.batch as b"),
        ("models/x.py", "def f():\n    from thawline.cluster.run.run import run"),
        (
            "trainer/x.py",
            "if TYPE_CHECKING:\n    from thawline.cluster.job.job import Job",
        ),
        ("trainer/x.py", "from thawline.dataio.stream.loader import ImageLoader"),
        ("trainer/x.py", "from thawline.dataio import ImageSpec"),
        ("trainer/x.py", "import models"),
        ("trainer/x.py", "import nvidia.dali.fn as fn"),
        ("trainer/x.py", "import importlib\nimportlib.import_module('ray.train')"),
        ("cluster/x.py", "import thawline.benchmarks.presize"),
        ("cluster/x.py", "from ray import train"),
        ("cluster/run/x.py", "def f():\n    from thawline.cluster.cli.verbs import Verb"),
        ("cluster/x.py", "async def f():\n    import ray.train.torch"),
        ("cluster/x.py", "__import__('apex')"),
        ("cluster/sub/x.py", "from ...benchmarks import harness"),
        ("benchmarks/x.py", "from tests.kit.images import photo"),
        ("dataio/stream/loader.py", "from nvidia import dali"),
        ("tests/x.py", "import dataio"),
    ],
)
def test_a_planted_edge_is_caught(path: str, source: str) -> None:
    assert any(sentence.startswith(f"{path}:") for sentence in violations({path: source}))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trainer/x.py", "from thawline.dataio.batch import Batch\nfrom thawline.models import groups"),
        ("trainer/x.py", "from . import world\nfrom .schedule import cosine"),
        ("cluster/x.py", "import ray\nfrom thawline import dataio, models, trainer"),
        ("cluster/cli/x.py", "from thawline.cluster.cli.verbs import Verb"),
        ("benchmarks/x.py", "from thawline.cluster.run.run import run"),
        ("dataio/x.py", "import datasets\nimport rayon"),
        ("tests/x.py", "import ray\nfrom tests.kit import runs"),
    ],
)
def test_what_the_house_allows_passes(path: str, source: str) -> None:
    assert violations({path: source}) == []
