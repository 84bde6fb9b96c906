from pathlib import Path

from apportion.stages import Stage
from apportion.train.run import CHECKPOINTS
from recorded_runs import write_run


def test_a_run_is_complete_when_its_last_checkpoint_and_its_policy_are_there(tmp_path: Path) -> None:
    stage = Stage(name="ppo", argv=(), folder=tmp_path / "ppo", total=8)
    assert (stage.done(), stage.complete()) == (0, False)
    write_run(stage.folder, steps=8)
    assert (stage.done(), stage.complete()) == (8, False)
    (stage.folder / CHECKPOINTS / "step-000008").mkdir()
    assert not stage.complete()
    (stage.folder / "model").mkdir()
    assert stage.complete()
    assert not Stage(name="ppo", argv=(), folder=stage.folder, total=9).complete()


def test_a_preparation_is_complete_when_its_metrics_are_there(tmp_path: Path) -> None:
    stage = Stage(name="sft", argv=(), folder=tmp_path)
    assert (stage.done(), stage.complete()) == (0, False)
    (tmp_path / "metrics.json").write_text("{}")
    assert (stage.done(), stage.complete()) == (1, True)
