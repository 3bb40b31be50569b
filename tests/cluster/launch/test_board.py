"""What passes between a driver and its workers: nothing is lost, and the first error is the one that counts."""

import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from thawline.cluster.launch.board import Board, board_at, served
from thawline.cluster.launch.messages import Asked, Outcome
from thawline.trainer.step.sentences import Sentence


def test_rows_are_taken_once_and_in_order() -> None:
    board = Board()
    board.publish([{"step": 1}, {"step": 2}])
    board.publish([{"step": 3}])
    assert [row["step"] for row in board.take()] == [1, 2, 3]
    assert board.take() == []


def test_a_request_to_stop_reaches_whoever_asks_next() -> None:
    board = Board()
    assert board.asked() == Asked()
    board.request_stop()
    assert board.asked() == Asked(stop=True)


def test_a_warning_is_for_the_group_of_workers_that_hears_it() -> None:
    board = Board()
    assert board.begin(2) == 0
    board.warn(1234.5)
    assert board.asked() == Asked(taken_at=1234.5)
    assert board.begin(1) == 1
    assert board.asked() == Asked()
    assert [(row["kind"], row["workers"], row["restarts"]) for row in board.take()] == [
        ("group", 2, 0),
        ("group", 1, 1),
    ]


def test_failures_and_machines_taken_away_are_counted_apart() -> None:
    board = Board(failures=1, preemptions=2)
    soon = time.time() + 30
    for taken_at, again in ((None, True), (soon, True), (soon, True), (soon, False), (None, False)):
        board.begin(2)
        if taken_at:
            board.warn(taken_at)
        assert board.again("rank 1 died") is again
    assert [row["text"] for row in board.take() if row["kind"] == "note"] == [
        f"rank 1 died: going on from the last checkpoint, and {more} are survived"
        for more in ("0 more failures", "1 more preemptions", "0 more preemptions")
    ]


def test_a_warning_of_long_ago_excuses_no_failure() -> None:
    board = Board(failures=0, preemptions=-1)
    board.begin(2)
    board.warn(time.time() - 3600)
    assert not board.again()


def test_any_number_may_be_survived() -> None:
    board = Board(failures=-1)
    assert all(board.again() for _ in range(100))


def test_workers_that_found_no_place_or_made_way_cost_nothing() -> None:
    board = Board(failures=0)
    assert board.again(placed=False)
    board.begin(1)
    board.make_way()
    assert not board.finish({"status": "stopped", "steps": 3})
    assert board.again()
    assert not board.again()  # the next one is a failure


def test_no_group_follows_a_result_or_an_error_of_the_users() -> None:
    ended = Board(failures=9)
    ended.begin(1)
    assert ended.finish({"status": "finished"})
    assert not ended.again()
    failed = Board(failures=9)
    failed.fail(Sentence("UnknownModelError", "no such model"))
    assert not failed.again()


def test_the_first_error_is_kept() -> None:
    board = Board()
    board.fail(Sentence("DataError", "the cause"))
    board.fail(Sentence("TrainError", "what followed from it"))
    assert board.outcome() == Outcome(error=Sentence("DataError", "the cause"))


def test_its_process_imports_nothing_heavy() -> None:
    heavy = "print([m for m in ('torch', 'ray', 'nvidia.dali', 'pyarrow') if m in __import__('sys').modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import thawline.cluster.launch.board; {heavy}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_group_that_makes_way_stops_and_leaves_no_result() -> None:
    board = Board()
    board.begin(1)
    board.make_way()
    assert board.asked() == Asked(stop=True)
    board.finish({"status": "stopped", "steps": 3})
    assert board.outcome() == Outcome()
    board.begin(1)
    assert board.asked() == Asked()
    board.finish({"status": "finished"})
    assert board.outcome() == Outcome(result={"status": "finished"})


def test_a_stop_that_was_asked_for_is_a_result() -> None:
    board = Board()
    board.make_way()
    board.request_stop()
    board.finish({"status": "stopped", "steps": 3})
    assert board.outcome().result == {"status": "stopped", "steps": 3}


def test_a_served_board_is_called_from_elsewhere(tmp_path: Path) -> None:
    board, path = Board(failures=1), tmp_path / "board"
    with served(board, path):
        away = pickle.loads(pickle.dumps(board_at(path)))
        away.publish([{"kind": "note", "text": "one"}])
        with ThreadPoolExecutor(8) as pool:  # one call after the other, whoever calls
            list(pool.map(away.publish, [[{"kind": "train", "step": step}] for step in range(64)]))
        rows = board_at(path).take()
        assert rows[0] == {"kind": "note", "text": "one"}
        assert sorted(int(row["step"] or 0) for row in rows[1:]) == list(range(64))
        away.request_stop()
        assert away.asked() == Asked(stop=True)
        assert [away.again(placed=False), away.again(), away.again()] == [True, True, False]
    assert board.asked() == Asked(stop=True)
    with pytest.raises(OSError, match="No such file"):
        away.asked()


class Unreadable(Exception):  # noqa: N818  # as a user's may be
    """One whose pickle cannot be read."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__("needs two")


def test_who_breaks_off_or_sends_nonsense_does_not_end_the_board(tmp_path: Path) -> None:
    path = tmp_path / "board"
    with served(Board(), path):
        with Client(str(path)):
            pass
        with pytest.raises(EOFError):
            board_at(path).fail(Unreadable(1, 2))  # type: ignore[arg-type]
        board_at(path).fail(Sentence("DataError", "readable"))
        assert board_at(path).outcome().error == Sentence("DataError", "readable")
