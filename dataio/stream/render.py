"""What does a model see of one image? The pixels of validation, from encoded bytes alone: no manifest, no file.

A file is accepted, and decoded by the same library, as in a run. For many images a manifest and a loader are quicker,
since DALI is set up for each call.
"""

import numpy as np
import torch
from torch import Tensor

from thawline.dataio.checks.verify import check_bytes
from thawline.dataio.errors import EngineError
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.pixels.work import Work
from thawline.dataio.reading.readers import for_engines
from thawline.dataio.store.files import as_array
from thawline.dataio.stream.renderer import EngineName, Renderer, choose_engine


def render(
    encoded: bytes,
    spec: ImageSpec,
    *,
    engine: EngineName = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "the image",
) -> Tensor:
    """An encoded image as a model that was validated with `spec` sees it: (1, 3, size_px, size_px), normalised.

    engine: the one that validation ran with gives the same pixels, bit by bit. name: of the image, in errors.
    Raises: EngineError for a file that cannot be used, or an engine that is not installed.
    """
    check = check_bytes(encoded)
    if check.status != "ok":
        raise EngineError(f"{name} cannot be used ({check.status}): a model sees nothing of it; give another image")
    image = for_engines(as_array(encoded), pillow=check.codec == "pillow")
    if isinstance(image, str):
        raise EngineError(f"{name}: {image}")
    width, height = (np.array([side], np.int32) for side in (check.width, check.height))
    work = Work(
        encoded=[image],
        paths=[name],
        geometry=geometry.centred(spec, widths=width, heights=height),
        ids=np.zeros(1, np.int64),
        targets=np.zeros(1, np.int64),
        size_px=spec.size_px,
        positions=np.zeros(1, np.int64),
    )
    with Renderer(
        spec=spec, local_batch=1, device=device or torch.device("cpu"), dtype=dtype, choice=choose_engine(engine)
    ) as renderer:
        (batch,) = renderer.batches(iter([work]), _refuse)
    return batch.inputs


def _refuse(work: Work, reasons: dict[int, str]) -> Work:
    (reason,) = reasons.values()
    raise EngineError(f"{work.paths[0]} cannot be rendered ({reason}): a model sees nothing of it; give another image")
