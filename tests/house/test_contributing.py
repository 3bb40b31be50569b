"""Does CONTRIBUTING point at what is there? Every name that it says is in a file, is."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_file_that_is_named_is_there_and_has_the_name_that_it_is_named_for() -> None:
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE).replace("\n", " ")
    paths = set(re.findall(r"`([\w/]+/[\w/]*\.py)`", prose))
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []
    named = re.findall(r"`(\w+)[^`]*`(?:, \w+,| \(append only[^)]*\))? in `([\w/]+\.py)`", prose)
    assert len(named) > 5
    assert [(name, path) for name, path in named if name not in (ROOT / path).read_text(encoding="utf-8")] == []
