"""The best total within a cost: against trying every combination, and what holds for every budget."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrp_hf.plans.allocation import Frontier, Menu

NUMBER = st.integers(0, 40).map(lambda n: n / 8)  # sums of these are exact
MENU = st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=5).map(lambda rows: Menu(*map(list, zip(*rows, strict=True))))
MENUS = st.lists(MENU, min_size=1, max_size=4)


def totals(menus, options):
    costs = sum(menu.costs[option] for menu, option in zip(menus, options, strict=True))
    return costs, sum(menu.values[option] for menu, option in zip(menus, options, strict=True))


def tried(menus):
    """(cost, value) of every combination."""
    return [totals(menus, options) for options in itertools.product(*(range(len(menu.costs)) for menu in menus))]


@given(MENUS, st.integers(0, 160))
def test_the_choice_is_the_best_of_all_combinations(menus, eighths):
    limit = eighths / 8
    frontier, everything = Frontier(menus), tried(menus)
    assert frontier.least == min(cost for cost, _ in everything)
    fitting = [value for cost, value in everything if cost <= limit]
    if not fitting:
        with pytest.raises(ValueError, match=re.escape(f"`limit` must be at least {frontier.least:g}, the lowest cost")):
            frontier.choose(limit)
        return
    cost, value = totals(menus, frontier.choose(limit))
    assert cost <= limit
    assert value == max(fitting)
    assert cost == min(c for c, v in everything if v == value)  # nothing is spent for nothing


@given(MENUS)
def test_every_point_of_the_frontier_is_reached_and_none_is_beaten(menus):
    frontier = Frontier(menus)
    for cost, value in zip(frontier.costs, frontier.values, strict=True):
        assert totals(menus, frontier.choose(cost)) == (cost, value)
        assert not any(c <= cost and v > value for c, v in tried(menus))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 60))
def test_a_thinned_frontier_fits_its_limit_and_is_as_good_as_the_best_of_a_slightly_lower_one(seed, max_points):
    rng = np.random.default_rng(seed)
    menus = [Menu(rng.random(4), rng.random(4)) for _ in range(5)]
    frontier, everything = Frontier(menus, max_points), tried(menus)
    cheapest, dearest = min(everything)[0], sum(menu.costs.max() for menu in menus)
    slack = len(menus) / (max_points - 1) * dearest
    rows = np.array(everything)
    best = -np.inf
    for limit in np.linspace(frontier.least, dearest, 20):
        cost, value = totals(menus, frontier.choose(limit))
        assert cost <= limit + 1e-12
        assert value >= best - 1e-12  # a higher limit is never worse
        best = max(best, value)
        assert value >= rows[rows[:, 0] <= limit - slack, 1].max(initial=-np.inf) - 1e-12
    assert frontier.least == pytest.approx(cheapest, abs=1e-12)
    assert len(frontier.costs) <= max_points + 1


def test_many_menus_of_concave_values_are_spent_as_the_greedy_choice_spends_them():
    """Where each further unit of a menu is worth less, taking the best unit that is left is optimal."""
    rng = np.random.default_rng(0)
    gains = [np.sort(rng.random(40))[::-1] for _ in range(24)]
    menus = [Menu(np.arange(41), np.concatenate(([0.0], gain.cumsum()))) for gain in gains]
    frontier = Frontier(menus)
    for limit in (100, 500):
        cost, value = totals(menus, frontier.choose(limit))
        assert cost == limit
        assert value == pytest.approx(np.sort(np.concatenate(gains))[::-1][:limit].sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Frontier([]), "`menus` must hold at least one menu, got none."),
        (
            lambda: Menu([], []),
            "`costs` and `values` must hold one number per option, at least one, got shapes (0,) and (0,).",
        ),
        (lambda: Menu([1.0], [1.0, 2.0]), "at least one, got shapes (1,) and (2,)."),
        (lambda: Menu([-1.0], [1.0]), "`costs` must be finite and at least 0, `values` finite, got [-1.] and [1.]."),
        (lambda: Menu([1.0], [np.nan]), "`costs` must be finite and at least 0, `values` finite, got [1.] and [nan]."),
        (lambda: Frontier([Menu([2.0], [1.0])]).choose(1.5), "`limit` must be at least 2, the lowest cost that can be"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
