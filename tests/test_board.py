"""What passes between a driver and its workers: nothing is lost, and the first error is the one that counts."""

import subprocess
import sys

from cluster.board import Board


def test_rows_are_taken_once_and_in_order() -> None:
    board = Board()
    board.publish([{"step": 1}, {"step": 2}])
    board.publish([{"step": 3}])
    assert [row["step"] for row in board.take()] == [1, 2, 3]
    assert board.take() == []


def test_a_request_to_stop_reaches_whoever_asks_next() -> None:
    board = Board()
    assert board.asked() == (False, None)
    board.request_stop()
    assert board.asked() == (True, None)


def test_a_warning_is_for_the_group_of_workers_that_hears_it() -> None:
    board = Board()
    assert board.begin() == 0
    board.warn(1234.5)
    assert board.asked() == (False, 1234.5)
    assert board.warned()
    assert board.begin() == 1
    assert not board.warned()
    assert board.asked() == (False, None)


def test_the_first_error_is_kept() -> None:
    board = Board()
    board.fail(ValueError("the cause"))
    board.fail(RuntimeError("what followed from it"))
    result, error = board.outcome()
    assert result is None
    assert str(error) == "the cause"


def test_its_process_imports_nothing_heavy() -> None:
    heavy = "print([m for m in ('torch', 'ray', 'nvidia.dali', 'pyarrow') if m in __import__('sys').modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import cluster.board; {heavy}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_group_that_makes_way_stops_and_leaves_no_result() -> None:
    board = Board()
    board.begin()
    board.make_way()
    assert board.asked() == (True, None)
    board.finish({"status": "stopped", "steps": 3})
    assert board.outcome() == (None, None)
    board.begin()
    assert board.asked() == (False, None)
    board.finish({"status": "finished"})
    assert board.outcome() == ({"status": "finished"}, None)


def test_a_stop_that_was_asked_for_is_a_result() -> None:
    board = Board()
    board.make_way()
    board.request_stop()
    board.finish({"status": "stopped", "steps": 3})
    assert board.outcome()[0] == {"status": "stopped", "steps": 3}
