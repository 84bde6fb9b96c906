"""The report of a comparison: a table, a picture, the samples, and the same numbers for programs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apportion.evaluate.curves import Method, differing_settings
from apportion.evaluate.figure import draw_curves
from apportion.evaluate.statistics import CONFIDENCE, RESAMPLES, Estimate
from apportion.evaluate.summary import Comparison, read_comparison
from apportion.train.run import SAMPLES, read_records

# A terminal narrower than this gets the table with a method a column.
WIDE = 130


def compare(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Compare runs and write the report: report.md, report.json, curves.png and samples.md.

    Runs whose configurations differ only in a seed are one method; the method of the first run is the baseline. The
    table is printed as well.

    Args:
        runs: Run folders.
        output: Folder of the report, made if it is not there; files of an earlier report in it are replaced.

    Returns:
        Path of report.md.

    Raises:
        FileNotFoundError: If one of them is not a run folder.
        ValueError: If there is none, one is empty, two are the same, or they recorded at different steps.
    """
    result = read_comparison([Path(run) for run in runs])
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    draw_curves(result, output / "curves.png")
    (output / "samples.md").write_text(samples_markdown(result.methods), encoding="utf-8")
    (output / "report.json").write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (output / "report.md").write_text(report_markdown(result), encoding="utf-8")
    print_table(result, Console())
    return output / "report.md"


def print_table(result: Comparison, console: Console) -> None:
    """Print the table and the notes; with a method a column where the console is too narrow for a row each."""
    cells = _table(result, between="\n")
    wide = console.width >= WIDE
    head, *body = cells if wide else list(zip(*cells, strict=True))
    table = Table(title=_count(result), title_justify="left", show_lines=True)
    for index, title in enumerate(head):
        table.add_column(title, justify="left" if index == 0 else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    console.print(table, markup=False)
    for note in result.notes:
        console.print(f"- {note}", markup=False, highlight=False)


def report_markdown(result: Comparison) -> str:
    """Return the report as markdown: picture, table, what the numbers mean and what they cannot tell, the runs."""
    head, *body = _table(result, between=" ")
    sections = [
        f"# Comparison of {_count(result)}",
        "![Curves](curves.png)",
        _markdown_table(head, body),
        "\n".join(f"- {note}" for note in result.notes),
        "## How to read it",
        _reading(result),
    ]
    different = differing_settings(result.methods)
    if different:
        rows = [[f"`{key}`", *(f"`{json.dumps(v, default=str)}`" for v in values)] for key, values in different.items()]
        sections += [
            "## What differs",
            _markdown_table(["setting", *(method.label for method in result.methods)], rows),
        ]
    sections += ["## Runs", _runs_table(result), "Responses: [samples.md](samples.md)"]
    return "\n\n".join(section for section in sections if section) + "\n"


def samples_markdown(methods: Sequence[Method]) -> str:
    """Return what each method answered to the same prompts, before training and at its last evaluation.

    Of several seeds the first is shown. Text of a model stands in fences, which it cannot close.
    """
    samples = {method.label: read_records(method.runs[0].folder / SAMPLES) for method in methods}
    first = next((each for each in samples.values() if each), [])
    if not first:
        return "# Samples\n\nNo run recorded samples.\n"
    sections = ["# Samples", "One response a prompt, from the first run of each method."]
    for number, prompt in enumerate(dict.fromkeys(_text(sample["prompt"]) for sample in first), start=1):
        sections += [f"## Prompt {number}", _fenced(prompt)]
        before = [sample for sample in first if _text(sample["prompt"]) == prompt and sample["step"] == 0]
        sections += _shown("before training", before[:1])
        for label, each in samples.items():
            last = max((sample["step"] for sample in each), default=0)
            same = [sample for sample in each if _text(sample["prompt"]) == prompt and sample["step"] == last]
            sections += _shown(f"{label}, update {last}", same[:1]) or [f"**{label}**: no sample of this prompt."]
    return "\n\n".join(sections) + "\n"


def number(value: float) -> str:
    """Return a number with about three digits; `n/a` if unknown, `never` if it counts what was not reached."""
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "never"
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f}"


def _cell(estimate: Estimate, between: str) -> str:
    if estimate.low is None or estimate.high is None:
        return number(estimate.value)
    return f"{number(estimate.value)}{between}[{number(estimate.low)}, {number(estimate.high)}]"


def _table(result: Comparison, between: str) -> list[list[str]]:
    """Return the rows of the table as text, its head first."""
    rows = [["method", "seeds", "updates", *result.rows[0]]]
    for method, row in zip(result.methods, result.rows, strict=True):
        counts = [str(len(method.runs)), f"{method.runs[0].records[-1]['step']:,}"]
        rows.append([method.label, *counts, *(_cell(estimate, between) for estimate in row.values())])
    return rows


def _count(result: Comparison) -> str:
    runs, methods = sum(len(method.runs) for method in result.methods), len(result.methods)
    return f"{runs} run{'s' if runs > 1 else ''} of {methods} method{'s' if methods > 1 else ''}"


def _reading(result: Comparison) -> str:
    source = "held-out prompts" if result.score == "eval/score" else "the prompts of training"
    smoothing = f", averaged over {result.window} neighbouring records," if result.window > 1 else ""
    lines = [
        f"- Numbers are interquartile means over seeds (of fewer than four, the mean). Brackets hold {CONFIDENCE:.0%} "
        f"bootstrap intervals over seeds ({RESAMPLES:,} resamples); a single seed has none.",
        f"- The score is `{result.score}`, on {source}: start and end are its first and its last record.",
        f"- Parity: the first time the score{smoothing} reaches the final level of {result.methods[0].label}, "
        f"{number(result.level)}; between records on a straight line. "
        "`never`: not within the run. The interval draws the seeds of both anew.",
        "- Seconds are training time without evaluation, samples are responses, KL is in nats, summed over a response.",
    ]
    if result.others:
        names = ", ".join(f"`{name}`" for name in result.others)
        lines.append(f"- Further rewards, read on the same held-out responses: {names}.")
    return "\n".join(lines)


def _runs_table(result: Comparison) -> str:
    """Return every run by itself, so that nothing hides in a mean."""
    names = (result.score, *result.others)
    rows = [
        [
            method.label,
            run.label,
            str(run.seed),
            f"{run.records[-1]['step']:,}",
            *(number(float(run.values(name)[-1])) if len(run.steps(name)) else "n/a" for name in names),
            f"`{run.folder}`",
        ]
        for method in result.methods
        for run in method.runs
    ]
    return _markdown_table(["method", "run", "seed", "updates", *(f"`{name}`, end" for name in names), "folder"], rows)


def _markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _shown(title: str, samples: Iterable[dict[str, Any]]) -> list[str]:
    shown = []
    for sample in samples:
        measured = {name: value for name, value in sample.items() if name != "step" and isinstance(value, int | float)}
        words = [f"{name} {number(value)}" for name, value in measured.items()]
        shown += [f"**{title}**" + (f" ({', '.join(words)})" if words else ""), _fenced(_text(sample["response"]))]
    return shown


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _plain(result: Comparison) -> dict[str, Any]:
    """Return the numbers as JSON can hold them: null is unknown, or was never reached."""
    return {
        "baseline": result.methods[0].label,
        "score": result.score,
        "baseline_final_level": _finite(result.level),
        "smoothing_window": result.window,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "methods": [
            {
                "label": method.label,
                "updates": method.runs[0].records[-1]["step"],
                "runs": [{"label": r.label, "folder": str(r.folder), "seed": r.seed} for r in method.runs],
                "estimates": {title: _plain_estimate(estimate) for title, estimate in row.items()},
            }
            for method, row in zip(result.methods, result.rows, strict=True)
        ],
        "different_settings": {key: list(map(str, v)) for key, v in differing_settings(result.methods).items()},
        "notes": list(result.notes),
    }


def _plain_estimate(estimate: Estimate) -> dict[str, float | None]:
    return {name: _finite(getattr(estimate, name)) for name in ("value", "low", "high")}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
