"""Can anything that is read or sent run code? The source is walked for whatever unpickles."""

import ast
from collections.abc import Iterator

import pytest

from tests.house.test_floors import FLOORS, imported, sources
from thawline.trainer.errors import RecipeError, TrainError
from thawline.trainer.step.sentences import KINDS, Sentence

PICKLERS = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def unsafe(path: str, source: str) -> Iterator[str]:
    """Where a file imports a pickler, calls an object collective, or loads with torch without `weights_only`."""
    yield from (f"{path}:{line} imports {n}" for line, n in imported(path, source) if n.split(".")[0] in PICKLERS)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name.endswith(("_object", "_object_list")) and not isinstance(node.ctx, ast.Store):
                yield f"{path}:{node.lineno} names {name}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("torch.load", "load_state_dict_from_url")):
            safely = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if safely.get("weights_only") != "True":
                yield f"{path}:{node.lineno} loads without weights_only=True"


def test_nothing_in_the_source_unpickles() -> None:
    assert [place for path, source in sources(*FLOORS).items() for place in unsafe(path, source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "dist.all_gather_object(values, value)",
        "from torch.distributed import gather_object as g\ngather_object(1)",
        "dist.broadcast_object_list(values)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
    ],
)
def test_what_unpickles_is_found(source: str) -> None:
    assert list(unsafe("trainer/x.py", source))


def test_an_error_is_made_anew_out_of_a_closed_list() -> None:
    class OwnError(RecipeError):
        """A user's, which another process need not know."""

    assert Sentence.of(OwnError("lr is too high")) == Sentence("RecipeError", "lr is too high")
    assert type(Sentence("RecipeError", "lr is too high").error()) is RecipeError
    assert Sentence.of(OSError("x")) == Sentence("", "OSError: x")
    assert Sentence("SystemExit", "1").error() is None
    assert KINDS["TrainError"] is TrainError
