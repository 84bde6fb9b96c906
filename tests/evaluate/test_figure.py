import math
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from apportion.evaluate.figure import draw_curves, figure_of, spread_labels
from apportion.evaluate.summary import read_comparison
from recorded_runs import write_run


def drawn(*folders: Path) -> Figure:
    return figure_of(read_comparison(list(folders)))


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_every_panel_shows_every_recorded_step_and_names_every_method(tmp_path: Path) -> None:
    """abc.md section 10 row 8: figures were cut at step 100 of 151."""
    oracle = {"oracle": lambda step: float(step)}
    seeds = [write_run(tmp_path / f"ppo-{seed}", seed=seed, evaluated=oracle) for seed in (1, 2)]
    figure = drawn(*seeds, write_run(tmp_path / "macro", method="macro", evaluated=oracle))
    assert titles(figure) == [
        "Held-out score against updates",
        "Held-out score against samples",
        "Held-out score against seconds",
        "Held-out score against the KL it cost",
        "Response length against updates",
        "Oracle against updates",
    ]
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["ppo", "macro"]
    steps = [line.get_xdata() for line in figure.axes[0].lines]
    assert [0, 2, 4, 6, 8] in [np.asarray(x).tolist() for x in steps]
    lengths = [np.asarray(line.get_xdata()).tolist() for line in figure.axes[4].lines]
    assert [1, 2, 3, 4, 5, 6, 7, 8] in lengths


def test_the_caption_counts_the_runs_and_says_what_the_bands_are(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / f"ppo-{seed}", seed=seed) for seed in (1, 2)]
    caption = drawn(*seeds).get_suptitle()
    assert "2 runs: ppo (2 seeds)." in caption
    assert "95 % bootstrap interval" in caption
    assert "1 run: ppo-1 (1 seed). Lines: single seeds, no intervals." in drawn(seeds[0]).get_suptitle()


def test_a_band_is_drawn_over_seeds_and_none_for_a_single_seed(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / f"ppo-{seed}", seed=seed) for seed in (1, 2)]
    assert len(drawn(*seeds).axes[0].collections) == 1
    assert len(drawn(seeds[0]).axes[0].collections) == 0


def test_ten_methods_are_told_apart_by_colour_and_dashes(tmp_path: Path) -> None:
    figure = drawn(*(write_run(tmp_path / f"method{i}", method=str(i)) for i in range(10)))
    lines = [line for line in figure.axes[0].lines if len(np.asarray(line.get_xdata())) == 5]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 10


def test_a_long_curve_is_smoothed_with_its_own_values_faint_behind(tmp_path: Path) -> None:
    figure = drawn(write_run(tmp_path / "run", steps=40, every=1))
    whole = [line for line in figure.axes[0].lines if len(np.asarray(line.get_xdata())) == 41]
    assert [line.get_alpha() for line in whole] == [0.35, None]


def test_values_that_are_not_finite_leave_a_gap_and_no_error(tmp_path: Path) -> None:
    for number, score in enumerate((lambda step: math.nan if step == 8 else 1.0, lambda _: math.nan)):
        run = write_run(tmp_path / f"run{number}", score=score)
        draw_curves(read_comparison([run]), tmp_path / "curves.png")
        assert imread(tmp_path / "curves.png").shape[2] == 4


@given(st.lists(st.floats(0, 1), max_size=12))
def test_labels_keep_their_order_and_their_mean_and_do_not_touch(heights: list[float]) -> None:
    placed = spread_labels(heights, 0.07)
    assert len(placed) == len(heights)
    if heights:
        assert abs(sum(placed) - sum(heights)) < 1e-9
    ordered = sorted(placed)
    assert all(later - earlier > 0.07 - 1e-9 for earlier, later in pairwise(ordered))
    assert [placed[i] for i in np.argsort(heights, kind="stable")] == ordered


def test_labels_that_do_not_touch_stay_where_they_are() -> None:
    assert spread_labels([0.9, 0.1, 0.5], 0.07) == [0.9, 0.1, 0.5]
