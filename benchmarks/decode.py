"""How fast are JPEGs decoded here, with nothing behind it? The ceiling of whatever begins with files.

On a GPU the JPEG engines take a share of each batch, its cores and the host's threads the rest: `loads` sweeps that
share, and the best one is what HW_DECODER_LOAD in the DALI engine should be there.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline

from thawline.benchmarks.harness import DeviceName, check_positive, measure, open_device, repeat, report, say
from thawline.benchmarks.photos import write_photos
from thawline.benchmarks.presize import HEIGHT, SEED, WIDTH, Jpegs
from thawline.dataio.stream.renderer import default_threads

QUESTION = "how fast are JPEGs decoded here, with nothing behind it?"


def main(
    *,
    device: DeviceName = "cpu",
    images: int = 64,
    batch: int = 16,
    loads: tuple[float, ...] = (0.5, 0.65, 0.8, 1.0),
    threads: int = 0,
    repeats: int = 5,
    out: Path | None = None,
) -> dict[str, Any]:
    """Decode the same JPEGs of 500 x 375 again and again.

    Args:
        device: Where DALI runs: "cpu", or the GPU with `mixed` decoding.
        images: JPEGs in a repeat, a multiple of batch or the last ones are left out.
        batch: JPEGs at once.
        loads: Shares of a batch that the GPU's JPEG engines take; of no matter to a CPU.
        threads: DALI's threads; 0 is one a core, at most 8.
        repeats: Measured repeats.
        out: Also write the JSON here.
    """
    check_positive(images=images, batch=batch)
    where = open_device(device)
    threads = threads or default_threads(1)
    calls = max(1, images // batch)
    say(f"making {calls * batch} JPEGs of {WIDTH} x {HEIGHT}")
    jpegs = write_photos(calls * batch, width=WIDTH, height=HEIGHT, seed=SEED)
    results = {}
    for load in loads if device == "cuda" else (0.0,):
        name = f"mixed, {load:g} by the JPEG engines" if device == "cuda" else "cpu"
        say(f"measuring {name}")
        pipe = decoder(jpegs, batch=batch, threads=threads, device=where, load=load)
        timing = measure(partial(repeat, pipe.run, calls), images_per_call=len(jpegs), device=where, repeats=repeats)
        results[name] = timing.summary()
    settings = {
        "device": device,
        "images": calls * batch,
        "batch": batch,
        "threads": threads,
        "jpeg_px": [WIDTH, HEIGHT],
        "jpeg_bytes": round(float(np.mean([len(jpeg) for jpeg in jpegs]))),
    }
    return report("decode", QUESTION, settings, results, out=out)


def decoder(jpegs: Jpegs, *, batch: int, threads: int, device: torch.device, load: float) -> Pipeline:
    """A pipeline whose runs decode `batch` JPEGs each, in turn and for ever: (H, W, 3) uint8 RGB on the device."""
    gpu = device.type == "cuda"
    parts = [list(jpegs[start : start + batch]) for start in range(0, len(jpegs), batch)]
    pipe = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=device.index if gpu else None,
        set_affinity=False,
        prefetch_queue_depth=2,
        exec_dynamic=True,
    )
    with pipe:
        files = fn.external_source(source=parts, cycle=True, dtype=types.UINT8, ndim=1, batch=True, no_copy=True)
        how: dict[str, Any] = {"device": "mixed", "hw_decoder_load": load} if gpu else {"device": "cpu"}
        pipe.set_outputs(fn.decoders.image(files, output_type=types.RGB, **how))
    pipe.build()
    return pipe
