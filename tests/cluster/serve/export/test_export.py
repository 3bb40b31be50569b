"""Is an export refused that is not the model? Is nothing written over, by halves, or by code that is not trusted?"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.bundles import write_bundle
from thawline import models
from thawline.cluster.errors import ExportError
from thawline.cluster.job import job as jobs
from thawline.cluster.serve.export import export as exporting
from thawline.cluster.serve.export.comparing import difference
from thawline.cluster.serve.export.examples import examples
from thawline.cluster.serve.export.export import export
from thawline.cluster.serve.export.made import Made, Wish
from thawline.dataio import ImageSpec, Manifest, split_loader
from thawline.dataio.store.atomic import atomic_write

pytestmark = pytest.mark.slow  # makes ONNX files


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", "tiny", "single_label", 3, size_px=32)


@pytest.fixture
def off_by(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Exports that say the model's logits, and probabilities that are so much larger."""

    def lie(by: float) -> None:
        def make(wish: Wish) -> Made:
            network = wish.answers

            def answers(images: Tensor) -> Sequence[Tensor]:
                logits, probabilities = network(images)
                return logits, probabilities + by

            return Made({"first": b"1", "last": b"2"}, answers, "made")

        monkeypatch.setitem(exporting.FORMATS, "onnx", exporting.Format(make))

    return lie


def test_what_says_something_else_is_not_written(tiny: Path, tmp_path: Path, off_by: Any) -> None:
    off_by(1e-3)
    with pytest.raises(ExportError, match=r"6 drawn images.*differ by up to 0\.001, and 0\.0001 is allowed\): nothing"):
        export(tiny, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    off_by(1e-6)
    assert export(tiny, "onnx", tmp_path / "out") == str(tmp_path / "out/last")


def test_differences_are_a_share_of_large_numbers_and_the_first_class_counts() -> None:
    years = [torch.tensor([[2026.0], [0.5]])]
    assert difference(years, [years[0] + 0.1]).why == "its outputs differ by up to 0.1, and 0.0001 is allowed"
    assert difference(years, [years[0] * (1 + 5e-5)]).why == ""
    assert difference(years, [years[0] * torch.nan]).why
    assert "its outputs are (1, 1), the model's (2, 1)" in difference(years, [years[0][:1]]).why
    close, tied = torch.tensor([[0.50002, 0.49998]]), torch.tensor([[0.500001, 0.499999]])
    assert difference([close, close], [close, close.flip(1)]).why == "another class is the most probable in 1 places"
    assert difference([tied, tied], [tied, tied.flip(1)]).why == ""


def test_what_is_there_stays(tiny: Path, tmp_path: Path, off_by: Any) -> None:
    off_by(0)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "last").write_text("older")
    with pytest.raises(
        ExportError, match=r"out is not empty \(last\): .*--overwrite, which replaces files of the same"
    ):
        export(tiny, "onnx", out)
    export(tiny, "onnx", out, overwrite=True)
    assert {file.name: file.read_text() for file in out.iterdir()} == {"notes.txt": "mine", "first": "1", "last": "2"}
    for place in (tiny, tmp_path / "run/model"):
        with pytest.raises(ExportError, match="is what is exported: its own files would be replaced"):
            export(tiny if place == tiny else tmp_path / "run", "onnx", place, overwrite=True)
    with pytest.raises(ExportError, match=r"notes\.txt cannot be written \(Not a directory\)"):
        export(tiny, "onnx", out / "notes.txt")


def test_an_export_cut_short_is_not_taken_for_a_whole_one(
    tiny: Path, tmp_path: Path, off_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    off_by(0)
    export(tiny, "onnx", tmp_path / "out")

    def full(root: Any, name: str) -> Any:
        if name == "last":
            raise OSError(28, "No space left on device")
        return atomic_write(root, name)

    monkeypatch.setattr("thawline.cluster.serve.export.export.atomic_write", full)
    with pytest.raises(ExportError, match=r"out cannot take the export \(No space left on device\): what is there"):
        export(tiny, "onnx", tmp_path / "out", overwrite=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["first"], "the last file was an older export's"


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_gets_a_sentence(
    tiny: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    with pytest.raises(
        ExportError, match=rf'needs {package}, which is not installed: .*pip install "thawline\[export\]"'
    ):
        export(tiny, "onnx", tmp_path / "out")


def test_a_runs_own_validation_images_are_compared_with_the_pixels_of_its_validation(
    flat: Manifest, tmp_path: Path
) -> None:
    flat.save(tmp_path / "elsewhere.parquet")
    job = jobs.from_dict({"manifest": str(tmp_path / "elsewhere.parquet"), "name": "run"})
    (tmp_path / "job.toml").write_text(jobs.to_toml(job))
    spec = ImageSpec(size_px=24, presize="pad")
    found = examples(tmp_path)
    assert found.words == "11 validation images"
    with split_loader(flat, spec, "valid", global_batch=20) as loader:
        (batch,) = loader.stream()
    assert torch.equal(found.seen(spec, "dali"), batch.inputs)
    (tmp_path / "elsewhere.parquet").unlink()
    assert "drawn images, since no validation image can be read (no manifest at " in examples(tmp_path).words


def test_an_option_that_a_format_has_not_is_refused(tiny: Path, tmp_path: Path, off_by: Any) -> None:
    off_by(0)
    told = r"--with-preprocessing with --to onnx: nothing would read it; leave it out \(it is for pt2\)"
    with pytest.raises(ExportError, match=told):
        export(tiny, "onnx", tmp_path / "out", with_preprocessing=True)


def test_code_is_imported_only_where_it_is_trusted(tiny: Path, tmp_path: Path) -> None:
    text = (tiny / "model.json").read_text()
    (tiny / "model.json").write_text(text.replace('"model": "tiny"', '"model": "python:nets:body"'))
    with pytest.raises(models.BundleError, match="read that code, then give --trust-code"):
        export(tiny, "onnx", tmp_path / "out")
