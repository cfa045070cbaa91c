"""The timing harness: order, turns and the interval of a median; no time is asserted."""

from __future__ import annotations

import numpy as np

from kdcli.base.timing import interleaved, median_interval, warm_up


def test_calls_take_turns_in_random_order() -> None:
    calls: list[int] = []
    seconds = interleaved(
        [lambda index=index: calls.append(index) for index in range(3)], rounds=8, repeats=2
    )
    assert seconds.shape == (8, 3, 2)
    turns = np.array(calls).reshape(8, 3, 3)  # an untimed call and two timed ones
    assert (turns == turns[:, :, :1]).all()
    orders = turns[:, :, 0].tolist()
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(set(map(tuple, orders))) > 1


def test_a_spent_budget_ends_the_rounds_after_the_first() -> None:
    assert interleaved([lambda: None], rounds=5, budget_s=0).shape == (1, 1, 1)
    calls: list[int] = []
    warm_up(lambda: calls.append(0), at_least_s=0)
    assert len(calls) >= 3


def test_a_median_is_within_its_interval_as_often_as_stated() -> None:
    """Of 41 values the 14th and the 28th: 1 − 2·P(Binomial(41, ½) ≤ 13) = 97.2 %."""
    assert median_interval(np.arange(1.0, 42.0)[::-1]) == (14, 21, 28)
    random = np.random.default_rng(5)
    inside = 0
    for _ in range(2000):
        low, _, high = median_interval(random.exponential(size=41))
        inside += low <= np.log(2) <= high
    assert 0.955 < inside / 2000 < 0.985
