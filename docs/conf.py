"""How are the pages built? Sphinx, MyST for Markdown, Furo for the looks; the API comes from the docstrings.

`make docs` builds them offline. Every warning is an error, and so is every reference to a name that no page has.
"""

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from sphinx.ext.napoleon import Config, GoogleDocstring

sys.path.insert(0, str(Path(__file__).parent))

project = "thawline"
author = "The thawline maintainers"
copyright = "the thawline maintainers; Apache-2.0"
release = version = version_of("thawline")

extensions = ["myst_parser", "sphinx.ext.autodoc", "generated"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

smartquotes = False  # -- is the beginning of a flag, not a dash
html_theme = "furo"
html_title = f"thawline {release}"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["thawline.css"]

default_role = "code"  # docstrings put code in single backticks, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 100
python_use_unqualified_type_names = True
nitpicky = True
nitpick_ignore_regex = [
    # Types of others have their pages elsewhere, which an offline build cannot look up.
    ("py:.*", r"(torch|torchmetrics|numpy|np|pyarrow|pa|pandas|pd|PIL|matplotlib|collections|pathlib|typing)\..*"),
    # Imported for the type checker alone, so that autodoc does not know whose they are; and one that has no page.
    ("py:.*", "Path|Figure|.*TaskMetrics"),
    # What predicting takes beside the forms that users have: only the command line makes them.
    ("py:.*", r"thawline\.dataio\.stream\.render\.(Item|Sound)"),
]


_NAPOLEON = Config(napoleon_custom_sections=[("Source", "notes_style")])


def _as_rst(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are Google's sections and plain text with code in backticks: what RST would see beyond is escaped."""
    pieces = re.split(r"(`+[^`\n]+`+)", "\n".join(lines))
    pieces[::2] = [re.sub(r"([*|]|_\b)", r"\\\1", piece) for piece in pieces[::2]]
    lines[:] = "".join(pieces).splitlines()
    if what not in ("attribute", "property", "data"):  # of these, napoleon takes what stands before a colon for a type
        lines[:] = GoogleDocstring(lines, _NAPOLEON, app, what, name, thing, options).lines()


def _without_ranges(app: Any, *event: Any) -> None:
    """Of a field's type leave out its range, which stands in the reference of a job."""
    for thing in event:  # a class, before its fields are listed; or its __init__, before its signature is written
        for field, hint in getattr(thing, "__annotations__", {}).items():
            if get_origin(hint) is Annotated:
                thing.__annotations__[field] = get_args(hint)[0]


def setup(app: Any) -> None:
    app.connect("autodoc-before-process-signature", _without_ranges)
    app.connect("autodoc-process-docstring", _without_ranges)
    app.connect("autodoc-process-docstring", _as_rst)
