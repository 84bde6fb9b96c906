import json
import math
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from apportion.evaluate.curves import group_by_method, read_run
from apportion.evaluate.report import compare, number, print_table, report_markdown, samples_markdown
from apportion.evaluate.summary import read_comparison
from recorded_runs import write_run


def two_methods(folder: Path) -> list[Path]:
    return [
        write_run(folder / "token-1", seed=1, score=lambda step: 1.0 * step),
        write_run(folder / "token-2", seed=2, score=lambda step: 2.0 * step),
        write_run(folder / "macro", method="macro", score=lambda step: 0.5 * step),
    ]


def test_compare_writes_the_report_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = compare(two_methods(tmp_path), tmp_path / "out" / "report")
    assert written == tmp_path / "out" / "report" / "report.md"
    names = {"report.md", "report.json", "curves.png", "samples.md"}
    assert {path.name for path in written.parent.iterdir()} == names
    assert "3 runs of 2 methods" in capsys.readouterr().out


def test_the_markdown_table_holds_a_row_a_method_with_intervals_over_seeds(tmp_path: Path) -> None:
    markdown = report_markdown(read_comparison(two_methods(tmp_path)))
    # After 8 updates 8 and 16; the macro run ends at 4, below the final level of token, (9 + 12) / 2 = 10.5.
    assert "| token | 2 | 8 | 0.00 [0.00, 0.00] | 12.0 [8.00, 16.0] |" in markdown
    assert "| macro | 1 | 8 | 0.00 | 4.00 | 1.60 | 12.0 | never | never | never | 2.00 |" in markdown
    assert "A single seed has no interval: macro." in markdown
    assert '| `method` | `"token"` | `"macro"` |' in markdown


def test_every_run_stands_in_the_report_by_itself(tmp_path: Path) -> None:
    markdown = report_markdown(read_comparison(two_methods(tmp_path)))
    for label, seed, end in (("token-1", 1, "8.00"), ("token-2", 2, "16.0"), ("macro", 0, "4.00")):
        assert f"| {label} | {seed} | 8 | {end} | `{tmp_path / label}` |" in markdown


def test_the_json_is_strict_and_null_where_a_level_was_never_reached(tmp_path: Path) -> None:
    compare(two_methods(tmp_path), tmp_path / "report")
    text = (tmp_path / "report" / "report.json").read_text()
    report = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not strict JSON"))
    token, macro = report["methods"]
    assert report["baseline"] == "token"
    assert report["baseline_final_level"] == 12.0
    assert token["estimates"]["score, end"] == {"value": 12.0, "low": 8.0, "high": 16.0}
    assert macro["estimates"]["updates to parity"]["value"] is None
    assert [run["seed"] for run in token["runs"]] == [1, 2]


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_table_is_whole_in_a_narrow_and_in_a_wide_terminal(width: int, tmp_path: Path) -> None:
    out = StringIO()
    print_table(read_comparison(two_methods(tmp_path)), Console(width=width, file=out))
    text = out.getvalue()
    for piece in ("token", "macro", "[8.00, 16.0]", "never", "A single seed has no interval: macro."):
        assert piece in text
    assert all(len(line) <= width for line in text.splitlines())


def test_the_same_runs_give_the_same_report(tmp_path: Path) -> None:
    runs = two_methods(tmp_path)
    compare(runs, tmp_path / "a")
    compare(runs, tmp_path / "b")
    for name in ("report.md", "report.json", "samples.md", "curves.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_samples_show_each_method_on_the_same_prompt_before_and_after_training(tmp_path: Path) -> None:
    methods = group_by_method([read_run(folder) for folder in two_methods(tmp_path)])
    text = samples_markdown(methods)
    first, second = text.split("## Prompt 2")
    pieces = ("the film", "**before training** (score 0.00, kl n/a)", "was token 0", "was token 8", "was macro 8")
    positions = [first.index(piece) for piece in pieces]
    assert positions == sorted(positions)
    assert "a plot" in second


def test_text_of_a_model_cannot_leave_its_fence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    hostile = {"step": 8, "prompt": "p", "response": "```\n# Mine\n````", "score": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(hostile) + "\n")
    text = samples_markdown(group_by_method([read_run(run)]))
    assert "`````text\n```\n# Mine\n````\n`````" in text


def test_a_method_without_a_sample_of_a_prompt_says_so(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", method="other")
    (second / "samples.jsonl").unlink()
    methods = group_by_method([read_run(first), read_run(second)])
    assert "**second**: no sample of this prompt." in samples_markdown(methods)
    (first / "samples.jsonl").unlink()
    assert samples_markdown(methods) == "# Samples\n\nNo run recorded samples.\n"


def test_a_prompt_of_chat_messages_is_shown_as_json(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    sample = {"step": 0, "prompt": [{"role": "user", "content": "hé"}], "response": "r", "score": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    assert '[{"role": "user", "content": "hé"}]' in samples_markdown(group_by_method([read_run(run)]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0.00"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100"), (-12.34, "-12.3"), (1920.0, "1,920")),
        *((math.nan, "n/a"), (math.inf, "never")),
    ],
)
def test_a_number_has_about_three_digits(value: float, text: str) -> None:
    assert number(value) == text
