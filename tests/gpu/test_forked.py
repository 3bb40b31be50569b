"""Can a process that was forked after all imports use the GPU, and DALI on it?"""

from pathlib import Path

import pytest
import torch

from thawline.cluster.launch.forkserver import fork

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
SERVER = """
import sys
from pathlib import Path
from thawline.cluster.launch import worker_part as part
from thawline.cluster.launch.forkserver import serve

def main(link, words):
    import torch
    values = torch.arange(10.0, device="cuda")
    link.send((float(values.sum()), torch.cuda.device_count()))
    try:
        import nvidia.dali.fn as fn
        from nvidia.dali import pipeline_def
    except ImportError:
        link.send(None)
        return
    @pipeline_def(batch_size=2, num_threads=1, device_id=0)
    def made():
        return fn.random.uniform(range=(3.0, 3.0), shape=[4], device="gpu")
    link.send(made().run()[0].as_cpu().as_array().sum())

serve(Path(sys.argv[1]), main)
"""


def test_a_forked_process_uses_the_gpu_twice_in_a_row(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the fork server is Ray's, and Ray is not installed")
    from tests.cluster.launch.test_forkserver import serving

    with serving(tmp_path, SERVER) as (path, _):
        for _ in range(2):  # the first child's CUDA must not have reached the server
            with fork(path, {}, wait_s=120) as link:
                assert link.recv() == (45.0, torch.cuda.device_count())
                assert link.recv() in (None, 24.0)
