"""What does a preset set, and what stands against it?"""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.kit.jobs import JOB
from thawline.cluster.job.checks import check
from thawline.cluster.job.flags import override
from thawline.cluster.job.job import (
    Augment,
    from_dict,
    from_toml,
    to_toml,
)

# Presets ---------------------------------------------------------------------------------------------------


SATELLITE = Augment(preset="satellite", dihedral=True, max_zoom=1.2, max_warp=0.0, max_lighting=0.1)


def test_a_preset_sets_the_fields_that_a_file_does_not_give(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[augment]\nmax_zoom = 1.2\npreset = "satellite"\n')
    job = from_toml(file)
    assert job.augment == SATELLITE
    file.write_text(to_toml(job))
    assert from_toml(file) == job
    assert {line.split(" ")[0] for line in to_toml(job).splitlines()} >= {f.name for f in fields(Augment)}
    # A value given is given, even if it is the default's.
    assert from_dict({"augment": {"preset": "satellite", "max_zoom": 1.1}}).augment == replace(SATELLITE, max_zoom=1.1)


@pytest.mark.parametrize("zoom", ["1.2", "1.1", "1.05"])
def test_flags_go_on_top_of_a_preset_in_any_order(zoom: str) -> None:
    preset, other = ["--augment.preset", "satellite"], ["--augment.max-zoom", zoom]
    expected = replace(JOB, augment=replace(SATELLITE, max_zoom=float(zoom)))
    assert override(JOB, preset + other) == expected
    assert override(JOB, other + preset) == expected
    assert override(override(JOB, preset), other) == expected
    assert check(expected) == expected


def test_another_preset_replaces_what_the_first_one_set_and_leaves_the_rest() -> None:
    file = from_dict({"augment": {"preset": "satellite", "max_zoom": 1.2, "mixup": 0.4}})
    digits = override(file, ["--augment.preset", "digits", "--augment.border", "reflect"])
    assert digits.augment == Augment(
        preset="digits", flip=False, min_zoom=0.9, max_zoom=1.2, max_warp=0.1, border="reflect", mixup=0.4
    )
    assert override(file, ["--augment.preset", "default"]).augment == Augment(max_zoom=1.2, mixup=0.4)
    assert override(file, ["--augment.preset", "satellite"]) == file
