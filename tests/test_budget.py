"""A budget says a count, or finds by measuring the count that meets it."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrp_hf.plans.budget import Budget, KneeNotFoundError, Serving, find_knee


def exact(message):
    return f"^{re.escape(message)}$"


def identity(count):
    return count


@pytest.mark.parametrize(
    ("budget", "available", "count"),
    [
        (Budget.heads(5), 8, 5),
        (Budget.fraction(0.5), 8, 4),
        (Budget.fraction(0.3), 8, 2),
        (Budget.fraction(0.5), 5, 3),
        (Budget.fraction(1), 8, 8),
    ],
    ids=str,
)
def test_counts(budget, available, count):
    assert budget.count(available) == count
    assert not budget.is_measured


@given(limit=st.integers(3, 40), high=st.integers(4, 40))
def test_cost_budget_finds_the_largest_count_that_fits(limit, high):
    measured = []
    budget = Budget.flops(lambda plan: measured.append(plan) or 10.0 * plan, target=10 * limit + 5)
    count, values = budget.search(identity, 3, high)
    assert count == min(limit, high)
    assert values[count] == 10 * count
    assert len(measured) == len(set(measured)) <= 9


@given(needed=st.integers(1, 40), high=st.integers(40, 60))
def test_quality_budget_finds_the_smallest_count_that_holds_it(needed, high):
    budget = Budget.quality(lambda plan: 0.8 if plan >= needed else 0.7, keep=0.99)
    count, values = budget.search(identity, 1, high)
    assert count == needed
    assert values[count] >= 0.99 * values[high]


@given(st.lists(st.floats(0.1, 1), min_size=2, max_size=30), st.floats(0.1, 1))
def test_the_count_found_was_measured_and_meets_the_budget_even_on_noise(values, keep):
    count, measured = Budget.quality(lambda plan: values[plan - 1], keep).search(identity, 1, len(values))
    assert measured[count] >= keep * values[-1]
    limit = max(values)
    count, measured = Budget.latency(lambda plan: values[plan - 1], target=limit).search(identity, 1, len(values))
    assert measured[count] <= limit


def test_a_share_of_the_cost_is_of_the_unpruned_model():
    count, _ = Budget.latency(lambda plan: 2.0 + plan, keep=0.5).search(identity, 1, 10)
    assert count == 4


def test_a_measured_knee_looks_at_few_counts():
    measured = []
    budget = Budget.knee(3, evaluate=lambda plan: measured.append(plan) or 1 - 2 ** (-plan / 10))
    count, values = budget.search(identity, 4, 100)
    assert budget.is_measured
    assert measured == sorted(values)
    assert (len(values), min(values), max(values)) == (16, 4, 100)
    assert count in values
    assert 10 < count < 50


def test_the_knee_of_a_curve_without_one_carries_the_curve():
    curve = [(k, 0.5) for k in range(2, 12)]
    points = ", ".join(f"({k}, 0.5)" for k in range(2, 12))
    message = (
        "The curve of 10 points has no knee at `degree=2`: try another degree, or give a count (`Budget.heads`). The "
        f"curve: {points}."
    )
    with pytest.raises(KneeNotFoundError, match=exact(message)) as error:
        find_knee(curve, 2)
    assert error.value.curve == tuple(curve)
    with pytest.raises(KneeNotFoundError, match=re.escape("The curve of 3 points has no knee at `degree=6`")):
        find_knee([(2, 0.1), (3, 0.5), (4, 0.6)], 6)


def test_a_speedup_is_a_share_of_the_time_by_a_table():
    at, table = Serving(batch_size=1, length=32, runtime="onnx"), object()
    assert Budget.speedup(4, at=at) == Budget.latency(target=0.25, at=at) == Budget.latency(keep=0.25, at=at)
    assert Budget.latency(seconds=0.02, table=table).target == 0.02
    tabled = (Budget.speedup(4), Budget.latency(target=0.25), Budget.flops(keep=0.25), Budget.flops(target=1e9, at=at))
    assert all(budget.is_tabled for budget in tabled)
    measured = (Budget.latency(identity, target=2), Budget.flops(identity, keep=0.5), Budget.parameters(keep=0.5))
    assert not any(budget.is_tabled for budget in measured)


COUNTED = "must be a positive whole number of heads, got"
SHARE = "must be a share above 0 and at most 1, got"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Budget.heads(0), f"`count` {COUNTED} 0."),
        (lambda: Budget.heads(2.5), f"`count` {COUNTED} 2.5."),
        (lambda: Budget.heads(True), f"`count` {COUNTED} True."),
        (lambda: Budget.fraction(0), f"`keep` {SHARE} 0."),
        (lambda: Budget.fraction(1.5), f"`keep` {SHARE} 1.5."),
        (lambda: Budget.fraction("0.5"), f"`keep` {SHARE} '0.5'."),
        (lambda: Budget.quality(identity, keep=99), f"`keep` {SHARE} 99."),
        (
            lambda: Budget.quality(0.9),
            "`evaluate` must be a callable that takes a plan and returns a number, got 0.9.",
        ),
        (
            lambda: Budget.flops(1e9, keep=0.5),
            "`measure` must be a callable that takes a plan and returns a number, got 1000000000.0.",
        ),
        (lambda: Budget.knee(7), "`degree` must be between 2 and 6, got 7."),
        (lambda: Budget.parameters(), "Give either `target` or `keep`, got target=None and keep=None."),
        (lambda: Budget.parameters(5, keep=0.5), "Give either `target` or `keep`, got target=5 and keep=0.5."),
        (lambda: Budget.latency(identity, target=-1), "`target` must be a positive number, got -1."),
        (
            lambda: Budget.latency(target=20),
            "`target` must be a share of the unpruned model's time, above 0 and at most 1, got 20: for seconds give "
            "`seconds`.",
        ),
        (
            lambda: Budget.latency(target=0.5, seconds=0.1),
            "Give exactly one of `target`, `keep` and `seconds`, got target=0.5, keep=None and seconds=0.1.",
        ),
        (
            lambda: Budget.latency(),
            "Give exactly one of `target`, `keep` and `seconds`, got target=None, keep=None and seconds=None.",
        ),
        (lambda: Budget.latency(seconds=0), "`target` must be a positive number, got 0."),
        (
            lambda: Budget.latency(identity, seconds=0.1),
            "`seconds` is for a table; with `measure` give them as `target`.",
        ),
        (
            lambda: Budget.latency(identity, target=2, at=Serving()),
            f"Give one of `measure`, `at` and `table` at most: each says what the cost is, got measure={identity!r}, "
            f"at={Serving()!r} and table=None.",
        ),
        (
            lambda: Budget.flops(keep=0.5, at="8x128"),
            "`at` must be a Serving, such as Serving(batch_size=1, length=32), got '8x128'.",
        ),
        (lambda: Budget.speedup(0.5), "`times` must be a number from 1, such as 4 for a quarter of the time, got 0.5."),
        (lambda: Budget.speedup("4"), "`times` must be a number from 1, such as 4 for a quarter of the time, got '4'."),
        (lambda: Serving(length=0), "`length` must be a whole number from 1, got 0."),
        (lambda: Serving(batch_size=None), "`batch_size` must be a whole number from 1, got None."),
        (lambda: Serving(num_threads=True), "`num_threads` must be a whole number from 1, got True."),
        (lambda: Serving(runtime="compiled"), "`runtime` must be one of eager, onnx, int8, got 'compiled'."),
        (lambda: Budget.heads(9).count(8), "`budget` keeps 9 heads, but must keep 1 to 8: so many are to choose from."),
        (
            lambda: Budget.flops(identity, target=2).search(identity, 3, 9),
            "`budget` allows flops of 2, but the fewest heads (3) need 3: raise it, or lower `min_heads_per_layer`.",
        ),
        (
            lambda: Budget.quality(lambda plan: 0.0).search(identity, 1, 9),
            "`evaluate` gives the unpruned model 0.0, but its quality must be positive.",
        ),
        (
            lambda: Budget.quality(lambda plan: float("nan")).search(identity, 1, 9),
            "The measurement of a plan that keeps 9 heads is nan.",
        ),
    ],
)
def test_bad_budgets_are_refused(build, message):
    with pytest.raises(ValueError, match=exact(message)):
        build()


def test_quality_that_is_undefined_for_few_heads_is_too_low():
    def quality(count):
        return float("nan") if count < 4 else count / 9

    assert Budget.quality(quality, keep=0.3).search(identity, 1, 9)[0] == 4

    def rising(count):
        return float("nan") if count < 3 else min(count, 10) / 10

    bends = [(count, rising(count)) for count in range(1, 17)]
    found, measured = Budget.knee(2, rising).search(identity, 1, 16)
    assert found == round(find_knee(bends[2:], 2))
    assert math.isnan(measured[1])
