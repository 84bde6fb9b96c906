from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.evaluate.pass_rates import Solved, by_difficulty, mean_over_problems, pass_at_k


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    n = draw(st.integers(1, 8))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


@given(counts())
def test_pass_at_k_is_the_share_of_choices_with_a_right_sample(drawn: tuple[int, int, int]) -> None:
    n, c, k = drawn
    choices = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("n", "c", "k"), [(200, 3, 100), (1000, 1, 1000), (5000, 17, 10), (5000, 4999, 1), (10, 0, 5)])
def test_pass_at_k_equals_exact_binomials_where_they_are_huge(n: int, c: int, k: int) -> None:
    exact = 1 - comb(n - c, k) / comb(n, k)  # integers of thousands of digits, divided exactly
    assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    # 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 2, 4) == 1.0  # of four samples at most three are wrong


def test_pass_at_k_has_no_bias() -> None:
    """The mean over draws of n samples is 1 - (1 - p)^k, the chance itself."""
    p, n, k = 0.3, 6, 4
    mean = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_counts_without_a_meaning_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}, c {c} and k {k}"):
        pass_at_k(n, c, k)


def test_groups_are_in_the_order_of_apps_and_all_comes_last() -> None:
    names = ("interview", "introductory", "B", "A", "interview")
    solved = [Solved(task_id=str(i), difficulty=name, n=2, correct=i % 3) for i, name in enumerate(names)]
    groups = by_difficulty(solved, [1, 2])
    assert list(groups) == ["introductory", "interview", "A", "B", "all"]
    # interview: 0 and 1 of 2 are right
    assert [groups["interview"].rates[k].value for k in (1, 2)] == [0.25, 0.5]
    assert (groups["all"].problems, groups["all"].samples) == (5, 10)


def test_without_difficulties_there_is_only_all() -> None:
    assert list(by_difficulty([Solved(task_id="a", difficulty="", n=1, correct=1)], [1])) == ["all"]


def test_a_problem_without_samples_counts_as_not_solved() -> None:
    solved = [Solved(task_id="a", difficulty="", n=1, correct=1), Solved(task_id="b", difficulty="", n=0, correct=0)]
    assert by_difficulty(solved, [1])["all"].rates[1].value == 0.5


def test_the_interval_is_that_of_the_binomial_where_problems_are_solved_or_not() -> None:
    found = mean_over_problems(np.array([1.0] * 30 + [0.0] * 70))
    # standard error sqrt(0.3 * 0.7 / 100) = 0.0458: 0.3 +- 0.09
    assert found.value == 0.3
    assert found.low == pytest.approx(0.21, abs=0.02)
    assert found.high == pytest.approx(0.39, abs=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    numbers = np.random.default_rng(0)
    found = [mean_over_problems((numbers.random(60) < 0.4).astype(float)) for _ in range(100)]
    covered = sum(bool(x.low is not None and x.high is not None and x.low <= 0.4 <= x.high) for x in found)
    assert 88 <= covered <= 100


def test_one_problem_has_no_interval_and_many_do_not_fit_at_once() -> None:
    assert mean_over_problems(np.array([1.0])).low is None
    many = mean_over_problems(np.tile([0.0, 1.0], 1500))  # drawn in blocks
    assert many.low is not None
    assert 0.47 < many.low < 0.5
