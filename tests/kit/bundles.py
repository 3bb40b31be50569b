"""Which bundles do tests use? Small models with the weights that they begin with: nobody has to train them."""

from pathlib import Path
from typing import Any

from thawline import models
from thawline.models import bundle
from thawline.models.bundle import Description

IMAGE: dict[str, Any] = {"presize": "crop", "border": "reflect", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def write_bundle(
    folder: Path,
    name: str,
    task: str,
    outputs: int,
    *,
    size_px: int,
    image: dict[str, Any] | None = None,
    sharp: float = 1.0,
    **options: Any,
) -> Path:
    """A bundle's folder. image: of the spec's fields, what is not as in IMAGE. options: further ones of `create`.

    sharp: by how much the weights of the last layer are larger than they begin.
    """
    model = models.create(name, outputs, task=task, weights="none", seed=1, size_px=size_px, **options)
    state = model.state_dict()
    state[[*state][-1]] *= sharp
    about = Description(
        model=name,
        options=model.options,
        outputs=outputs,
        task=task,
        classes=tuple(f"class {i}" for i in range(outputs)),
        image={"size_px": size_px, "presize_px": size_px, **IMAGE, **(image or {})},
        engine="reference",
        precision="fp32",
        step=7,
        metrics={"error_rate": 0.25, "roc_auc": None},
    )
    folder.mkdir(parents=True)
    for file, data in bundle.packed(state, about).items():
        (folder / file).write_bytes(data)
    return folder
