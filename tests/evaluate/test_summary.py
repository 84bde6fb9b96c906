import json
import math
from pathlib import Path

import pytest

from apportion.evaluate.statistics import Estimate
from apportion.evaluate.summary import read_comparison, smoothing_window
from recorded_runs import write_run


def test_parity_is_counted_in_updates_samples_and_seconds(tmp_path: Path) -> None:
    """ma-rlhf.md section 4 row 20 and abc.md section 10 row 12: speed, apart from final quality."""
    # Evaluated at 0, 2, ... 8. The baseline's score is the step, so it ends at 8. The other is three times as high: it
    # reaches 8 a third of the way from 2 to 4, after 2.667 updates of 4 samples and 3 seconds each.
    baseline = write_run(tmp_path / "token")
    fast = write_run(tmp_path / "macro", method="macro", score=lambda step: 3.0 * step, pace=3.0)
    result = read_comparison([baseline, fast])
    assert (result.level, result.window) == (8.0, 1)
    assert result.rows[1]["updates to parity"].value == pytest.approx(8 / 3)
    assert result.rows[1]["samples to parity"].value == pytest.approx(32 / 3)
    assert result.rows[1]["seconds to parity"].value == pytest.approx(8.0)
    assert result.rows[1]["seconds an update"] == Estimate(value=3.0)


def test_the_score_at_start_and_end_is_held_out_and_averaged_over_seeds(tmp_path: Path) -> None:
    """abc.md section 10 row 12 and 14: a mean over steps was called the reward."""
    runs = [
        write_run(tmp_path / f"ppo-{seed}", seed=seed, score=lambda step, s=seed: 1.0 + s * step) for seed in (1, 2, 3)
    ]
    row = read_comparison(runs).rows[0]
    assert row["score, start"] == Estimate(value=1.0, low=1.0, high=1.0)
    # 9, 17 and 25 after 8 updates.
    assert row["score, end"] == Estimate(value=17.0, low=9.0, high=25.0)
    assert row["KL a response, end"].value == pytest.approx(1.6)
    assert row["length, end"].value == 12.0


def test_without_evaluations_the_training_score_is_compared_and_said_to_be(tmp_path: Path) -> None:
    result = read_comparison([write_run(tmp_path / "run", every=100)])
    assert result.score == "score/mean"
    assert result.rows[0]["training score, end"].value == 4.0
    assert "Not every run holds an evaluation on held-out prompts" in result.notes[0]


def test_every_other_held_out_reward_has_a_column_and_a_method_without_it_a_note(tmp_path: Path) -> None:
    rewards = {"oracle": lambda step: 2.0 * step, "brevity": lambda _: 1.0}
    first = write_run(tmp_path / "first", evaluated=rewards)
    result = read_comparison([first, write_run(tmp_path / "second", method="other")])
    assert result.others == ("eval/brevity", "eval/oracle")
    assert result.rows[0]["oracle, end"].value == 16.0
    assert math.isnan(result.rows[1]["oracle, end"].value)
    assert "second did not record eval/oracle." in result.notes


def test_a_single_seed_is_said_to_have_no_interval_and_few_seeds_to_give_rough_ones(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"ppo-{seed}", seed=seed) for seed in (1, 2)]
    result = read_comparison([*runs, write_run(tmp_path / "macro", method="macro")])
    assert result.notes[0] == "A single seed has no interval: macro. Differences to it may be chance."
    assert result.notes[1] == "Intervals from fewer than 5 seeds are rough, mostly too narrow: ppo."
    assert result.rows[1]["updates to parity"].low is None


def test_a_method_that_never_reaches_the_baseline_says_so(tmp_path: Path) -> None:
    slow = write_run(tmp_path / "slow", method="slow", score=lambda step: 0.1 * step)
    result = read_comparison([write_run(tmp_path / "fast"), slow])
    assert result.rows[1]["seconds to parity"].value == math.inf
    assert "Within their updates these never reached the final level of fast: slow." in result.notes


def test_a_baseline_that_did_not_rise_says_that_parity_says_nothing(tmp_path: Path) -> None:
    result = read_comparison([write_run(tmp_path / "run", score=lambda step: -float(step))])
    assert "run ended no higher than it started: to reach its level says nothing." in result.notes


def test_a_line_cut_off_and_values_that_are_not_finite_are_counted_aloud(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", score=lambda step: math.nan if step == 8 else 1.0)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "sc')
    result = read_comparison([run])
    assert f"{run} holds 1 values that are not finite; what depends on them is n/a." in result.notes
    assert any(note.startswith(f"The last line of {run} is cut off") for note in result.notes)
    assert math.isnan(result.rows[0]["score, end"].value)
    assert math.isnan(result.rows[0]["updates to parity"].value)


def test_runs_of_different_lengths_are_refused(tmp_path: Path) -> None:
    """abc.md section 10 row 13."""
    folders = [write_run(tmp_path / "long", steps=8), write_run(tmp_path / "short", steps=6, method="other")]
    with pytest.raises(ValueError, match="compare runs of the same length and eval_steps"):
        read_comparison(folders)


def test_no_run_and_runs_without_a_score_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run was given"):
        read_comparison([])
    run = write_run(tmp_path / "run")
    lines = [{"step": step, "samples": step, "seconds": step} for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="no score to compare: not every run recorded eval/score or score/mean"):
        read_comparison([run])


@pytest.mark.parametrize(("points", "window"), [(2, 1), (13, 1), (20, 3), (60, 7), (100, 11)])
def test_a_tenth_of_the_curve_is_averaged_and_a_short_one_left_as_it_is(points: int, window: int) -> None:
    assert smoothing_window(points) == window
