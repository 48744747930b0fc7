"""The circuit breaker, a pure state machine whose clock is a number here: all transitions and non-transitions."""

from __future__ import annotations

import pytest

from cerebrum.pi.breaker import FAILURES_TO_OPEN, MAX_OPEN_SECONDS, OPEN_SECONDS, TRIAL_SECONDS, Breaker


def breaker(chance: float = 0.5) -> Breaker:
    return Breaker(lambda: chance)


def admitted(machine: Breaker, now: float = 0.0) -> int:
    ticket = machine.admit(now)
    assert ticket is not None
    return ticket


def opened(now: float = 0.0, chance: float = 0.5) -> Breaker:
    machine = breaker(chance)
    for _ in range(FAILURES_TO_OPEN):
        machine.failed(admitted(machine, now), now)
    assert machine.state == "open"
    return machine


def half_open() -> Breaker:
    """Half-open at 5.0, no trial yet."""
    machine = opened()
    machine.healthy(OPEN_SECONDS)
    assert machine.state == "half-open"
    return machine


def test_closed_admits_any_number():
    machine = breaker()
    assert [machine.admit(0.0) for _ in range(5)] == [1] * 5
    assert machine.describe(0.0) == {"state": "closed", "failures": 0, "opens": 0, "retry_in_s": 0.0}


@pytest.mark.parametrize(
    ("outcomes", "failures"),
    [
        (("failed", "failed", "failed"), [1, 2, 3]),
        (("failed", "failed", "succeeded") * 2, [1, 2, 0, 1, 2, 0]),
        (("failed", "left"), [1, 1]),
    ],
)
def test_the_third_failure_in_a_row_opens(outcomes: tuple[str, ...], failures: list[int]):
    machine, seen = breaker(), []
    for outcome in outcomes:
        now = (0.0,) if outcome == "failed" else ()
        getattr(machine, outcome)(admitted(machine), *now)
        seen.append((machine.state, machine.failures))
    assert seen == [("open" if count == FAILURES_TO_OPEN else "closed", count) for count in failures]


def test_an_open_one_describes_itself():
    assert opened().describe(1.0) == {"state": "open", "failures": 3, "opens": 1, "retry_in_s": 4.0}


def test_a_token_and_then_a_failure_of_one_request_counts_once():
    machine = breaker()
    ticket = machine.succeeded(admitted(machine))
    machine.failed(ticket, 0.0)
    assert (machine.state, machine.failures) == ("closed", 1)


def test_requests_that_fail_together_count_once():
    """Such as the streams of one replica of several; a token of the others shows that the backend works."""
    machine = breaker()
    together = [admitted(machine) for _ in range(8)]
    living = admitted(machine)
    for ticket in together:
        machine.failed(ticket, 0.0)
    assert (machine.state, machine.failures) == ("closed", 1)
    machine.failed(admitted(machine), 0.0)
    living = machine.succeeded(living)
    assert (machine.state, machine.failures) == ("closed", 0)
    machine.failed(living, 0.0)
    assert (machine.state, machine.failures) == ("closed", 1)


def test_a_request_of_another_address_says_nothing_of_this_one():
    machine = breaker()
    old = admitted(machine)
    machine.reset()
    machine.failed(admitted(machine), 0.0)
    machine.failed(machine.succeeded(old), 0.0)
    assert (machine.state, machine.failures) == ("closed", 1)


def test_each_request_that_waited_in_vain_counts():
    machine = breaker()
    for ticket in [admitted(machine) for _ in range(3)]:
        machine.failed(ticket, 0.0, late=True)
    assert machine.state == "open"


def test_open_admits_nothing_whatever_the_time():
    machine = opened()
    assert [machine.admit(now) for now in (0.0, 4.9, 5.0, 1000.0)] == [None] * 4
    assert machine.state == "open"


@pytest.mark.parametrize(("chance", "pause"), [(0.0, 4.0), (0.5, 5.0), (1.0, 6.0)])
def test_the_pause_has_a_jitter_of_a_fifth(chance: float, pause: float):
    machine = opened(now=100.0, chance=chance)
    assert machine.retry_in(100.0) == pytest.approx(pause)


def test_a_good_health_counts_only_after_the_pause():
    machine = opened()
    machine.healthy(OPEN_SECONDS - 0.001)
    assert machine.state == "open"
    machine.healthy(OPEN_SECONDS)
    assert machine.state == "half-open"


@pytest.mark.parametrize("machine", [breaker(), half_open()], ids=["closed", "half-open"])
def test_a_good_health_means_nothing_to_other_states(machine: Breaker):
    before = machine.state, machine.admit(5.0)
    machine.healthy(6.0)
    assert machine.state == before[0]
    assert machine.succeeded(before[1] or 0) != 0


def test_half_open_admits_exactly_one_trial():
    machine = half_open()
    admitted(machine, 5.0)
    assert [machine.admit(now) for now in (5.0, 6.0, 5.0 + TRIAL_SECONDS - 0.001)] == [None] * 3


def test_a_token_of_the_trial_closes_it_and_forgets_the_pause():
    machine = half_open()
    ticket = machine.succeeded(admitted(machine, 5.0))
    assert machine.describe(5.0) == {"state": "closed", "failures": 0, "opens": 1, "retry_in_s": 0.0}
    machine.failed(ticket, 6.0)  # the trial goes on as a request of the closed state
    assert (machine.state, machine.failures) == ("closed", 1)
    for _ in range(2):
        machine.failed(admitted(machine, 6.0), 6.0)
    assert machine.retry_in(6.0) == pytest.approx(OPEN_SECONDS)


def test_failed_trials_double_the_pause_up_to_a_minute():
    machine, now, pauses = opened(), 0.0, []
    for _ in range(6):
        pauses.append(machine.retry_in(now))
        now += pauses[-1]
        machine.healthy(now)
        machine.failed(admitted(machine, now), now)
        assert machine.state == "open"
    assert pauses == pytest.approx([5, 10, 20, 40, MAX_OPEN_SECONDS, MAX_OPEN_SECONDS])
    assert machine.opens == 7


def test_a_trial_whose_client_leaves_makes_room_for_the_next():
    machine = half_open()
    machine.left(admitted(machine, 5.0))
    assert machine.state == "half-open"
    machine.succeeded(admitted(machine, 6.0))
    assert machine.state == "closed"


def test_an_overdue_trial_has_failed_at_the_next_probe_and_looking_changes_nothing():
    machine = half_open()
    ticket = admitted(machine, 5.0)
    late = 5.0 + TRIAL_SECONDS
    machine.expire(late - 0.001)
    assert (machine.describe(late)["state"], machine.admits(), machine.admit(late)) == ("half-open", False, None)
    machine.expire(late)
    assert machine.state == "open"
    assert machine.retry_in(late) == pytest.approx(2 * OPEN_SECONDS)
    assert machine.succeeded(ticket) == ticket  # its token comes too late
    assert machine.state == "open"


def test_late_results_of_an_older_state_count_for_nothing():
    machine = breaker()
    slow = [admitted(machine) for _ in range(3)]
    for _ in range(3):
        machine.failed(admitted(machine), 0.0)
    machine.succeeded(slow[0])
    assert machine.state == "open"
    machine.failed(slow[1], 1.0)
    assert machine.describe(1.0) == {"state": "open", "failures": 3, "opens": 1, "retry_in_s": 4.0}
    machine.healthy(5.0)
    trial = admitted(machine, 5.0)
    machine.failed(slow[1], 5.0)
    machine.left(slow[2])
    assert machine.admit(5.0) is None, "an old request has freed the trial"
    machine.succeeded(slow[2])
    assert machine.state == "half-open"
    machine.succeeded(trial)
    machine.failed(slow[1], 6.0)
    assert (machine.state, machine.failures) == ("closed", 0)
