import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from apportion.control import Control, beside, claim, controls, runs
from apportion.recipes import text_of
from apportion.train.run import flatten_config
from command_line import apportion
from tiny_start import tiny_start

SETTINGS = Control(names=["mean-rewards"], seeds=[4, 5], num_steps=7)
# What each control changes of the one that it stands beside.
CHANGES = {
    "ma-ppo": {"termination.class_path", "termination.init_args.n"},
    "abc": {"redistribution.class_path", "redistribution.init_args.beta", "redistribution.init_args.row"},
    "prefix-difference": {
        "redistribution.class_path",
        "redistribution.init_args.beta",
        "redistribution.init_args.from_prompt",
    },
    "uniform": {"redistribution.class_path", "redistribution.init_args.row"},
    "attention-shuffled": {
        "redistribution.class_path",
        "redistribution.init_args.beta",
        "redistribution.init_args.row",
    },
    "mean-rewards": {"macro_reward"},
    "mean-rewards-apart": {"macro_reward"},
    "kl-over-n": {"termination.class_path", "termination.init_args.n", "kl_coef"},
    "lam-root": {"termination.class_path", "termination.init_args.n", "advantage.init_args.lam"},
    "lam-1": {"termination.class_path", "termination.init_args.n", "advantage.init_args.lam"},
    "per-token": {"advantage.init_args.per"},
    "value-smoothing": {"termination.class_path", "termination.init_args.n", "value_smoothing.class_path"},
    "perplexity": {
        *("termination.class_path", "termination.init_args.n"),
        *("termination.init_args.variant", "termination.init_args.early"),
    },
    "boundaries-shuffled": {
        *("termination.class_path", "termination.init_args.variant", "termination.init_args.early"),
    },
    "parse": {
        *("termination.class_path", "termination.init_args.n"),
        *(f"termination.init_args.{name}" for name in ("cutoff", "workers", "backend")),
    },
    "parse-shuffled": {
        "termination.class_path",
        *(f"termination.init_args.{name}" for name in ("cutoff", "workers", "backend")),
    },
    "last-token-apart": {"last_token_apart"},
    "clamped-scores": {"score_clamp"},
}


def resolved(name: str, folder: Path) -> dict:
    (stage,) = runs(folder, [name], Control(names=[name], seeds=[4], num_steps=7))
    shown = apportion(*stage.argv, "--print_config")
    assert (shown.code, shown.err) == (0, ""), shown
    return flatten_config(yaml.safe_load(shown.out))


def test_every_control_but_the_first_stands_beside_another() -> None:
    assert {name for name in controls() if beside(name) is None} == {"ppo"}
    assert set(CHANGES) | {"ppo"} == set(controls())


@pytest.mark.parametrize("name", CHANGES)
def test_a_control_changes_what_it_is_about_and_nothing_else(name: str, tmp_path: Path) -> None:
    other = beside(name)
    assert other is not None
    ours, theirs = resolved(name, tmp_path), resolved(other, tmp_path)
    different = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)} - {"output_dir"}
    further = (".init_args", ".seed", "value_smoothing", "smoothing.init_args.n")
    inner = {key for key in different if ".inner." in key or key.endswith(further)}
    assert {key.removeprefix("credit.") for key in different - inner} == CHANGES[name]


def test_a_root_of_lam_forgets_as_fast_as_a_macro_action() -> None:
    advantage = yaml.safe_load(text_of("controls/lam-root"))["ppo"]["credit"]["advantage"]
    assert advantage["init_args"]["lam"] ** 5 == pytest.approx(0.95, abs=1e-4)


def test_runs_are_listed_once_seed_by_seed(tmp_path: Path) -> None:
    listed = runs(tmp_path, ["ma-ppo", "mean-rewards", "ma-ppo"], SETTINGS)
    assert [stage.name for stage in listed] == ["ma-ppo-4", "mean-rewards-4", "ma-ppo-5", "mean-rewards-5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": []}, "no control is given; name some of abc"),
        ({"names": ["foo"]}, "there is no control 'foo'; one of abc"),
        ({"seeds": []}, r"seeds is \[\]; give at least one"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; give at least one, each once"),
        ({"num_steps": 0}, "num_steps is 0; choose at least 1"),
        ({"jobs": 0}, "jobs is 0; choose at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Control(names=["ppo"]), **changes)


@pytest.mark.slow
def test_a_control_runs_beside_its_method_and_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "controls"
    claim(folder, "control", {"start_seed": 0, "num_steps": 1})
    tiny_start(folder / "start", seed=0)
    command = ("control", "mean-rewards", "--output_dir", folder, "--num_steps", 1, "--seeds", 0, 1, "--jobs", 2)
    first, second = apportion(*command), apportion(*command)
    assert (first.code, first.err) == (0, ""), [path.read_text()[-2000:] for path in folder.glob("*.log")]
    assert (second.code, second.out.count("(done before)")) == (0, 6)
    report = json.loads((folder / "report-mean-rewards" / "report.json").read_text())
    assert [len(method["runs"]) for method in report["methods"]] == [2, 2]
