"""Who kept the others waiting: the sentence, and a rank that really hangs, named by another with its step."""

import ast
import sys
import threading
import time
from pathlib import Path

import pytest

import thawline
from tests.kit.ranks import Here, Outcome, worlds_of
from thawline.cluster.run.pulse import _MEETINGS, Pulse, Sign, _place, sentence
from thawline.trainer.step import world

HERE = Sign(7, "here", True, 0.0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (None, "rank 1 has given no sign of life;"),
        (Sign(6, "dataio/x.py, in f", False, 40.2), "rank 1 has given no sign of life for 40 s (its last: step 6, dat"),
        (Sign(7, "dataio/x.py, in f", False, 0.5), "rank 1 is still at work in step 7 (dataio/x.py, in f);"),
        (
            Sign(7, "trainer/step/world.py, in worst", True, 0.5),
            "every rank waits for the others, so something between",
        ),
    ],
)
def test_the_sentence_names_who_was_late(other: Sign | None, said: str) -> None:
    told = sentence(0, 7, [HERE, other, HERE])
    assert told.startswith("rank 0 waited in vain for the others in step 7: ")
    assert said in told
    assert "rank 2" not in told


def test_a_place_is_in_our_code_and_knows_where_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = threading.Event(), threading.Event()

    def gather(values: list[object], value: object) -> None:
        told.set()
        asked.wait(10)
        values[:] = [value, value]  # what another rank says is the same

    monkeypatch.setattr(world, "world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather", gather)
    thread = threading.Thread(target=world.gather, args=(1,))
    thread.start()
    told.wait(10)
    waiting = _place(sys._current_frames()[thread.ident or 0])
    asked.set()
    thread.join()
    assert waiting == ("trainer/step/world.py, in _exchange", True)
    assert _place(sys._getframe()) == ("outside of thawline's code", False)


@pytest.mark.parametrize(("file", "name"), sorted(_MEETINGS))
def test_where_ranks_are_said_to_meet_there_is_such_a_function(file: str, name: str) -> None:
    source = (Path(thawline.__file__).parent / file).read_text(encoding="utf-8")
    assert name in {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


def test_only_a_wait_in_vain_is_explained() -> None:
    alone = Pulse(rank=0, world_size=1, hang_s=3.0)
    assert alone.explain(RuntimeError("Timed out waiting")) is None
    alone.close()


def hanging(here: Here) -> Outcome:
    """The last rank stands still for a while when it is asked for its fourth batch."""
    train, valid = here.data()

    def before(step: int) -> None:
        if here.last and step == 3:
            time.sleep(12)

    train.before = before
    pulse = Pulse(rank=here.rank, world_size=here.size, hang_s=3.0)
    learn = here.learner("hangs", data=(train, valid), sinks=[pulse])
    pulse.begin(0)
    began = time.monotonic()
    try:
        learn.fit_one_cycle(3, 1e-2)
    except RuntimeError as error:
        return {"said": pulse.explain(error), "raw": str(error), "after_s": time.monotonic() - began}
    finally:
        pulse.close()
    return {"said": "nothing"}


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_step_by_the_one_that_waits(tmp_path: Path) -> None:
    first, last = worlds_of(hanging, tmp_path, sizes=(2,))[2]
    assert "rank 0 waited in vain for the others in step 3: rank 1 is still at work in step 3 (" in first["said"], first
    assert first["after_s"] < 12, "before the other came back"
    assert last["said"] != "nothing"
