"""Does the doctor see what is wrong with a machine, and name it?"""

from pathlib import Path

import pytest

from thawline.cluster import doctor


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_the_report_covers_every_engine_and_gives_remedies_only_where_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thawline.dataio.pixels import dali

    monkeypatch.setattr(dali, "probe", lambda: "the decoder is on strike")
    checks = by_name(doctor.collect(storage=str(tmp_path / "runs")))
    assert "the decoder is on strike" in checks["engine dali"].value
    assert not checks["engine dali"].ok
    assert checks["engine reference"].ok
    assert checks["storage"].ok
    assert not (tmp_path / "runs").exists()
    assert {"python", "torch", "cpu", "memory", "apex", "collectives", "packages", "DALI"} <= checks.keys()
    assert [check.name for check in checks.values() if bool(check.remedy) is check.ok] == []


def test_an_unusable_storage_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for storage in (str(file), str(file / "runs"), "nothing://bucket"):
        check = by_name(doctor.collect(storage=storage))["storage"]
        assert not check.ok
        assert storage in check.value


@pytest.mark.parametrize(("state", "ok"), [("nvidia", True), ("missing", True), ("unrelated", False)])
def test_the_wrong_apex_is_not_well_and_none_is(state: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from thawline.trainer.optimisers import optim

    monkeypatch.setattr(optim, "find_apex", lambda: (state, f"it is {state}"))
    check = by_name(doctor.collect())["apex"]
    assert (check.value, check.ok) == (f"it is {state}", ok)
