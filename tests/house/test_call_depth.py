"""How far is it from a command to the step? Our calls on the way to `loss.backward()`, counted in a real one."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from PIL import Image

from tests.kit.toy import learner
from thawline.cluster.cli import main
from thawline.cluster.cli.index import make_manifest
from thawline.cluster.job.job import Job, to_toml

ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / name}/" for name in ("cluster", "dataio", "models", "trainer"))


class Enough(BaseException):
    """The first step's backward has been called: nothing else is of interest."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Our functions on the stack when a loss is first called to go backward, outermost first."""
    seen = list[str]()

    def look(tensor: torch.Tensor, *args: Any, **options: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if str(Path(frame.f_code.co_filename).resolve()).startswith(OURS):
                seen.insert(0, frame.f_code.co_qualname)
            frame = frame.f_back
        raise Enough

    monkeypatch.setattr(torch.Tensor, "backward", look)
    return seen


def test_from_a_phase_to_backward_are_at_most_four_calls(calls: list[str]) -> None:
    with pytest.raises(Enough):
        learner().fit_one_cycle(1)
    assert calls[-1] == "train_step"
    below = calls[calls.index("PhaseRun.run") + 1 :]
    assert len(below) <= 4, below


def test_from_the_command_to_backward_are_at_most_twelve_calls(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(8):
        file = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * i, 0, 99)).save(file)
    make_manifest(tmp_path / "photos", valid="0.5").save(tmp_path / "m.parquet")
    job = Job(name="run", manifest=str(tmp_path / "m.parquet"), storage=str(tmp_path / "runs"))
    (tmp_path / "job.toml").write_text(to_toml(job))
    words = ("--model.name", "tiny", "--model.weights", "none", "--data.engine", "reference", "--metrics.port", "0")
    monkeypatch.setattr(sys, "argv", ["thawline", "train", str(tmp_path / "job.toml"), "--device", "cpu", *words])
    with pytest.raises(Enough):
        main.main()
    assert calls[0] == "main"
    assert len(calls) <= 12, calls
