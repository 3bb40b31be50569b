"""Are damaged files told, or read as they were written? A slice of tests.campaigns.fuzz; and would that see it?"""

from pathlib import Path

import pytest

from tests.campaigns.fuzz import GOOD, campaign, outcomes
from tests.campaigns.mutations import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_told_or_read_as_it_was_written(tmp_path: Path, kind: str) -> None:
    found = list(outcomes(kind, tmp_path, seed=14, first=0, count=20))
    assert [each for each in found if each.outcome not in GOOD] == []
    assert len(found) == 20
    assert "told" in {each.outcome for each in found}


@pytest.mark.slow
def test_the_campaign_sees_what_is_wrong_and_goes_on_behind_it() -> None:
    found = list(campaign("planted", 5, seed=15))
    assert [(each.number, each.outcome) for each in found] == list(
        enumerate(("same", "signal", "traceback", "same", "other"))
    )
