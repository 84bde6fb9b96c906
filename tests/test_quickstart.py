import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from apportion.quickstart import METHODS, Quickstart, Stage, claim, methods, preparations, tell_accuracy
from apportion.train.run import flatten_config
from command_line import apportion
from tiny_start import tiny_start

SETTINGS = Quickstart(seed=3, num_steps=7)


def resolved(stage: Stage) -> dict:
    shown = apportion(*stage.argv, "--print_config")
    assert (shown.code, shown.err) == (0, ""), shown
    return flatten_config(yaml.safe_load(shown.out))


def test_each_stage_is_a_command_that_is_understood_and_writes_where_the_next_one_looks(tmp_path: Path) -> None:
    sft, reward = preparations(tmp_path, 3)
    task = tmp_path / "task"
    assert resolved(sft)["model"] == str(task / "base")
    assert resolved(reward)["model"] == resolved(sft)["output_dir"] == str(sft.folder)
    for stage in methods(tmp_path, SETTINGS):
        settings = resolved(stage)
        assert (settings["model"], settings["reward_model"]) == (str(sft.folder), str(reward.folder))
        assert (settings["output_dir"], settings["resume"]) == (str(stage.folder), True)
        assert (settings["seed"], settings["num_steps"]) == (3, 7)
        assert settings["data.init_args.eval_path"] == str(task / "prompts_eval.jsonl")


def test_the_methods_differ_in_their_credit_and_in_nothing_else(tmp_path: Path) -> None:
    settings = {stage.name: resolved(stage) for stage in methods(tmp_path, SETTINGS)}
    names = {key for one in settings.values() for key in one}
    different = {key for key in names if len({str(one.get(key)) for one in settings.values()}) > 1}
    assert {key.split(".")[0] for key in different} == {"credit", "output_dir"}
    chosen = {
        name: [one[f"credit.{axis}.class_path"].split(".")[-1] for axis in ("termination", "redistribution")]
        for name, one in settings.items()
    }
    assert chosen == {
        "ppo": ["EveryToken", "Terminal"],
        "ma-ppo": ["FixedNgram", "Terminal"],
        "abc": ["EveryToken", "Attention"],
        "prefix-difference": ["EveryToken", "PrefixDifference"],
    }
    assert settings["ma-ppo"]["credit.termination.init_args.n"] == 5
    assert settings["abc"]["credit.redistribution.init_args.beta"] == 0.8


def test_a_folder_belongs_to_one_quickstart(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    claim(folder, "quickstart", {"seed": 3, "num_steps": 7})
    claim(folder, "quickstart", {"seed": 3, "num_steps": 7})
    with pytest.raises(ValueError, match=r"'seed': 3.*'seed': 4.*choose another output_dir"):
        claim(folder, "quickstart", {"seed": 4, "num_steps": 7})
    with pytest.raises(ValueError, match="'num_steps': 7"):
        claim(folder, "quickstart", {"seed": 3, "num_steps": 8})
    with pytest.raises(ValueError, match="holds no quickstart"):
        claim(tmp_path, "quickstart", {"seed": 3, "num_steps": 7})


@pytest.mark.parametrize(("accuracy", "warned"), [(0.84, True), (0.85, False)])
def test_a_poor_reward_model_is_told(accuracy: float, warned: bool, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"eval_accuracy": accuracy}))
    console = Console(width=200, file=io.StringIO(), record=True)
    tell_accuracy(tmp_path, console)
    told = console.export_text()
    assert f"held-out pair accuracy {accuracy:.3f}" in told
    assert ("warning" in told) is warned


def test_a_stage_that_fails_is_told_in_one_line_with_its_log(tmp_path: Path) -> None:
    folder = tmp_path / "quick"
    claim(folder, "quickstart", {"seed": 0, "num_steps": 1})
    tiny_start(folder, seed=0)
    (folder / "sft" / "metrics.json").unlink()
    shutil.rmtree(folder / "task" / "base")
    done = apportion("quickstart", "--output_dir", folder, "--num_steps", 1)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert f"sft failed with exit status 2: apportion sft: error: model folder {folder / 'task' / 'base'}" in done.err
    assert str(folder / "sft.log") in done.err


@pytest.mark.slow
def test_four_methods_are_trained_and_compared_and_a_second_call_has_nothing_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "quick"
    claim(folder, "quickstart", {"seed": 0, "num_steps": 1})
    tiny_start(folder, seed=0)
    command = ("quickstart", "--output_dir", folder, "--num_steps", 1, "--jobs", 2)
    first, second = apportion(*command), apportion(*command)
    assert (first.code, first.err) == (0, ""), [path.read_text()[-2000:] for path in folder.glob("*.log")]
    assert (second.code, second.err) == (0, "")
    assert first.out.count("(done before)") == 2  # fine-tuning and the reward model
    assert second.out.count("(done before)") == len(METHODS) + 2
    report = json.loads((folder / "report" / "report.json").read_text())
    assert len(report["methods"]) == len(METHODS)
    assert {"report.md", "curves.png", "samples.md"} <= {path.name for path in (folder / "report").iterdir()}
