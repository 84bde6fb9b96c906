import json
from pathlib import Path

import pytest

from command_line import apportion, refusal
from recorded_runs import write_run


def test_runs_are_compared_from_the_command_line_and_the_first_is_the_baseline(here: Path) -> None:
    write_run(here / "token")
    for seed in (0, 1):
        write_run(here / f"macro-{seed}", method="macro", seed=seed, score=lambda step: 3.0 * step)
    done = apportion("compare", "token", "macro-0", "macro-1", "--output", "out/report")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "report: out/report/report.md"
    assert {path.name for path in (here / "out" / "report").iterdir()} == {
        *("report.md", "report.json", "curves.png", "samples.md"),
    }
    methods = json.loads((here / "out" / "report" / "report.json").read_text())["methods"]
    assert [len(method["runs"]) for method in methods] == [1, 2]  # runs that differ in their seed are one method


@pytest.mark.parametrize(
    ("runs", "told"),
    [(["token", "nope"], "nope is not a run folder"), (["token", "token"], "give one"), (["empty"], "empty")],
)
def test_what_cannot_be_compared_is_refused_in_one_line(runs: list[str], told: str, here: Path) -> None:
    write_run(here / "token")
    (here / "empty").mkdir()
    assert told in refusal(apportion("compare", *runs))
    assert not (here / "report").exists()
