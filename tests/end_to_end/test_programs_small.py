"""The recipe `programs-small` by its commands, in short: benchmarks/programs.py runs it whole."""

import re
from pathlib import Path

import pytest
import yaml

from apportion.data.functions import FunctionsData, write_functions
from apportion.data.tasks import PLACES
from command_line import apportion, metrics_but_times, read_jsonl, refusal

SIZES = FunctionsData(sft=2048, prompts=256, prompts_eval=96)
SHORT = ("--num_steps", "12", "--batch_size", "32", "--eval_steps", "12", "--learning_rate", "5e-4")
CHOICE = ("--credit.termination", "CodeParse", "--credit.redistribution", "ErrorLine")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the task was written, fine-tuned and trained on by the recipe."""
    folder = tmp_path_factory.mktemp("programs-small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_functions(PLACES["functions"], SIZES)
        for argv in (
            ("sft", "--config", "programs-small", "--max_steps", "100"),
            ("ppo", "--config", "programs-small", *SHORT, *CHOICE),
            (
                *("generate", "--config", "programs-small", "--num_prompts", "8"),
                *("--reward_function.limits.wall_seconds", "2"),
            ),
        ):
            done = apportion(*argv)
            assert done.code == 0, done
    return folder / "runs" / "functions"


@pytest.mark.slow
def test_programs_get_better_by_what_their_tests_say(trained: Path) -> None:
    first, last = [record for record in metrics_but_times(trained / "ppo") if "eval/score" in record]
    assert last["eval/score"] > first["eval/score"] + 0.1
    assert last["eval/compiled"] > first["eval/compiled"] + 0.05
    assert 0 <= first["eval/all_passed"] <= 1


@pytest.mark.slow
def test_rows_report_how_each_program_ended(trained: Path) -> None:
    for rows in (read_jsonl(trained / "ppo" / "samples.jsonl"), read_jsonl(trained / "ppo" / "responses.jsonl")):
        assert all(len(row["per_test"]) == SIZES.tests for row in rows)
        assert {row["status"] for row in rows} <= {"ok", "compile_error", "runtime_error", "timeout"}


@pytest.mark.slow
def test_the_kept_configuration_holds_the_rewards_settings(trained: Path) -> None:
    config = yaml.safe_load((trained / "ppo" / "config.yaml").read_text())
    assert config["reward_function"]["class_path"] == "apportion.score.program_tests.ProgramTests"
    assert config["reward_function"]["init_args"]["limits"]["wall_seconds"] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reward_function", "ProgramTest"), "ProgramTest"),
        (("--reward_function", "apportion.data.files.Files"), "is a class"),
        (("--reward_function", "apportion.data.reviews.oracle"), "which oracle does not report; give a reward"),
        (("--reward_function.workers", "0"), "workers is 0; choose at least 1"),
        (("--data.path", "runs/functions/task/sft.jsonl", "--data.eval_path=null"), "missing .*'problem'; add the col"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(
    flags: tuple[str, ...], message: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parents[1])
    refused = refusal(apportion("ppo", "--config", "programs-small", *CHOICE, *flags, "--output_dir", "refused"))
    assert re.search(message, refused), refused
    assert not Path("refused").exists()
