"""How does DALI run the spec? One pipeline: decode, filter where needed, warp once, normalise once.

The only file that imports DALI. `device` alone decides where it runs: "cpu" wholly on the CPU, "cuda" with
`mixed` decoding (the GPU's JPEG engines) and everything after it on the GPU. Randomness comes from `geometry`,
never from DALI, so both give the same stream.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline, pipeline_def
from torch.utils.dlpack import from_dlpack

from dataio.batch import Batch
from dataio.errors import EngineError
from dataio.reference import decode
from dataio.spec import ImageSpec
from dataio.work import Work

PREFETCH = 2
# The JPEG engines take this share of a batch, CUDA cores and the host's threads the rest. DALI's default, to be
# swept on the GPU at hand: with few CPU cores beside a big GPU a higher share pays.
HW_DECODER_LOAD = 0.65

_INPUTS: tuple[tuple[Any, int], ...] = (  # DALI type and dimensions of each input, in the order of `_inputs`
    (types.UINT8, 1),  # encoded bytes
    (types.INT64, 0),  # id
    (types.BOOL, 0),  # does it need a prefilter?
    (types.FLOAT, 1),  # prefilter height, width
    (types.FLOAT, 2),  # homography
    (types.FLOAT, 1),  # mean
    (types.FLOAT, 1),  # std
)


def _inputs(work: Work, spec: ImageSpec) -> tuple[Any, ...]:
    geometry = work.geometry
    needed = geometry.prefilter_px[:, 0] > 0
    mean, std = geometry.folded(spec)
    return (
        work.encoded,
        work.ids,
        needed,
        np.maximum(geometry.prefilter_px, 1).astype(np.float32),
        np.ascontiguousarray(geometry.homographies, np.float32),
        mean,
        std,
        work.targets,
    )


@pipeline_def(enable_conditionals=True)
def _pipeline(source: Callable[[], Any], spec: ImageSpec, target: tuple[Any, int], cuda: bool, half: bool) -> Any:
    kinds = (*_INPUTS, target)
    encoded, ids, filtered, filter_px, homography, mean, std, targets = fn.external_source(
        source=source,
        num_outputs=len(kinds),
        dtype=[kind for kind, _ in kinds],
        ndim=[dims for _, dims in kinds],
        batch=True,
        no_copy=True,
    )
    if cuda:
        images = fn.decoders.image(encoded, device="mixed", output_type=types.RGB, hw_decoder_load=HW_DECODER_LOAD)
        targets = targets.gpu()
    else:
        images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
    if filtered:
        source_images = fn.resize(images, size=filter_px, antialias=True, interp_type=types.INTERP_LINEAR)
    else:
        source_images = images
    warped = fn.experimental.warp_perspective(
        source_images,
        matrix=homography,
        size=[spec.size_px, spec.size_px],
        border_mode=spec.border,
        pixel_origin="corner",
        interp_type=types.INTERP_LINEAR,
    )
    normalised = fn.crop_mirror_normalize(
        warped, mean=mean, std=std, dtype=types.FLOAT16 if half else types.FLOAT, output_layout="HWC"
    )
    return normalised, targets, ids


class DaliEngine:
    """Renders work with DALI on the CPU or the GPU; tensors are handed over without a copy."""

    name = "dali"

    def __init__(
        self,
        spec: ImageSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        max_batch: int,
        target: tuple[np.dtype[Any], int],
    ) -> None:
        self._spec, self._cuda = spec, device.type == "cuda"
        # "cuda" without an index is torch's current device; to DALI, no index means no GPU.
        index = torch.cuda.current_device() if self._cuda and device.index is None else device.index
        self._works: Iterator[Work] = iter(())
        # no_copy: DALI reads our arrays where they lie, so they must outlive its queues.
        self._alive: deque[tuple[Work, Any]] = deque(maxlen=2 * PREFETCH + 2)
        kind = {np.dtype(np.int64): types.INT64, np.dtype(np.float32): types.FLOAT}[target[0]]
        self._pipe: Pipeline = _pipeline(
            self._next,
            spec,
            (kind, target[1]),
            self._cuda,
            dtype == torch.float16,
            batch_size=max_batch,
            num_threads=threads,
            device_id=index if self._cuda else None,
            prefetch_queue_depth=PREFETCH,
            set_affinity=False,
            exec_dynamic=True,  # outputs live as long as the tensors made from them
        )
        self.reusable = True

    def _next(self) -> tuple[Any, ...]:
        work = next(self._works)
        inputs = _inputs(work, self._spec)
        self._alive.append((work, inputs))
        return inputs

    def run(self, works: Iterator[Work]) -> Iterator[Batch]:
        """One Batch a Work, in order. Once a run has ended, `reusable` says that another may begin."""
        self._works, self.reusable = works, False
        self._pipe.reset()
        while True:
            try:
                images, targets, ids = self._pipe.run()
            except StopIteration:
                self.reusable = True
                return
            except RuntimeError as error:
                raise EngineError(_readable(error, [work for work, _ in self._alive])) from error
            yield Batch(
                images=from_dlpack(images.as_tensor()).permute(0, 3, 1, 2),
                targets=from_dlpack(targets.as_tensor()),
                ids=from_dlpack(ids.as_tensor()),
            )

    def close(self) -> None:
        """Let go of the pipeline's threads and memory."""
        del self._pipe


def _readable(error: RuntimeError, works: Iterable[Work]) -> str:
    """DALI names operators, never files: find the file that Pillow cannot decode either; failing that, the cause."""
    files = [file for work in works for file in zip(work.encoded, work.paths, strict=True)]
    for encoded, path in files:
        try:
            decode(encoded, path=path)
        except EngineError as culprit:
            return str(culprit)
    said, _, cause = str(error).partition("encountered:")
    return (
        f"DALI failed while it rendered a batch ({(cause or said).strip().splitlines()[0]}): no further batch can be "
        f"made; every one of its last {len(files)} files can be read by Pillow, so try engine='reference'"
    )


def probe() -> str | None:
    """Render one tiny image on the CPU: None if DALI works here, else the reason why not."""
    try:
        black = np.zeros((8, 8, 3), np.uint8)
        pipe = Pipeline(batch_size=1, num_threads=1, device_id=None)
        with pipe:
            pipe.set_outputs(fn.resize(types.Constant(black, device="cpu"), size=[4, 4]))
        (out,) = pipe.run()
        shape = tuple(out.as_array().shape)
    except Exception as error:  # whatever it is, the answer is "not here", and doctor prints it
        return f"{type(error).__name__}: {error}"
    return None if shape == (1, 4, 4, 3) else f"a 4 x 4 resize came out as {shape}"
