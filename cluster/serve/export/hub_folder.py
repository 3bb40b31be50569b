"""How does a model get onto the Hugging Face Hub? As a folder to upload: the bundle, a config, and a model card.

Nothing is uploaded here, and nobody is asked. `thawline.load` reads the folder as it reads a run's bundle.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thawline.cluster.errors import ClusterError
from thawline.cluster.serve.export.answers import Answers
from thawline.cluster.serve.export.examples import manifest_of
from thawline.cluster.serve.export.made import Made, Wish
from thawline.cluster.words import finite, printable
from thawline.dataio.checks.census import count_subset
from thawline.dataio.errors import DataError
from thawline.models import bundle
from thawline.models.code import is_code
from thawline.trainer.tasks import record_of

CARD, CONFIG = "README.md", "config.json"
_MOST_CLASSES = 200
"""So many have a row in the card."""


def make(wish: Wish) -> Made:
    """The folder's files: the bundle's own two, a config.json and a README.md."""
    about = wish.bundle.about
    weights, described = bundle.packed(wish.bundle.model.state_dict(), about).items()
    files = dict([(CARD, card(wish).encode()), (CONFIG, _config(wish)), weights, described])
    read = bundle.unpacked(files, where="the folder", trust_code=True)  # whoever came so far has trusted it
    network = Answers(read.model.float(), about.task).eval()

    @torch.no_grad()
    def answers(images: Tensor) -> Sequence[Tensor]:
        said: Sequence[Tensor] = network(images)
        return said

    return Made(files, answers, f"a folder for the Hugging Face Hub: {', '.join(files)}; its license: {_license(wish)}")


def card(wish: Wish) -> str:
    """The model card: a head for the Hub, then what it is, what it was trained on, how good it is, how to use it."""
    about, spec = wish.bundle.about, wish.spec
    head: dict[str, Any] = {"license": _license(wish), "library_name": "thawline"}
    if tag := record_of(about.task).pipeline_tag:
        head["pipeline_tag"] = tag
    head |= {"tags": ["thawline", about.task, about.model], "metrics": [*about.metrics]}
    trusting = ", trust_code=True" if is_code(about.model) else ""
    metrics = [f"| {_text(name)} | {_number(value)} |" for name, value in finite(about.metrics).items()]
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value, ensure_ascii=True)}" for key, value in head.items()),
            "---",
            "",
            f"# {_text(about.model)} for {about.task}",
            "",
            f"Fine-tuned with thawline {about.thawline}, for {about.step:,} steps.",
            "",
            "## Use",
            "",
            "```python",
            "import thawline",
            "",
            f'with thawline.load("FOLDER"{trusting}) as model:  # this folder, as it was downloaded',
            '    print(model.predict("photo.jpg"))',
            "```",
            "",
            f"Images are seen as validation saw them: {spec.size_px} x {spec.size_px} px, fitted by {spec.presize}, "
            f"border {spec.border}, RGB in 0 to 1 less {list(spec.mean)} and divided by {list(spec.std)}.",
            "",
            "## Data",
            "",
            *_data(wish),
            "",
            "## Metrics",
            "",
            "On the validation images:",
            "",
            "| metric | value |",
            "| --- | --- |",
            *metrics,
            "",
        ]
    )


def _data(wish: Wish) -> list[str]:
    """Numbers of images, and the classes."""
    classes = [_text(name) for name in wish.bundle.about.classes]
    try:
        manifest = manifest_of(wish.source)
        splits = {split: manifest.subset(split) for split in manifest.splits()}
    except (ClusterError, DataError, OSError):
        return ["Classes: " + ", ".join(classes[:_MOST_CLASSES])]
    counts = {split: count_subset(subset, manifest.classes).tolist() for split, subset in splits.items()}
    lines = [", ".join(f"{len(subset):,} images for {split}" for split, subset in splits.items()) + ".", ""]
    lines += [f"| class | {' | '.join(splits)} |", f"| --- | {' | '.join('---' for _ in splits)} |"]
    named = any(sum(each) for each in counts.values())
    for i, name in enumerate(classes[:_MOST_CLASSES]):
        row = [f"{counts[split][i]:,}" if named else "" for split in splits]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return lines


def _config(wish: Wish) -> bytes:
    """What the Hub counts a download by, with the classes by their numbers."""
    about = wish.bundle.about
    names = {str(i): name for i, name in enumerate(about.classes)}
    told = {"library_name": "thawline", "architecture": about.model, "task": about.task, "id2label": names}
    return (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()


def _license(wish: Wish) -> str:
    return wish.license or "unknown"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _text(name: str) -> str:
    """A stranger's name as text within a table: no markup, no end of a line."""
    said = printable(" ".join(name.split()))
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|~&" else c for c in said)
