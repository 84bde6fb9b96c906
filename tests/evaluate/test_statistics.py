import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import trim_mean

from apportion.evaluate.statistics import (
    Estimate,
    at_position,
    bootstrap_means,
    estimate,
    first_reach,
    interquartile_mean,
    interval,
    parity,
    smoothed,
)


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    # Four seeds: 1 and 100 are left out, (2 + 3) / 2.
    assert interquartile_mean(np.array([100.0, 2.0, 3.0, 1.0])) == 2.5
    # Eight: two at each end are left out, (3 + 4 + 5 + 6) / 4.
    assert interquartile_mean(np.array([1.0, 2, 3, 4, 5, 6, 7, 800])) == 4.5


def test_the_interquartile_mean_of_three_seeds_is_their_mean() -> None:
    assert interquartile_mean(np.array([1.0, 2.0, 9.0])) == 4.0


@given(arrays(np.float64, st.tuples(st.integers(1, 13), st.integers(1, 3)), elements=st.floats(-1e3, 1e3)))
def test_the_interquartile_mean_equals_the_trimmed_mean_of_scipy(values: np.ndarray) -> None:
    np.testing.assert_allclose(interquartile_mean(values), trim_mean(values, 0.25, axis=0), rtol=1e-9, atol=1e-9)


def test_an_unknown_value_makes_the_mean_unknown_and_is_not_trimmed_away() -> None:
    assert np.isnan(interquartile_mean(np.array([1.0, 2.0, 3.0, np.nan])))


def test_resamples_draw_whole_curves_and_are_the_same_every_time() -> None:
    # The second step is ten times the first in each seed, so it is in each resample of whole curves.
    values = np.array([[1.0, 10.0], [2.0, 20.0], [5.0, 50.0]])
    draws = bootstrap_means(values, resamples=500)
    np.testing.assert_allclose(draws[:, 1], 10 * draws[:, 0])
    np.testing.assert_array_equal(draws, bootstrap_means(values, resamples=500))
    assert len(np.unique(draws[:, 0].round(9))) == 10  # multisets of three out of three


def test_resampling_in_blocks_of_steps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(5, 17))
    whole = bootstrap_means(values, resamples=40)
    monkeypatch.setattr("apportion.evaluate.statistics.BLOCK", 5 * 40 * 4)
    np.testing.assert_array_equal(whole, bootstrap_means(values, resamples=40))


def test_the_interval_of_a_thousand_and_one_draws_lies_at_the_26th_from_either_end() -> None:
    # 0.025 * 1000 = 25 and 0.975 * 1000 = 975, counted from 0.
    low, high = interval(np.random.default_rng(0).permutation(1001.0 * np.ones(1) + np.arange(1001))[:, None])
    assert (low[0] - 1001, high[0] - 1001) == (25.0, 975.0)


def test_an_interval_over_draws_that_never_reached_is_infinite_above_and_not_nan() -> None:
    low, high = interval(np.array([1.0] * 90 + [np.inf] * 10)[:, None])
    assert (low[0], high[0]) == (1.0, np.inf)


def test_a_single_seed_has_no_interval() -> None:
    assert estimate(np.array([3.0])) == Estimate(value=3.0)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    # 20 seeds of a normal: a percentile bootstrap of the interquartile mean is a little narrow, never by much.
    rng = np.random.default_rng(1)
    intervals = [estimate(rng.normal(size=20)) for _ in range(200)]
    covered = sum(1 for e in intervals if e.low is not None and e.high is not None and e.low <= 0 <= e.high)
    assert 0.87 <= covered / 200 <= 0.99


def test_smoothing_averages_the_part_of_the_window_inside_the_curve() -> None:
    # Window 3: (1+2)/2, (1+2+6)/3, (2+6+4)/3, (6+4)/2.
    np.testing.assert_allclose(smoothed(np.array([[1.0, 2.0, 6.0, 4.0]]), 3), [[1.5, 3.0, 4.0, 5.0]])


def test_smoothing_over_one_step_changes_nothing_and_over_all_steps_gives_the_mean_in_the_middle() -> None:
    curve = np.array([[3.0, 1.0, 8.0]])
    np.testing.assert_array_equal(smoothed(curve, 1), curve)
    # Window 5 on three points holds all of them everywhere.
    np.testing.assert_allclose(smoothed(curve, 5), [[4.0, 4.0, 4.0]])


def test_smoothing_a_straight_line_delays_nothing() -> None:
    line = np.arange(9.0)[None]
    np.testing.assert_allclose(smoothed(line, 3)[0, 1:-1], line[0, 1:-1])


def test_an_even_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 4; a centred average needs an odd number of steps, such as 5"):
        smoothed(np.ones((1, 9)), 4)


def test_a_curve_reaches_a_level_on_the_straight_line_between_two_steps() -> None:
    # From 2 at step 1 to 6 at step 2: level 3 is a quarter of the way.
    curves = np.array([[0.0, 2.0, 6.0, 1.0]] * 4)
    np.testing.assert_allclose(first_reach(curves, np.array([3.0, -1.0, 6.0, 7.0])), [1.25, 0.0, 2.0, np.inf])


def test_what_was_spent_is_read_between_the_steps_and_never_stays_never() -> None:
    spent = np.array([0.0, 32.0, 64.0])
    np.testing.assert_allclose(at_position(np.array([0.0, 1.5, 2.0, np.inf]), spent), [0.0, 48.0, 64.0, np.inf])


def test_parity_is_where_the_mean_over_seeds_reaches_the_last_value_of_the_baseline() -> None:
    # Baseline ends at (1 + 3) / 2 = 2; the method's mean is 0, 1, 3, 5: halfway from step 1 to step 2.
    baseline = np.array([[0.0, 0.0, 0.5, 1.0], [0.0, 1.0, 2.0, 3.0]])
    position, draws = parity(np.array([[0.0, 0.0, 2.0, 4.0], [0.0, 2.0, 4.0, 6.0]]), baseline)
    assert position == 1.5
    assert draws is not None
    # The highest level, 3, against the lower seed is reached at 2.5; the lowest, 1, against the higher at 0.5.
    assert (draws.min(), draws.max()) == (0.5, 2.5)


def test_a_baseline_is_resampled_together_with_itself() -> None:
    # Rising straight to its end, each resample reaches its own final level exactly at the end, whatever the seeds.
    baseline = np.array([[0.0, 1.0, 2.0], [0.0, 3.0, 6.0], [0.0, 2.0, 4.0]])
    position, draws = parity(baseline, baseline)
    assert position == 2.0
    assert draws is not None
    np.testing.assert_allclose(draws, 2.0)


def test_parity_has_no_interval_where_either_side_has_a_single_seed() -> None:
    one, two = np.array([[0.0, 2.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    assert parity(one, two) == (0.5, None)
    assert parity(two, one) == (np.inf, None)


def test_parity_with_an_unknown_value_is_unknown() -> None:
    position, draws = parity(np.array([[0.0, np.nan]]), np.array([[0.0, 1.0]]))
    assert np.isnan(position)
    assert draws is None
