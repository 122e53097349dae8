"""A large share of exhausted responses is told, and told again only after as many groups."""

from __future__ import annotations

from quatro_ray.orchestrator.exhausted_alarm import ExhaustedAlarm


def test_the_alarm_is_given_above_the_share_and_not_for_each_group() -> None:
    alarm = ExhaustedAlarm()
    told = [alarm.add({"ok": 3, "exhausted": 1}) for _ in range(16)]
    assert [number for number, text in enumerate(told, start=1) if text] == [8, 16]
    assert "8 of the last 32 responses were exhausted" in str(told[7])


def test_a_few_exhausted_responses_are_no_alarm() -> None:
    alarm = ExhaustedAlarm()
    assert not any(alarm.add({"ok": 4, "exhausted": 1}) for _ in range(40))
