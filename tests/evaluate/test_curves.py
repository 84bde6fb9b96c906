from pathlib import Path

import numpy as np
import pytest

from apportion.evaluate.curves import check_grid, differing_settings, group_by_method, read_run
from recorded_runs import write_run


def labels(*folders: Path) -> list[str]:
    return [method.label for method in group_by_method([read_run(folder) for folder in folders])]


def test_a_metric_is_read_at_the_steps_that_recorded_it(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=4, score=lambda step: 10.0 * step))
    assert run.label == "run"
    assert run.steps("eval/score").tolist() == [0, 2, 4]
    assert run.values("eval/score").tolist() == [0.0, 20.0, 40.0]
    assert run.steps("score/mean").tolist() == [1, 2, 3, 4]
    assert run.spent("samples", [0, 4]).tolist() == [0.0, 16.0]
    assert len(run.steps("absent")) == 0


def test_runs_that_differ_only_in_their_seed_are_one_method(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "ppo-seed1", seed=1), write_run(tmp_path / "ppo-seed2", seed=2)
    other = write_run(tmp_path / "macro", method="macro")
    methods = group_by_method([read_run(folder) for folder in (first, other, second)])
    assert [(method.label, len(method.runs)) for method in methods] == [("ppo", 2), ("macro", 1)]
    assert [run.seed for run in methods[0].runs] == [1, 2]
    assert methods[0].values("eval/score").shape == (2, 5)
    assert differing_settings(methods) == {"method": ["token", "macro"]}


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("ppo-seed0", "ppo-seed1"), "ppo"),
        (("ppo", "ppo_seed_1"), "ppo"),
        (("lam0.95_0", "lam0.95_1"), "lam0.95"),
        (("ma-ppo-n5-s0", "ma-ppo-n5-s12"), "ma-ppo-n5"),
        (("abc/seed0", "abc/seed1"), "abc"),
        (("monday", "tuesday"), "monday and 1 more"),
    ],
)
def test_a_method_is_called_what_its_folders_have_in_common(names: tuple[str, str], label: str, tmp_path: Path) -> None:
    assert labels(*(write_run(tmp_path / name, seed=seed) for seed, name in enumerate(names))) == [label]


def test_methods_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "ppo", method=place) for place in ("a", "b")]
    assert labels(*folders) == ["a/ppo", "b/ppo"]
    deeper = [write_run(tmp_path / place / "x" / "ppo", method=place) for place in ("a", "b")]
    assert labels(*deeper) == ["x/ppo (1)", "x/ppo (2)"]


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    first, copy = write_run(tmp_path / "first"), write_run(tmp_path / "copy")
    for pair in ((first, first), (first, copy)):
        with pytest.raises(ValueError, match="have the same configuration and seed; give one"):
            labels(*pair)


def test_the_seed_is_the_least_deep_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("credit:\n  termination:\n    seed: 5\nseed: 7\n")
    assert read_run(folder).seed == 7


def test_what_is_not_a_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent is not a run folder: it has no config\.yaml"):
        read_run(tmp_path / "absent")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no metrics\.jsonl"):
        read_run(tmp_path)


def test_empty_metrics_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for content in ("", '{"step": 0'):
        (folder / "metrics.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"metrics\.jsonl is empty: the run has recorded nothing yet"):
            read_run(folder)


def test_steps_that_do_not_increase_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1}\n')
    with pytest.raises(ValueError, match="the steps do not increase; two runs may have written into it"):
        read_run(folder)


def test_a_step_that_does_not_say_what_was_spent_is_refused(tmp_path: Path) -> None:
    """ma-rlhf.md section 4 row 20: a logged step was a micro-batch."""
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: step 1 does not say 'seconds'"):
        read_run(folder).spent("seconds", [0, 1])


def test_curves_on_different_steps_are_refused_with_where_each_was_recorded(tmp_path: Path) -> None:
    """abc.md section 10 row 13: runs of other lengths were mixed."""
    folders = [write_run(tmp_path / "long", steps=12), write_run(tmp_path / "short", steps=4, method="other")]
    methods = group_by_method([read_run(folder) for folder in folders])
    message = r"at 7 updates \(0, 2, \.\.\. 12\) in .*long but at updates 0, 2, 4 in .*short; compare runs of the same"
    with pytest.raises(ValueError, match=message):
        check_grid(methods, "eval/score")


def test_a_method_that_never_recorded_a_metric_is_left_aside_but_a_single_seed_is_not(tmp_path: Path) -> None:
    oracle = {"oracle": lambda step: float(step)}
    with_it = read_run(write_run(tmp_path / "with", evaluated=oracle))
    without = read_run(write_run(tmp_path / "without", method="other"))
    check_grid(group_by_method([with_it, without]), "eval/oracle")
    seed = read_run(write_run(tmp_path / "seed", seed=1))
    with pytest.raises(ValueError, match="but at no update in"):
        check_grid(group_by_method([with_it, seed]), "eval/oracle")


def test_seconds_are_the_mean_over_the_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{seed}", seed=seed, pace=pace) for seed, pace in enumerate((1.0, 3.0))]
    method = group_by_method([read_run(run) for run in runs])[0]
    # 1 and 3 seconds an update: after 4 updates (4 + 12) / 2.
    assert method.spent("seconds", np.array([0, 4])).tolist() == [0.0, 8.0]
