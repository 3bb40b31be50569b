"""How are a package's names found without importing what they stand for? When somebody first asks for one (PEP 562).

torch and torchmetrics cost seconds: whoever asks for `thawline --help`, or mistypes a path, need not wait for them.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def late(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names lie in modules: module -> names, separated by blanks."""
    where = {name: module for module, group in names.items() for name in group.split()}

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(where[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
