"""The state machine of an engine, and when it is tried again."""

from hypothesis import given
from hypothesis import strategies as st

from quatro_ray.actors.restart_policy import TRANSITIONS, Health, Progress, Record, RestartPolicy

POLICY = RestartPolicy(max_restarts=3, first_delay_s=1, max_delay_s=8, stable_s=60)


def test_delays_double_up_to_the_limit() -> None:
    assert [POLICY.delay_s(n) for n in range(1, 8)] == [0, 1, 2, 4, 8, 8, 8]


@given(st.lists(st.tuples(st.sampled_from(Health), st.floats(0, 200)), max_size=60))
def test_no_path_leaves_the_table_and_failures_count_deaths_in_a_row(path: list[tuple[Health, float]]) -> None:
    record, now, deaths = Record(Health.STARTING, 0.0), 0.0, 0
    for state, seconds in path:
        now += seconds
        if state not in TRANSITIONS[record.state]:
            try:
                record.to(state, now, POLICY)
            except ValueError as error:
                assert f"{record.state} cannot become {state}" in str(error)
                continue
            raise AssertionError("a transition that is not in the table")
        before, record = record, record.to(state, now, POLICY)
        if state is Health.DEAD:
            stable = before.state is Health.HEALTHY and now - before.since >= POLICY.stable_s
            deaths = 1 if stable else deaths + 1
        assert record.failures == deaths
        assert record.is_given_up(POLICY) == (record.state is Health.DEAD and deaths > 3)
        assert record.incarnation == before.incarnation + (state is Health.STARTING)
        if state is not before.state:
            assert record.since == now


def test_work_counts_only_once_the_weights_are_there() -> None:
    """Healthy is reached from syncing alone."""
    assert [s for s, following in TRANSITIONS.items() if Health.HEALTHY in following] == [
        Health.SYNCING,
        Health.HEALTHY,
    ]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.floats(0.1, 10)), max_size=40))
def test_hung_is_who_has_requests_and_samples_nothing(looks: list[tuple[int, int, float]]) -> None:
    progress, now, tokens, idle_since = Progress(0, 0.0), 0.0, 0, 0.0
    for num_running, new_tokens, seconds in looks:
        now, tokens = now + seconds, tokens + new_tokens
        if num_running == 0 or new_tokens:
            idle_since = now
        progress = progress.after(num_running, tokens, now)
        assert progress.is_hung(now, 20) == (now - idle_since > 20)
