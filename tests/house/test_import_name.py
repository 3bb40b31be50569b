"""Is `import thawline` all that a user needs, does it cost nothing, and is every name of it there?"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import thawline

ROOT = Path(__file__).parents[2]
PACKAGES = ("thawline", "thawline.dataio", "thawline.models", "thawline.trainer")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_bound_and_type_checkers_see_the_same(package: str) -> None:
    module = importlib.import_module(package)
    assert {name for name in module.__all__ if not hasattr(module, name)} == set()
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    (checked,) = (node for node in ast.parse(source).body if isinstance(node, ast.If))
    told = {alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == set(module.__all__)


def test_thawline_offers_what_its_packages_offer() -> None:
    below = [name for package in PACKAGES[1:] for name in importlib.import_module(package).__all__]
    below.remove("load")  # models.load gives a bare model; that name is kept for what predicts
    assert set(thawline.__all__) == {*below, "Job", "run", "load", "Predictor", "Prediction"}
    for name in below:
        (owner,) = (p for p in PACKAGES[1:] if name in importlib.import_module(p).__all__)
        assert getattr(thawline, name) is getattr(importlib.import_module(owner), name)


def test_an_unknown_name_is_an_attribute_error_that_names_the_package() -> None:
    with pytest.raises(AttributeError, match=r"module 'thawline' has no attribute 'Lerner'"):
        thawline.Lerner  # noqa: B018


def test_the_import_brings_nothing_heavy() -> None:
    code = "import sys, thawline; print(sorted({'torch', 'ray', 'pyarrow', 'numpy', 'nvidia'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_indexing_needs_no_torch() -> None:
    code = "import sys, thawline.cluster.cli.index; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", "a mistyped path would be told seconds later"


@pytest.mark.slow
def test_no_module_is_loaded_twice_under_two_names() -> None:
    """The checkout holds `dataio` and, by a link, `thawline/dataio`: both at once would make two of each class."""
    code = (
        "import sys, thawline, thawline.cluster.run.run, thawline.benchmarks.harness\n"
        "print([name for name in sys.modules if name.split('.')[0] in "
        "('dataio', 'models', 'trainer', 'cluster', 'benchmarks')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
