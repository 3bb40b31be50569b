"""Does a run that is cut short at a write end as the unbroken one? A few points; the campaign tries all."""

import re

import pytest

from tests.campaigns.crash_points import Campaign, Fault, Mode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("crash"))


@pytest.mark.parametrize(
    ("point", "mode"),
    [
        ("write run/claim.json", "kill"),
        ("write run/checkpoints/step_00000004/.state.pt.tmp", "kill"),
        ("rename run/checkpoints/step_00000006/manifest.json", "kill"),
        (r"remove run/checkpoints/step_\d+/model.pt", "kill"),
        ("sync run/checkpoints/step_00000008/.manifest.json.tmp", "error"),
        ("write run/.valid.parquet.tmp", "error"),
        ("rename run/result.json", "kill"),
    ],
)
def test_a_run_that_is_cut_short_at_a_write_ends_as_the_unbroken_one(
    campaign: Campaign, point: str, mode: Mode
) -> None:
    k = next(i for i, each in enumerate(campaign.points) if re.fullmatch(point, str(each)))
    assert campaign.trial(Fault(k, mode)).wrong == ()


def test_every_kind_of_point_is_there_and_none_is_missed(campaign: Campaign) -> None:
    kinds = {point.kind for point in campaign.points}
    assert kinds == {"open", "make", "write", "sync", "rename", "remove"}
    extra = campaign.folder / "unbroken" / "runs" / "run" / "unseen.txt"
    extra.touch()
    with pytest.raises(AssertionError, match=r"written without a point: \['run/unseen.txt'\]"):
        campaign.check_complete()
    extra.unlink()
