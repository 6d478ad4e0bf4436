"""When to stop, and which iterate to return."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from scialm_dask.config import Settings
from scialm_dask.solve.ialm import HeldOutStop, ResidualStop, stop_rule


@dataclass(frozen=True)
class Line:
    iteration: int
    residual: float = 0.5
    held_out: float = float("nan")


def verdicts(rule, errors, residual=0.5, first=1):
    """Judge one after the other until the rule stops; how many were judged, which was the last best, and why."""
    best, reason, number = None, "", 0
    for number, error in enumerate(errors, start=first):
        verdict = rule.judge(Line(number, residual, error))
        best = number if verdict.best_so_far else best
        reason = verdict.reason
        if reason:
            break
    return number, best, reason


def test_the_residual_must_fall_below_epsilon():
    rule = ResidualStop(1e-3)
    assert rule.judge(Line(1, 1e-3)).reason == ""
    last = rule.judge(Line(2, 9.99e-4))
    assert last.best_so_far
    assert last.reason == "residual 0.000999 is below ε = 0.001"


def test_the_error_may_rise_for_less_than_the_patience():
    assert verdicts(HeldOutStop(1e-4, 3), [5, 4, 4.5, 4.1, 3, 3.5, 3.4, 3.3, 9]) == (
        8,
        5,
        "held-out error lowest at iteration 5, and not since",
    )
    assert verdicts(HeldOutStop(1e-4, 1), [5, 4, 4, 3])[:2] == (3, 2)  # as low is not lower


def test_the_residual_stops_the_held_out_rule_too():
    number, best, reason = verdicts(HeldOutStop(1e-4, 3), [3, 2, 1], residual=1e-5)
    assert (number, best) == (1, 1)
    assert "below ε" in reason


def test_iterations_before_the_first_one_judged_are_not_waited_for():
    """Those whose A is zero are made in closed form and not judged."""
    assert verdicts(HeldOutStop(1e-4, 2), [1.0, 0.9, 0.95, 0.95], first=8)[:2] == (11, 9)


@given(st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=40), st.integers(1, 6))
def test_what_is_returned_is_the_lowest_that_was_seen(errors, patience):
    number, best, reason = verdicts(HeldOutStop(1e-4, patience), errors)
    seen = errors[:number]
    assert seen[best - 1] == min(seen)
    assert best == 1 + seen.index(min(seen))
    assert bool(reason) == (number - best >= patience)
    assert number - best <= patience


def test_settings_choose_the_rule():
    rule = stop_rule(Settings(stop="residual", epsilon=0.4))
    assert isinstance(rule, ResidualStop)
    assert rule.judge(Line(1, 0.39)).reason
    rule = stop_rule(Settings(stop="held-out", patience=2))
    assert verdicts(rule, [1, 2, 3, 4])[:2] == (3, 1)
