"""A connection is closed once, from any thread, and frees the one that opens it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from quatro_ray.weight_sync.connection import Connection

PATIENCE_S = 60.0


def test_what_was_opened_is_released_once_and_in_any_order() -> None:
    connection = Connection()
    released: list[object] = []
    assert connection.open(lambda: 3, released.append, PATIENCE_S) == 3
    connection.on_close(lambda: released.append("early"))
    connection.close("first")
    connection.close("second")
    connection.on_close(lambda: released.append("late"))
    assert released == ["early", "late"]


def test_a_failure_is_raised_and_closes() -> None:
    connection = Connection()
    released: list[object] = []
    connection.on_close(lambda: released.append("it"))
    with pytest.raises(ConnectionAbortedError, match="refused"), connection.closed_on_failure():
        connection.open(lambda: (_ for _ in ()).throw(OSError("refused")).__next__(), released.append, PATIENCE_S)
    assert released == ["it"]


def test_the_first_reason_is_the_one_that_is_raised() -> None:
    connection = Connection()
    with pytest.raises(ConnectionAbortedError, match=r"^an engine died$"), connection.closed_on_failure():
        connection.close("an engine died")
        raise RuntimeError("the group is gone")


def test_a_closed_connection_is_not_used() -> None:
    connection = Connection()
    connection.close("an engine died")
    with pytest.raises(ConnectionAbortedError, match="an engine died"), connection.closed_on_failure():
        pytest.fail("nothing can be sent")


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "late"])
def test_a_thread_that_is_stuck_in_opening_is_left_behind_and_what_it_opens_is_discarded(closes: bool) -> None:
    connection, goes_on, discarded = Connection(), threading.Event(), threading.Event()

    def open_it() -> str:
        if closes:
            connection.close("an engine died")
        assert goes_on.wait(PATIENCE_S)
        return "opened"

    with ThreadPoolExecutor(1) as caller:
        opening = caller.submit(connection.open, open_it, lambda _: discarded.set(), PATIENCE_S if closes else 0.1)
        with pytest.raises(ConnectionAbortedError, match="an engine died" if closes else r"within 0\.1 s"):
            opening.result(PATIENCE_S)
    assert not discarded.is_set()
    goes_on.set()
    assert discarded.wait(PATIENCE_S)


def test_a_closed_connection_is_not_opened() -> None:
    connection, discarded = Connection(), threading.Event()
    connection.close("too late")
    with pytest.raises(ConnectionAbortedError, match="too late"):
        connection.open(lambda: 3, lambda _: discarded.set(), PATIENCE_S)
    assert discarded.wait(PATIENCE_S)
