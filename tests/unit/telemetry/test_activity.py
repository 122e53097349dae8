"""Seconds and shares of states, on a clock that the test sets."""

from __future__ import annotations

import pytest

from quatro_ray.telemetry.activity import Activity, member_name, shares


def test_the_seconds_of_all_members_are_those_that_passed() -> None:
    time, spans = [10.0], []
    activity = Activity(lambda: time[0])
    activity.on_span = lambda *span: spans.append(span)
    activity.enter(0, "busy")
    activity.enter(1, "start")
    time[0] = 13.0
    activity.enter(0, "idle")
    activity.enter(0, "idle")  # no new stay
    time[0] = 14.0
    assert activity.seconds() == {"busy": 3.0, "idle": 1.0, "start": 4.0}
    assert spans == [(0, "busy", 3.0)]
    activity.close()
    activity.leave(1)  # it is gone already
    time[0] = 20.0
    assert sum(activity.seconds().values()) == 8.0
    assert sorted(spans[1:]) == [(0, "idle", 1.0), (1, "start", 4.0)]


def test_shares_are_of_the_time_since_then_and_add_up_to_one() -> None:
    found = shares({"busy": 7.0, "idle": 2.0, "start": 4.0}, {"busy": 4.0, "start": 4.0})
    assert found == {"busy": pytest.approx(0.6), "idle": pytest.approx(0.4)}
    assert shares({"busy": 1.0}, {"busy": 1.0}) == {} == shares({})


def test_what_goes_on_now() -> None:
    time = [10.0]
    activity = Activity(lambda: time[0])
    activity.enter(0, "busy")
    time[0] = 12.0
    activity.enter(3, "start")
    assert activity.now() == {0: ("busy", 2.0), 3: ("start", 0.0)}
    activity.leave(0)
    assert activity.now() == {3: ("start", 0.0)}
    assert (member_name("generators", 3), member_name("learner", 0)) == ("generator 3", "learner")
