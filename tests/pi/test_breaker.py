"""The circuit breaker, a pure state machine whose clock is a number here: all transitions and
non-transitions.
"""

from __future__ import annotations

import pytest

from cerebrum.pi.breaker import (
    FAILURES_TO_OPEN,
    MAX_OPEN_SECONDS,
    OPEN_SECONDS,
    TRIAL_SECONDS,
    Breaker,
)

GONE = "it is gone"
OPEN = {"state": "open", "failures": 3, "opens": 1, "retry_in_s": 4.0}
TWICE = ("failed", "failed", "succeeded") * 2
OUTCOMES = [(("failed",) * 3, [1, 2, 3]), (TWICE, [1, 2, 0, 1, 2, 0]), (("failed", "left"), [1, 1])]


def opened() -> Breaker:
    """Open since 0.0."""
    breaker = Breaker()
    for now in (-2.0, -1.0, 0.0):
        breaker.admit(now).failed(now, GONE)
    return breaker


def half_open() -> Breaker:
    """Half-open at 5.0, no trial yet."""
    breaker = opened()
    breaker.healthy(OPEN_SECONDS)
    assert (breaker.state, breaker.admits) == ("half-open", True)
    return breaker


@pytest.mark.parametrize(("outcomes", "failures"), OUTCOMES)
def test_the_third_failure_in_a_row_opens(outcomes, failures):
    breaker, seen = Breaker(), []
    for now, outcome in enumerate(outcomes):
        assert breaker.admits
        more = {"failed": (now, GONE), "succeeded": (now,), "left": ()}[outcome]
        getattr(breaker.admit(now), outcome)(*more)
        seen.append((breaker.state, breaker.failures))
    expected = [("open" if count == FAILURES_TO_OPEN else "closed", count) for count in failures]
    assert seen == expected
    assert breaker.message == (GONE if failures[-1] else "")


def test_requests_that_fail_together_count_once_unless_each_has_waited():
    """Such as the streams of one replica of several; a token of the others shows that the backend
    works.
    """
    breaker = Breaker()
    *together, living = [breaker.admit(0.0) for _ in range(9)]
    for now, request in enumerate(together, 1):
        request.failed(now, GONE)
    assert (breaker.state, breaker.failures) == ("closed", 1)
    breaker.admit(10.0).failed(10.0, GONE)
    living.succeeded(11.0)
    assert (breaker.state, breaker.failures) == ("closed", 0)
    living.failed(12.0, GONE)
    assert (breaker.state, breaker.failures) == ("closed", 1)
    for now, request in enumerate([breaker.admit(12.0) for _ in range(2)], 22):
        request.failed(now, GONE, late=True)
    assert breaker.state == "open"


def test_an_open_one_admits_nothing_until_a_good_health_after_the_pause():
    breaker = opened()
    breaker.expire(1000.0)
    breaker.healthy(OPEN_SECONDS - 0.001)
    assert not breaker.admits
    assert breaker.describe(1.0) == OPEN
    breaker.healthy(OPEN_SECONDS)
    assert breaker.state == "half-open"


def test_a_token_of_the_only_trial_closes_it_and_forgets_the_pause():
    breaker = half_open()
    breaker.admit(5.0).left()
    assert (breaker.state, breaker.admits) == ("half-open", True)
    trial = breaker.admit(5.0)
    assert not breaker.admits
    trial.succeeded(5.5)
    closed = {"state": "closed", "failures": 0, "opens": 1, "retry_in_s": 0.0}
    assert breaker.describe(5.5) == closed
    trial.succeeded(5.7)  # the trial goes on as a request of the closed state
    trial.failed(6.0, GONE)
    assert (breaker.state, breaker.failures) == ("closed", 1)
    for now in (7.0, 8.0):
        breaker.admit(now).failed(now, GONE)
    assert breaker.retry_in(8.0) == OPEN_SECONDS


def test_failed_trials_double_the_pause_up_to_a_minute():
    breaker, pauses = opened(), list[float]()
    now = 0.0
    for _ in range(6):
        pauses.append(breaker.retry_in(now))
        now += pauses[-1]
        breaker.healthy(now)
        breaker.admit(now).failed(now, GONE)
        assert breaker.state == "open"
    assert pauses == [5, 10, 20, 40, MAX_OPEN_SECONDS, MAX_OPEN_SECONDS]
    assert breaker.opens == 7


def test_an_overdue_trial_has_failed_at_the_next_probe_and_looking_changes_nothing():
    breaker = half_open()
    trial = breaker.admit(5.0)
    late = 5.0 + TRIAL_SECONDS
    breaker.expire(late - 0.001)
    assert (breaker.describe(late)["state"], breaker.admits) == ("half-open", False)
    breaker.expire(late)
    assert breaker.retry_in(late) == 2 * OPEN_SECONDS
    trial.succeeded(late + 1)  # its token comes too late
    assert breaker.state == "open"


def test_late_results_of_an_older_state_count_for_nothing():
    breaker = Breaker()
    slow = [breaker.admit(-9.0) for _ in range(3)]
    for now in (-2.0, -1.0, 0.0):
        breaker.admit(now).failed(now, GONE)
    slow[0].succeeded(1.0)
    slow[1].failed(1.0, GONE)
    assert breaker.describe(1.0) == OPEN
    breaker.healthy(5.0)
    trial = breaker.admit(5.0)
    slow[1].failed(5.5, GONE)
    slow[2].left()
    assert not breaker.admits, "an old request has freed the trial"
    slow[2].succeeded(6.0)
    assert breaker.state == "half-open"
    trial.succeeded(6.5)
    slow[1].failed(7.0, GONE)
    assert (breaker.state, breaker.failures) == ("closed", 0)
